// The page that draws: reads the form, runs the loop of live.mjs, shows what comes of it.
import { Tokenizer, denoise, levels, load } from "./live.mjs";

const place = document.getElementById("live"), status = place.querySelector(".status"), form = place.querySelector("form");
const picture = place.querySelector(".picture"), latents = place.querySelector(".latents"), list = place.querySelector(".words");
const root = new URL("../", import.meta.url);
const painted = () => new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); });
let networks = null, mini = null, shown = null;

async function get(name) {
  const answer = await fetch(new URL(name === "mini.safetensors" ? name : `live/${name}`, root));
  if (!answer.ok) throw new Error(`${name} is not here`);
  return answer.arrayBuffer();
}

async function ready() {
  if (networks) return;
  status.textContent = "Loading the mini …";
  await painted();
  const ort = await import(new URL("live/ort.wasm.min.mjs", root));
  ort.env.wasm.numThreads = 1;
  networks = await load(ort, get, mini);
}

function put(canvas, data, side) {
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(data, side), 0, 0);
}

async function draw() {
  const given = new FormData(form), begun = performance.now();
  const request = { prompt: given.get("prompt"), seed: Number(given.get("seed")), steps: Number(given.get("steps")),
    scale: Number(given.get("scale")), name: given.get("name"), bugs: new Set(given.getAll("bug")) };
  await ready();
  place.querySelector(".drawn").hidden = false;
  list.replaceChildren();
  const loop = denoise(networks, mini, request);
  for (;;) {
    const { value, done } = await loop.next();
    if (done) {
      shown = { ...value, data: levels(value.pixels) };
      put(picture, shown.data, mini.size);
      break;
    }
    const three = value.x0.slice(0, 3 * mini.side ** 2).map((number) => number / 3);
    put(latents, levels(three), mini.side);
    status.textContent = `Step ${value.index + 1} of ${request.steps}, t = ${value.t}`;
    await painted();
  }
  const { places } = new Tokenizer(mini).encode(request.prompt);
  for (const { word, at } of places) {
    const button = Object.assign(document.createElement("button"), { textContent: word, type: "button" });
    for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => shade(at));
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => shade(null));
    list.append(button);
  }
  status.textContent = `Done in ${((performance.now() - begun) / 1000).toFixed(1)} s.`;
}

// Darkens the picture where the word's tokens were looked at least.
function shade(at) {
  if (!at) return put(picture, shown.data, mini.size);
  const area = mini.side ** 2, map = Float32Array.from({ length: area }, (_, i) => at.reduce((sum, k) => sum + shown.maps[k * area + i], 0));
  const low = Math.min(...map), high = Math.max(...map), data = shown.data.slice(), factor = mini.size / mini.side;
  for (let y = 0; y < mini.size; y++) {
    for (let x = 0; x < mini.size; x++) {
      const value = map[Math.floor(y / factor) * mini.side + Math.floor(x / factor)];
      const light = 0.15 + 0.85 * (value - low) / (high - low || 1), i = 4 * (y * mini.size + x);
      for (let c = 0; c < 3; c++) data[i + c] *= light;
    }
  }
  return put(picture, data, mini.size);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector(":scope > button");
  button.disabled = true;
  try { await draw(); } catch (error) { status.textContent = `It did not work: ${error.message}.`; }
  button.disabled = false;
});

try {
  mini = JSON.parse(new TextDecoder().decode(await get("mini.json")));
  form.elements.name.value = mini.sampler;
  form.elements.scale.value = mini.cfg;
  // play.html?prompt=a+cat&bug=no-offset: what a chapter's link asks for.
  for (const [name, value] of new URLSearchParams(location.search)) {
    for (const field of form.querySelectorAll(`[name="${CSS.escape(name)}"]`)) {
      if (field.type !== "checkbox") field.value = value;
      else if (field.value === value) field.checked = true;
    }
  }
  form.hidden = false;
  status.textContent = "";
} catch {
  status.textContent = "This copy of the book was built without the networks for the browser; make docs with a network connection adds them.";
}
