// softmax(Q Kᵀ / √d) V in bfloat16 for CPUs with AVX-512 BF16, without ever storing the L × S weights.
//
// What it does, for one head; a test runs these lines and holds the C to them:
//
//     top, total, out = torch.full((len(q), 1), -1e30), 0, 0
//     for k, v in zip(keys.split(256), values.split(256)):
//         scores = q @ k.T / q.shape[1] ** 0.5
//         before, top = top, torch.maximum(top, scores.amax(1, keepdim=True))
//         shrink, weights = torch.exp(before - top), torch.exp(scores - top)
//         total = total * shrink + weights.sum(1, keepdim=True)
//         out = out * shrink + weights @ v
//     out = out / total
//
// PyTorch's kernel does so too, but multiplies small blocks through a general library; here six queries at a
// time stay in registers from the first product to the last. The running maximum and sum are Algorithm 3 of
// Milakov & Gimelshein 2018, the walk over blocks of keys is Algorithm 1 of Dao et al. 2022. Sums and
// exponentials are float32, and the weights are rounded to bfloat16 once, as in PyTorch's kernel. The rest is
// bringing numbers into the order in which the processor wants them. `native.py` compiles this file.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 16,  // floats in a register
    ROWS = 6,    // queries × keys whose scores are in the nearest cache at one time
    KEYS = 256,
    BLOCKS = 16,  // of ROWS queries that read a tile of keys while it is near
    MOST = 512,  // numbers in a head
};

typedef struct { const uint16_t *data; int64_t batch, head, row; } View;  // (B, heads, L, d), strides in elements

static const uint16_t *row(View x, int64_t b, int64_t h, int64_t i) {
    return x.data + b * x.batch + h * x.head + i * x.row;
}

// Rows of a tile that are computed: those that are there, up to the next 64.
static int rounded(int64_t left) { return left < KEYS ? ((int)left + 63) / 64 * 64 : KEYS; }

// The instruction multiplies pairs of bfloat16: sum + a₀b₀ + a₁b₁ in each of 16 lanes.
static inline __m512 multiply_add(__m512 sum, uint32_t pair, const uint32_t *pairs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)_mm512_loadu_si512(pairs));
}

// 2^x to 4e-6 of its value: 2^⌊x⌋ by the exponent, 2^f, 0 ≤ f < 1, by a polynomial.
static inline __m512 exp2_(__m512 x) {
    const float c[] = {1.00000259f, 0.693003835f, 0.241442756f, 0.0520114622f, 0.0135341671f};
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - ⌊x⌋
    __m512 y = _mm512_set1_ps(c[4]);
    for (int i = 3; i >= 0; i--) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(y, x);  // takes ⌊x⌋ itself
}

// scores (ROWS, KEYS) = q (ROWS, d/2) · k (KEYS/64, d/2, 64)ᵀ
static void multiply_keys(const uint32_t *q, const uint32_t *k, int pairs, int keys, float *scores) {
    for (int block = 0; block < keys; block += 64, k += 64 * pairs) {
        __m512 sum[ROWS][4] = {{{0}}};
        for (int i = 0; i < pairs; i++)
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sum[r][j] = multiply_add(sum[r][j], q[r * pairs + i], k + 64 * i + LANES * j);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) _mm512_store_ps(scores + r * KEYS + block + LANES * j, sum[r][j]);
    }
}

// out (ROWS, width) = shrink · out + p (ROWS, KEYS/2) · v (KEYS/2, width), for `columns` vectors of 16
static inline __attribute__((always_inline)) void multiply_values(
    const uint32_t *p, const uint32_t *v, const float *shrink, float *out, int width, int keys, const int columns) {
    __m512 sum[ROWS][5];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 5
        for (int j = 0; j < columns; j++)
            sum[r][j] = _mm512_mul_ps(_mm512_set1_ps(shrink[r]), _mm512_load_ps(out + r * width + LANES * j));
    for (int i = 0; i < keys / 2; i++)
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 5
            for (int j = 0; j < columns; j++)
                sum[r][j] = multiply_add(sum[r][j], p[r * (KEYS / 2) + i], v + i * width + LANES * j);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 5
        for (int j = 0; j < columns; j++) _mm512_store_ps(out + r * width + LANES * j, sum[r][j]);
}

