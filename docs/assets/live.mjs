// Stable Diffusion in plain JavaScript around three networks: what model/tokenizer.py, noise.py, ddpm.py,
// samplers.py and pipeline.py do, with the same equations, so that a seed draws the picture that Python draws.

// Noise: Matsumoto & Nishimura 1998's Mersenne Twister, and from it normal numbers, as torch.randn makes them.

export class Twister {
  constructor(seed) {
    const state = this.state = new Uint32Array(624);
    state[0] = seed >>> 0;
    for (let i = 1; i < 624; i++) {
      const x = state[i - 1] ^ (state[i - 1] >>> 30);
      state[i] = Math.imul(1812433253, x) + i;
    }
    this.at = 624;
  }

  next() {  // -> the next 32 bits
    const s = this.state;
    if (this.at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
        s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let y = s[this.at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  uniform() { return (this.next() & 0xffffff) / 2 ** 24; }  // in [0, 1), 24 bits

  normal(count) {  // -> count normal numbers; count is a multiple of 16
    const z = Float32Array.from({ length: count }, () => this.uniform());
    for (let from = 0; from < count; from += 16) {
      for (let j = from; j < from + 8; j++) {
        // Box & Muller 1958: √(−2 ln u₁) cos 2πu₂ and √(−2 ln u₁) sin 2πu₂ are normal, and independent
        const radius = Math.sqrt(-2 * Math.log(1 - z[j])), angle = 2 * Math.PI * z[j + 8];
        z[j] = radius * Math.cos(angle);
        z[j + 8] = radius * Math.sin(angle);
      }
    }
    return z;
  }
}

// Words: byte-pair encoding (Sennrich et al. 2016, Algorithm 1).

export class Tokenizer {
  constructor({ merges, length, start, end, pad }) {
    const visible = [[33, 127], [161, 173], [174, 256]].flatMap(([a, b]) => Array.from({ length: b - a }, (_, i) => a + i));
    const hidden = Array.from({ length: 256 }, (_, byte) => byte).filter((byte) => !visible.includes(byte));
    this.letters = new Map([...visible.map((byte) => [byte, String.fromCodePoint(byte)]),
      ...hidden.map((byte, i) => [byte, String.fromCodePoint(256 + i)])]);
    const pairs = merges.split("\n").filter(Boolean), letters = [...this.letters.values()];
    const tokens = [...letters, ...letters.map((letter) => `${letter}</w>`), ...pairs.map((pair) => pair.replace(" ", ""))];
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(pairs.map((pair, rank) => [pair, rank]));
    Object.assign(this, { length, start, end, pad });
  }

  words(text) {
    return text.normalize("NFC").replaceAll("Σ", "σ").toLowerCase()
      .match(/'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu) ?? [];
  }

  merge(word) {  // -> its tokens: of all pairs, the one learned first becomes one, until none is known
    const parts = [...new TextEncoder().encode(word)].map((byte) => this.letters.get(byte));
    parts[parts.length - 1] += "</w>";
    while (parts.length > 1) {
      let best = null, rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const found = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (found < rank) [best, rank] = [[parts[i], parts[i + 1]], found];
      }
      if (!best) break;
      for (let i = 0; i + 1 < parts.length; i++) {
        if (parts[i] === best[0] && parts[i + 1] === best[1]) parts.splice(i, 2, best.join(""));
      }
    }
    return parts;
  }

  encode(text) {  // -> {ids: start, the text's, end, padding; places: of each word, where its tokens stand}
    const ids = [this.start], places = [];
    for (const word of this.words(text)) {
      const tokens = this.merge(word).map((token) => this.ids.get(token)).slice(0, this.length - 1 - ids.length);
      if (tokens.length) places.push({ word, at: tokens.map((_, i) => ids.length + i) });
      ids.push(...tokens);
    }
    ids.push(this.end);
    return { ids: [...ids, ...Array(this.length - ids.length).fill(this.pad)], places };
  }
}

// The schedule, and the ways back. All of it works on arrays of numbers; `each` computes one number at a time.

const each = (f, ...arrays) => Float32Array.from(arrays[0], (_, i) => f(...arrays.map((array) => array[i])));

export function alphaBars({ beta_start, beta_end }, bugs = new Set(), count = 1000) {
  // βₜ is linear in its root (Rombach et al. 2022's code); ᾱₜ = α₁ α₂ … αₜ (§2, Ho et al. 2020)
  const power = bugs.has("linear-betas") ? 1 : 2, [from, to] = [beta_start, beta_end].map((beta) => beta ** (1 / power));
  let product = 1;
  return Array.from({ length: count }, (_, i) => product *= 1 - (from + (to - from) * i / (count - 1)) ** power);
}

const sigmaOf = (alphaBar) => Math.sqrt((1 - alphaBar) / alphaBar);

export function plan(name, steps, bars, bugs = new Set()) {  // -> timesteps, and a σ for each and one for the end
  if (name === "dpmpp_2m_karras") {
    // Eq. 5, Karras et al. 2022: σᵢ = (σ_max^(1/ρ) + i/(n−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ
    const logs = bars.map((bar) => Math.log(sigmaOf(bar))), low = sigmaOf(bars[0]) ** (1 / 7);
    const high = sigmaOf(bars.at(-1)) ** (1 / 7);
    const sigmas = Array.from({ length: steps }, (_, i) => (high + (steps > 1 ? i / (steps - 1) : 0) * (low - high)) ** 7);
    return { timesteps: sigmas.map((sigma) => nearest(Math.log(sigma), logs)), sigmas: [...sigmas, 0] };
  }
  // Every (1000 / n)-th timestep; Stable Diffusion's begin with 1, and leaving that out is a famous bug.
  const offset = bugs.has("no-offset") ? 0 : 1;
  const timesteps = Array.from({ length: steps }, (_, i) => (steps - 1 - i) * Math.floor(1000 / steps) + offset);
  return { timesteps, sigmas: [...timesteps.map((t) => sigmaOf(bars[t])), 0] };
}

function nearest(log, logs) {  // the whole timestep whose log σ is next to this one, on straight lines between them
  let i = logs.findIndex((other) => other >= log);
  if (i < 0) return logs.length - 1;
  if (i === 0) return 0;
  const place = i - 1 + (log - logs[i - 1]) / (logs[i] - logs[i - 1]), down = Math.floor(place);
  return place - down === 0.5 ? down + down % 2 : Math.round(place);  // a half goes to the even number
}

// What x is: x₀ + σ ε for Euler's samplers, √ᾱ x₀ + √(1 − ᾱ) ε for the others.
export function sampler(name, steps, bars, noise, bugs = new Set()) {
  const { timesteps, sigmas } = plan(name, steps, bars, bugs), wide = name.startsWith("euler");
  const alpha = (sigma) => 1 / Math.sqrt(sigma ** 2 + 1), std = (sigma) => sigma * alpha(sigma);
  let last = null;
  return {
    timesteps,
    // At the start x is noise of the first σ. Without the factor, Euler's samplers begin with a tenth of it.
    first: wide && !bugs.has("unscaled-start") ? 1 / alpha(sigmas[0]) : 1,
    seen: (x, i) => wide ? each((v) => v * alpha(sigmas[i]), x) : x,  // as the network wants to see it
    step(x, i, { x0, eps }) {
      const [now, next] = [sigmas[i], sigmas[i + 1]];
      if (name === "euler") return each((v, e) => v + (next - now) * e, x, eps);  // xᵢ₊₁ = xᵢ + (σᵢ₊₁ − σᵢ) ε
      if (name === "euler_a") {
        // Eq. 16, Song et al. 2021: σ_up² = σ'² (σ² − σ'²) / σ², and σ_down² = σ'² − σ_up²
        const up = next * Math.sqrt(now ** 2 - next ** 2) / now, down = Math.sqrt(next ** 2 - up ** 2);
        const moved = each((v, e) => v + (down - now) * e, x, eps);
        return up > 0 ? each((v, z) => v + up * z, moved, noise()) : moved;
      }
      if (name === "ddim") {
        // Eq. 12, Song et al. 2021: xₜ₋₁ = √ᾱₜ₋₁ x₀ + √(1 − ᾱₜ₋₁) ε; after the last step, ᾱ is the first of the schedule,
        // or 1 if that was the last step's own
        let bar = i + 1 < steps ? bars[timesteps[i + 1]] : timesteps[i] === 0 ? 1 : bars[0];
        if (bugs.has("ddim-without-stride")) bar = bars[Math.max(0, timesteps[i] - 1)];
        return each((a, e) => Math.sqrt(bar) * a + Math.sqrt(1 - bar) * e, x0, eps);
      }
      // Algorithm 2, Lu et al. 2022, in λ = −ln σ: x' = σ'/σ x − α' (e⁻ʰ − 1) D, with h = λ' − λ
      const h = Math.log(now / next), far = i === 0 || i === steps - 1;
      const r = far ? 1 : Math.log(sigmas[i - 1] / now) / h;
      const d = far ? x0 : each((a, b) => (1 + 1 / (2 * r)) * a - 1 / (2 * r) * b, x0, last);
      last = x0;
      return each((v, a) => std(next) / std(now) * v - alpha(next) * Math.expm1(-h) * a, x, d);
    },
  };
}

export function split(x, output, bar, prediction) {  // x = √ᾱ x₀ + √(1 − ᾱ) ε and the network's output -> x₀ and ε
  const a = Math.sqrt(bar), s = Math.sqrt(1 - bar);
  if (prediction === "v_prediction") {  // Salimans & Ho 2022, §4: v = √ᾱ ε − √(1 − ᾱ) x₀
    return { x0: each((v, o) => a * v - s * o, x, output), eps: each((v, o) => a * o + s * v, x, output) };
  }
  return { x0: each((v, o) => (v - s * o) / a, x, output), eps: output };
}

// The loop. networks: three functions of arrays. yields {index, t, x0, maps} for each step, and returns pixels.
export async function* denoise(networks, mini, { prompt, seed, steps, scale, name, bugs = new Set() }) {
  const count = 4 * mini.side ** 2, generator = new Twister(seed), tokenizer = new Tokenizer(mini);
  const words = await networks.clip([...tokenizer.encode(prompt).ids, ...tokenizer.encode("").ids]);
  const bars = alphaBars(mini, bugs), noise = () => (bugs.has("noise-reused") ? new Twister(0) : generator).normal(count);
  const way = sampler(name, steps, bars, noise, bugs);
  const prediction = bugs.has("wrong-prediction-type") ? "epsilon" : mini.prediction;
  let x = each((z) => z * way.first, generator.normal(count));
  const sum = new Float32Array(mini.length * mini.side ** 2);
  for (const [index, t] of way.timesteps.entries()) {
    const seen = way.seen(x, index), { output, maps } = await networks.diffusion([...seen, ...seen], words, t);
    let [cond, uncond] = [output.slice(0, count), output.slice(count)];
    if (bugs.has("guidance-swapped")) [cond, uncond] = [uncond, cond];
    // Eq. 6, Ho & Salimans 2022: ε = ε_uncond + s (ε_cond − ε_uncond)
    const guided = each((c, u) => u + scale * (c - u), cond, uncond);
    const bar = name === "dpmpp_2m_karras" ? 1 / (1 + plan(name, steps, bars).sigmas[index] ** 2) : bars[t];
    const guess = split(seen, guided, bar, prediction);
    maps.forEach((value, i) => { sum[i] += value / way.timesteps.length; });
    x = way.step(x, index, guess);
    yield { index, t, x0: guess.x0 };
  }
  if (bugs.has("wrong-scale")) x = each((v) => v * mini.scale_factor / 0.18215, x);
  return { pixels: await networks.decoder(x), maps: each((value) => Math.max(0, value), sum) };
}

// The mini's file: safetensors, of which each network takes its tensors, as float32, one behind the other.

export function readWeights(file, names) {
  const size = Number(new DataView(file).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, size)));
  const read = (name) => numbers(file, 8 + size, header[name]);
  const parts = names.map((name) => (header[name].dtype === "I8" ? widened(read(name), read(`${name}.scale`)) : read(name)));
  const whole = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => { whole.set(part, at); return at + part.length; }, 0);
  return new Uint8Array(whole.buffer);
}

