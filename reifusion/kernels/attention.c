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

typedef struct { float top[ROWS], total[ROWS]; } State;  // of a block of queries: the maximum and sum so far

// One block of queries against one tile of keys, all packed in pairs. out (ROWS, width) is not yet divided by total.
static void attend(const uint32_t *q, const uint32_t *k, const uint32_t *v, int left, int pairs, int width,
                   float scale, State *state, float *out) {
    float scores[ROWS * KEYS] __attribute__((aligned(64)));
    uint16_t weights[ROWS * KEYS] __attribute__((aligned(64)));
    float shrink[ROWS];
    const int keys = (left + 63) / 64 * 64;
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
    const uint32_t *p = (const uint32_t *)weights;
    for (int c = 0; c < width; c += 5 * LANES)
        switch (width - c < 5 * LANES ? (width - c) / LANES : 5) {
            case 1: multiply_values(p, v + c, shrink, out + c, width, keys, 1); break;
            case 2: multiply_values(p, v + c, shrink, out + c, width, keys, 2); break;
            case 3: multiply_values(p, v + c, shrink, out + c, width, keys, 3); break;
            case 4: multiply_values(p, v + c, shrink, out + c, width, keys, 4); break;
            default: multiply_values(p, v + c, shrink, out + c, width, keys, 5);
        }
}

static uint32_t pair(uint16_t first, uint16_t second) { return first | (uint32_t)second << 16; }

// q (B, heads, L, d), k and v (B, heads, S, d) -> out (B, L, heads, d), contiguous. d is even, 512 at most.
// Returns 0, or 1 where there was no memory.
int attention(View q, View k, View v, uint16_t *out, int64_t B, int64_t heads, int64_t L, int64_t S, int64_t d,
              int threads) {
    const float scale = (float)(M_LOG2E / sqrt((double)d));  // e^x = 2^(x log₂ e)
    const int pairs = (int)d / 2, width = (int)(d + LANES - 1) / LANES * LANES;
    const int64_t tiles = (S + KEYS - 1) / KEYS, groups = (L + BLOCKS * ROWS - 1) / (BLOCKS * ROWS);
    const int64_t k_size = tiles * KEYS * pairs, v_size = tiles * KEYS / 2 * width;
    uint32_t *packed = aligned_alloc(64, (sizeof(uint32_t) * B * heads * (k_size + v_size) + 63) / 64 * 64);
    if (packed == NULL) return 1;

#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t head = 0; head < B * heads; head++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            uint32_t *to_k = packed + head * (k_size + v_size) + tile * KEYS * pairs;
            uint32_t *to_v = packed + head * (k_size + v_size) + k_size + tile * KEYS / 2 * width;
            memset(to_v, 0, sizeof(uint32_t) * KEYS / 2 * width);
            for (int64_t i = 0; i < KEYS; i++) {  // (S, d) -> (S/64, d/2, 64), pairs along d
                const int64_t s = tile * KEYS + i;
                const uint16_t *from = s < S ? row(k, head / heads, head % heads, s) : NULL;
                for (int j = 0; j < pairs; j++)
                    to_k[(i / 64 * pairs + j) * 64 + i % 64] = from ? pair(from[2 * j], from[2 * j + 1]) : 0;
            }
            for (int64_t i = 0; i < KEYS / 2; i++) {  // (S, d) -> (S/2, d), pairs along S
                const int64_t s = tile * KEYS + 2 * i;
                if (s >= S) break;
                const uint16_t *first = row(v, head / heads, head % heads, s);
                const uint16_t *second = s + 1 < S ? row(v, head / heads, head % heads, s + 1) : NULL;
                for (int j = 0; j < d; j++) to_v[i * width + j] = pair(first[j], second ? second[j] : 0);
            }
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