static void add_values(const uint32_t *p, const uint32_t *v, const float *shrink, float *out, int width, int keys) {
    for (int c = 0; c < width; c += 5 * LANES)
        switch (width - c < 5 * LANES ? (width - c) / LANES : 5) {
            case 1: multiply_values(p, v + c, shrink, out + c, width, keys, 1); break;
            case 2: multiply_values(p, v + c, shrink, out + c, width, keys, 2); break;
            case 3: multiply_values(p, v + c, shrink, out + c, width, keys, 3); break;
            case 4: multiply_values(p, v + c, shrink, out + c, width, keys, 4); break;
            default: multiply_values(p, v + c, shrink, out + c, width, keys, 5);
        }
}

typedef struct { float top[ROWS], total[ROWS]; } State;  // of a block of queries: the maximum and sum so far

// One block of queries against one tile of keys, all packed in pairs. out (ROWS, width) is not yet divided by total.
static void attend(const uint32_t *q, const uint32_t *k, const uint32_t *v, int left, int pairs, int width,
                   float scale, State *state, float *out) {
    float scores[ROWS * KEYS] __attribute__((aligned(64)));
    uint16_t weights[ROWS * KEYS] __attribute__((aligned(64)));
    float shrink[ROWS];
    const int keys = rounded(left);
    multiply_keys(q, k, pairs, keys, scores);
    for (int r = 0; r < ROWS; r++) {
        float *x = scores + r * KEYS;
        for (int i = left; i < keys; i++) x[i] = -1e30f;  // no key is there
        __m512 highest = _mm512_load_ps(x);
        for (int i = LANES; i < keys; i += LANES) highest = _mm512_max_ps(highest, _mm512_load_ps(x + i));
        // Algorithm 3, lines 4 and 5, Milakov & Gimelshein 2018: what was summed below a lower maximum shrinks
        const float before = state->top[r];
        state->top[r] = fmaxf(before, _mm512_reduce_max_ps(highest));
        shrink[r] = exp2f((before - state->top[r]) * scale);
        const __m512 top = _mm512_set1_ps(state->top[r]), by = _mm512_set1_ps(scale);
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < keys; i += 2 * LANES) {
            const __m512 a = exp2_(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(x + i), top), by));
            const __m512 b = exp2_(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(x + i + LANES), top), by));
            sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
            _mm512_store_si512(weights + r * KEYS + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        state->total[r] = state->total[r] * shrink[r] + _mm512_reduce_add_ps(sum);
    }
    add_values((const uint32_t *)weights, v, shrink, out, width, keys);
}

static uint32_t pair(uint16_t first, uint16_t second) { return first | (uint32_t)second << 16; }

// A tile of x from the first row on, (KEYS, d) -> (KEYS/64, d/2, 64), pairs along d. From the end on, zeros.
static void pack_across(View x, int64_t b, int64_t h, int64_t first, int64_t end, int pairs, uint32_t *to) {
    const int rows = rounded(end - first);
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t *from = first + i < end ? row(x, b, h, first + i) : NULL;
        for (int j = 0; j < pairs; j++)
            to[(i / 64 * pairs + j) * 64 + i % 64] = from ? pair(from[2 * j], from[2 * j + 1]) : 0;
    }
}

// The same rows, (KEYS, d) -> (KEYS/2, width), pairs along the rows.
static void pack_along(View x, int64_t b, int64_t h, int64_t first, int64_t end, int64_t d, int width,
                       uint32_t *to) {
    const int rows = rounded(end - first);
    memset(to, 0, sizeof(uint32_t) * rows / 2 * width);
    for (int64_t i = 0; i < rows / 2 && first + 2 * i < end; i++) {
        const uint16_t *one = row(x, b, h, first + 2 * i);
        const uint16_t *two = first + 2 * i + 1 < end ? row(x, b, h, first + 2 * i + 1) : NULL;
        for (int j = 0; j < d; j++) to[i * width + j] = pair(one[j], two ? two[j] : 0);
    }
}