function numbers(file, base, { dtype, data_offsets: [from, to] }) {
  const bytes = file.slice(base + from, base + to);
  if (dtype === "F32") return new Float32Array(bytes);
  if (dtype === "I8") return new Int8Array(bytes);
  if (dtype !== "BF16") throw new Error(`a tensor of ${dtype} is not read here`);
  const halves = new Uint16Array(bytes), wide = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) wide[i] = halves[i] << 16;  // bfloat16 is the upper half of a float32
  return new Float32Array(wide.buffer);
}

function widened(whole, scales) {  // W_ij = s_i n_ij: each row's whole numbers of 8 bits times its scale
  const row = whole.length / scales.length;
  return Float32Array.from(whole, (number, i) => scales[Math.floor(i / row)] * number);
}

// The three networks in onnxruntime-web. get: a function of a name in live/, or of the mini's, that returns its bytes.

export async function load(ort, get, mini) {
  const file = await get("mini.safetensors"), sessions = {};
  for (const name of ["clip", "diffusion", "decoder"]) {
    sessions[name] = await ort.InferenceSession.create(new Uint8Array(await get(`${name}.onnx`)), {
      executionProviders: ["wasm"],
      externalData: [{ path: "weights", data: readWeights(file, mini.weights[name]) }],
    });
  }
  const float = (data, ...shape) => new ort.Tensor("float32", Float32Array.from(data), shape), side = mini.side;
  const width = (words) => words.length / 2 / mini.length;
  return {
    clip: async (ids) => (await sessions.clip.run({
      tokens: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [2, mini.length]) })).words.data,
    diffusion: async (latents, words, t) => {
      const found = await sessions.diffusion.run({ latents: float(latents, 2, 4, side, side),
        context: float(words, 2, mini.length, width(words)), t: float([t], 1) });
      return { output: found.output.data, maps: found.maps.data };
    },
    decoder: async (latents) => (await sessions.decoder.run({ latents: float(latents, 1, 4, side, side) })).pixels.data,
  };
}

export function levels(pixels, bugs = new Set()) {  // (3, H, W) in about [−1, 1] -> red, green, blue, opaque, … as a canvas has them
  const whole = bugs.has("truncated-pixels") ? Math.trunc : Math.round;
  const area = pixels.length / 3, shown = new Uint8ClampedArray(4 * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) shown[4 * i + c] = whole((pixels[c * area + i] + 1) * 127.5);
    shown[4 * i + 3] = 255;
  }
  return shown;
}