// q (B, heads, L, d), k and v (B, heads, S, d) -> out (B, L, heads, d), contiguous. d is even, 512 at most.
// sums (B, heads, L), or NULL: takes log₂ Σ e^score of each query. Returns 0, or 1 where there was no memory.
int attention(View q, View k, View v, uint16_t *out, float *log_sums, int64_t B, int64_t heads, int64_t L,
              int64_t S, int64_t d, int threads) {
    const float scale = (float)(M_LOG2E / sqrt((double)d));  // e^x = 2^(x log₂ e)
    const int pairs = (int)d / 2, width = (int)(d + LANES - 1) / LANES * LANES;
    const int64_t tiles = (S + KEYS - 1) / KEYS, groups = (L + BLOCKS * ROWS - 1) / (BLOCKS * ROWS);
    const int64_t k_size = tiles * KEYS * pairs, v_size = tiles * KEYS / 2 * width;
    uint32_t *packed = aligned_alloc(64, (sizeof(uint32_t) * B * heads * (k_size + v_size) + 63) / 64 * 64);
    if (packed == NULL) return 1;

#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t head = 0; head < B * heads; head++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            uint32_t *keys = packed + head * (k_size + v_size), *values = keys + k_size;
            pack_across(k, head / heads, head % heads, tile * KEYS, S, pairs, keys + tile * KEYS * pairs);
            pack_along(v, head / heads, head % heads, tile * KEYS, S, d, width, values + tile * KEYS / 2 * width);
        }

#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t head = 0; head < B * heads; head++)
        for (int64_t group = 0; group < groups; group++) {
            uint32_t query[BLOCKS * ROWS * MOST / 2];
            float sums[BLOCKS * ROWS * MOST] __attribute__((aligned(64)));
            State states[BLOCKS];
            const int64_t b = head / heads, h = head % heads, first = group * BLOCKS * ROWS;
            const int rows = (int)(L - first < BLOCKS * ROWS ? L - first : BLOCKS * ROWS);
            const int blocks = (rows + ROWS - 1) / ROWS;
            memset(query, 0, sizeof(uint32_t) * blocks * ROWS * pairs);
            memset(sums, 0, sizeof(float) * blocks * ROWS * width);
            for (int r = 0; r < blocks * ROWS; r++) {
                states[r / ROWS].top[r % ROWS] = -1e30f, states[r / ROWS].total[r % ROWS] = 0;
                if (r < rows) memcpy(query + r * pairs, row(q, b, h, first + r), sizeof(uint16_t) * d);
            }
            const uint32_t *keys = packed + head * (k_size + v_size), *values = keys + k_size;
            for (int64_t s = 0; s < S; s += KEYS, keys += KEYS * pairs, values += KEYS / 2 * width)
                for (int i = 0; i < blocks; i++)
                    attend(query + i * ROWS * pairs, keys, values, (int)(S - s < KEYS ? S - s : KEYS), pairs, width,
                           scale, states + i, sums + i * ROWS * width);
            for (int r = 0; r < rows && log_sums != NULL; r++) {
                const State *state = states + r / ROWS;
                log_sums[head * L + first + r] = state->top[r % ROWS] * scale + log2f(state->total[r % ROWS]);
            }
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < d; c += LANES) {
                    const __m512 total = _mm512_set1_ps(states[r / ROWS].total[r % ROWS]);
                    const __m512 x = _mm512_div_ps(_mm512_load_ps(sums + r * width + c), total);
                    const __mmask16 inside = (__mmask16)(d - c < LANES ? (1 << (d - c)) - 1 : 0xffff);
                    uint16_t *to = out + ((b * L + first + r) * heads + h) * d + c;
                    _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(x));
                }
        }
    free(packed);
    return 0;
}

// ---- The gradients, for training ----------------------------------------------------------------------------
//
// What they are, for one head, if `grad` is the gradient of `out` and `sums` is log₂ Σ e^score of each query:
//
//     weights = torch.exp2(q @ k.T * log2(e) / q.shape[1] ** 0.5 - sums[:, None])
//     slopes = weights * (grad @ v.T - (grad * out).sum(1, keepdim=True))
//     to_q, to_k, to_v = slopes @ k / q.shape[1] ** 0.5, slopes.T @ q / q.shape[1] ** 0.5, weights.T @ grad
//
// As in Algorithm 4 of Dao et al. 2022 no L × S matrix is stored. Here the weights are computed twice, by
// queries for `to_q` and by keys for the other two: both walks are then products that are already above.

// The sum of the products of two rows
static float dot(const uint16_t *x, const uint16_t *y, int64_t d) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < d; c += 2 * LANES) {
        const __mmask32 inside = d - c < 2 * LANES ? (1u << (d - c)) - 1 : 0xffffffff;
        const __m512i a = _mm512_maskz_loadu_epi16(inside, x + c), b = _mm512_maskz_loadu_epi16(inside, y + c);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    return _mm512_reduce_add_ps(sum);
}

// The weights and slopes (ROWS, KEYS) of some rows and a tile. of_rows: rows are queries and the tile is of keys,
// else the other way round; sums and dots belong to the queries. a, c: the rows of q and grad, or of k and v.
static inline __attribute__((always_inline)) void find_slopes(
    const uint32_t *a, const uint32_t *c, const uint32_t *tile_a, const uint32_t *tile_c, int left, int pairs,
    float scale, const float *sums, const float *dots, const int of_rows, uint16_t *weights, uint16_t *slopes) {
    float scores[ROWS * KEYS] __attribute__((aligned(64))), changes[ROWS * KEYS] __attribute__((aligned(64)));
    const int keys = rounded(left);
    multiply_keys(a, tile_a, pairs, keys, scores);
    multiply_keys(c, tile_c, pairs, keys, changes);
    for (int r = 0; r < ROWS; r++) {
        for (int i = left; i < keys; i++) scores[r * KEYS + i] = -1e30f;  // nothing is there
        for (int i = 0; i < keys; i += 2 * LANES) {
            __m512 p[2], s[2];
            for (int j = 0; j < 2; j++) {
                const int at = i + j * LANES;
                const __m512 sum = of_rows ? _mm512_set1_ps(sums[r]) : _mm512_loadu_ps(sums + at);
                const __m512 dot = of_rows ? _mm512_set1_ps(dots[r]) : _mm512_loadu_ps(dots + at);
                const __m512 x = _mm512_load_ps(scores + r * KEYS + at);
                // A weight is 1 at most, also where scores are so large that their difference is rounding.
                p[j] = exp2_(_mm512_min_ps(_mm512_setzero_ps(), _mm512_fmsub_ps(x, _mm512_set1_ps(scale), sum)));
                s[j] = _mm512_mul_ps(p[j], _mm512_sub_ps(_mm512_load_ps(changes + r * KEYS + at), dot));
            }
            _mm512_store_si512(weights + r * KEYS + i, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
            _mm512_store_si512(slopes + r * KEYS + i, (__m512i)_mm512_cvtne2ps_pbh(s[1], s[0]));
        }
    }
}

// sums (rows, width) · by -> to, contiguous (B, length, heads, d), from a row on
static void write_rows(const float *sums, int rows, int width, float by, int64_t d, int64_t heads, uint16_t *to) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < d; c += LANES) {
            const __mmask16 inside = (__mmask16)(d - c < LANES ? (1 << (d - c)) - 1 : 0xffff);
            const __m512 x = _mm512_mul_ps(_mm512_load_ps(sums + r * width + c), _mm512_set1_ps(by));
            _mm256_mask_storeu_epi16(to + r * heads * d + c, inside, (__m256i)_mm512_cvtneps_pbh(x));
        }
}

// What the walks need of q, k, v or grad, for one head.
typedef struct {
    uint32_t *rows;    // (length, d/2), as they are
    uint32_t *across;  // in tiles, to multiply rows with
    uint32_t *along;   // in tiles, to be added up
} Packed;

static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static int64_t size_of(int64_t length, int pairs, int width) {
    return up(length, ROWS) * pairs + up(length, KEYS) * pairs + up(length, KEYS) / 2 * width;
}

static Packed pack(View x, int64_t b, int64_t h, int64_t length, int64_t d, int width, uint32_t *memory) {
    const int pairs = (int)d / 2;
    uint32_t *across = memory + up(length, ROWS) * pairs, *along = across + up(length, KEYS) * pairs;
    memset(memory, 0, sizeof(uint32_t) * up(length, ROWS) * pairs);
    for (int64_t i = 0; i < length; i++) memcpy(memory + i * pairs, row(x, b, h, i), sizeof(uint16_t) * d);
    for (int64_t i = 0; i < length; i += KEYS) {
        pack_across(x, b, h, i, length, pairs, across + i * pairs);
        pack_along(x, b, h, i, length, d, width, along + i / 2 * width);
    }
    return (Packed){memory, across, along};
}

// As `attention`, whose result and sums are given; grad (B, heads, L, d) is the gradient of that result.
// -> to_q (B, L, heads, d), to_k and to_v (B, S, heads, d). Threads share the heads.
int attention_gradients(View q_, View k_, View v_, View out, View grad_, const float *log_sums, uint16_t *to_q,
                        uint16_t *to_k, uint16_t *to_v, int64_t B, int64_t heads, int64_t L, int64_t S, int64_t d,
                        int threads) {
    const float scale = (float)(M_LOG2E / sqrt((double)d)), by = (float)(1 / sqrt((double)d));
    const float ones[ROWS] = {1, 1, 1, 1, 1, 1};
    const int pairs = (int)d / 2, width = (int)up(d, LANES);
    const int64_t of_L = size_of(L, pairs, width), of_S = size_of(S, pairs, width), room = up(L, KEYS) + ROWS;
    int failed = 0;

#pragma omp parallel num_threads(threads)
    {
        uint16_t weights[ROWS * KEYS] __attribute__((aligned(64))), slopes[ROWS * KEYS] __attribute__((aligned(64)));
        float one[ROWS * MOST] __attribute__((aligned(64))), two[ROWS * MOST] __attribute__((aligned(64)));
        uint32_t *memory = calloc(2 * (of_L + of_S + room), sizeof(uint32_t));
        float *sums = (float *)(memory + 2 * (of_L + of_S)), *dots = sums + room;
        if (memory == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < B * heads; head++) {
            if (memory == NULL) continue;
            const int64_t b = head / heads, h = head % heads;
            const Packed q = pack(q_, b, h, L, d, width, memory), grad = pack(grad_, b, h, L, d, width, memory + of_L);
            const Packed k = pack(k_, b, h, S, d, width, memory + 2 * of_L);
            const Packed v = pack(v_, b, h, S, d, width, memory + 2 * of_L + of_S);
            for (int64_t i = 0; i < L; i++) {
                sums[i] = log_sums[head * L + i];
                dots[i] = dot(row(grad_, b, h, i), row(out, b, h, i), d);
            }
            for (int64_t i = 0; i < L; i += ROWS) {  // by queries
                memset(one, 0, sizeof(float) * ROWS * width);
                for (int64_t s = 0; s < S; s += KEYS) {
                    const int left = (int)(S - s < KEYS ? S - s : KEYS);
                    find_slopes(q.rows + i * pairs, grad.rows + i * pairs, k.across + s * pairs, v.across + s * pairs,
                                left, pairs, scale, sums + i, dots + i, 1, weights, slopes);
                    add_values((uint32_t *)slopes, k.along + s / 2 * width, ones, one, width, rounded(left));
                }
                const int rows = (int)(L - i < ROWS ? L - i : ROWS);
                write_rows(one, rows, width, by, d, heads, to_q + ((b * L + i) * heads + h) * d);
            }
            for (int64_t i = 0; i < S; i += ROWS) {  // by keys
                memset(one, 0, sizeof(float) * ROWS * width), memset(two, 0, sizeof(float) * ROWS * width);
                for (int64_t s = 0; s < L; s += KEYS) {
                    const int left = (int)(L - s < KEYS ? L - s : KEYS);
                    find_slopes(k.rows + i * pairs, v.rows + i * pairs, q.across + s * pairs, grad.across + s * pairs,
                                left, pairs, scale, sums + s, dots + s, 0, weights, slopes);
                    add_values((uint32_t *)slopes, q.along + s / 2 * width, ones, one, width, rounded(left));
                    add_values((uint32_t *)weights, grad.along + s / 2 * width, ones, two, width, rounded(left));
                }
                const int rows = (int)(S - i < ROWS ? S - i : ROWS);
                write_rows(one, rows, width, by, d, heads, to_k + ((b * S + i) * heads + h) * d);
                write_rows(two, rows, width, 1, d, heads, to_v + ((b * S + i) * heads + h) * d);
            }
        }
        free(memory);
    }
    return failed;
}
