// The places of the book that draw: each reads its form, runs the loop of live.mjs, and shows what comes of it.
import { Tokenizer, denoise, levels, load } from "./live.mjs";

const root = new URL("../", import.meta.url);
const painted = () => new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); });
let networks = null;  // of all places, loaded when the first one draws
let turn = Promise.resolve();  // one picture at a time

async function get(name) {
  const answer = await fetch(new URL(name === "mini.safetensors" ? name : `live/${name}`, root));
  if (!answer.ok) throw new Error(`${name} is not here`);
  return answer.arrayBuffer();
}

async function ready(mini) {
  const ort = await import(new URL("live/ort.wasm.min.mjs", root));
  ort.env.wasm.numThreads = 1;
  return load(ort, get, mini);
}

function put(canvas, data, side) {
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(data, side), 0, 0);
}

// What of a request is another than in the one before, as a caption of the one before.
function differences(request, before) {
  const bugs = ({ bugs }) => [...bugs].join(", ") || "no bug";
  const changed = Object.keys(request).filter((key) => key !== "bugs" && request[key] !== before[key]);
  const named = { prompt: "“", name: "", scale: "guidance " };
  const said = changed.map((key) => `${named[key] ?? `${key} `}${before[key]}${key === "prompt" ? "”" : ""}`);
  return [...said, ...(bugs(request) === bugs(before) ? [] : [bugs(before)])].join("; ") || "the same settings";
}

class Place {
  constructor(place, mini) {
    this.mini = mini;
    this.find = (selector) => place.querySelector(selector);
    this.form = this.find("form");
    this.status = this.find(".status");
    this.shown = null;  // the request, what it gave, and its picture as a canvas has it
    const more = this.find(".more"), wish = new URLSearchParams(place.dataset.wish);
    this.form.elements.name.value = mini.sampler;
    this.form.elements.scale.value = mini.cfg;
    this.fill(wish);
    if (wish.has("show")) {
      const few = new Set(["prompt", ...wish.get("show").split(" ")]);
      const others = [...this.form.querySelectorAll("[data-field]")].filter((label) => !few.has(label.dataset.field));
      const fieldset = this.find("fieldset"), unfold = (all) => {
        for (const label of others) label.hidden = !all;
        fieldset.hidden = !fieldset.querySelector("label:not([hidden])");
        more.setAttribute("aria-expanded", all);
        more.textContent = all ? "Fewer settings" : "More settings";
      };
      more.addEventListener("click", () => unfold(more.getAttribute("aria-expanded") === "false"));
      unfold(false);
    } else {
      more.remove();
      this.fill(new URLSearchParams(location.search));  // play.html?prompt=a+cat&bug=no-offset: a chapter's link
    }
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    this.form.hidden = false;
    this.status.textContent = "";
  }

  fill(wish) {
    for (const [name, value] of wish) {
      for (const field of this.form.querySelectorAll(`[name="${CSS.escape(name)}"]`)) {
        if (field.type !== "checkbox") field.value = value;
        else if (field.value === value) field.checked = true;
      }
    }
  }

  async submit() {
    const button = this.find("button:not([type])"), before = turn;
    let done;
    turn = new Promise((resolve) => { done = resolve; });
    button.disabled = true;
    try {
      await before;
      await this.draw();
    } catch (error) { this.status.textContent = `It did not work: ${error.message}.`; }
    button.disabled = false;
    done();
  }

  async draw() {
    const given = new FormData(this.form), begun = performance.now(), { mini } = this;
    const request = { prompt: given.get("prompt"), seed: Number(given.get("seed")), steps: Number(given.get("steps")),
      scale: Number(given.get("scale")), name: given.get("name"), bugs: new Set(given.getAll("bug")) };
    if (!networks) {
      this.status.textContent = "Loading the mini …";
      await painted();
      networks = await ready(mini);
    }
    this.find(".drawn").hidden = false;
    this.find(".words").replaceChildren();
    if (this.shown) {
      put(this.find(".previous"), this.shown.data, mini.size);
      this.find(".before span").textContent = differences(request, this.shown.request);
      this.find(".before").hidden = false;
    }
    const loop = denoise(networks, mini, request);
    for (;;) {
      const { value, done } = await loop.next();
      if (done) {
        this.shown = { ...value, request, data: levels(value.pixels, request.bugs) };
        put(this.find(".picture"), this.shown.data, mini.size);
        break;
      }
      const three = value.x0.slice(0, 3 * mini.side ** 2).map((number) => number / 3);
      put(this.find(".latents"), levels(three), mini.side);
      this.status.textContent = `Step ${value.index + 1} of ${request.steps}, t = ${value.t}`;
      await painted();
    }
    const { places } = new Tokenizer(mini).encode(request.prompt);
    for (const { word, at } of places) {
      const button = Object.assign(document.createElement("button"), { textContent: word, type: "button" });
      for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => this.shade(at));
      for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => this.shade(null));
      this.find(".words").append(button);
    }
    this.status.textContent = `Done in ${((performance.now() - begun) / 1000).toFixed(1)} s. Point at a word to see where it was looked at.`;
  }

  // Darkens the picture where the word's tokens were looked at least.
  shade(at) {
    const { mini, shown } = this, canvas = this.find(".picture");
    if (!at) return put(canvas, shown.data, mini.size);
    const area = mini.side ** 2, map = Float32Array.from({ length: area }, (_, i) => at.reduce((sum, k) => sum + shown.maps[k * area + i], 0));
    const low = Math.min(...map), high = Math.max(...map), data = shown.data.slice(), factor = mini.size / mini.side;
    for (let y = 0; y < mini.size; y++) {
      for (let x = 0; x < mini.size; x++) {
        const value = map[Math.floor(y / factor) * mini.side + Math.floor(x / factor)];
        const light = 0.15 + 0.85 * (value - low) / (high - low || 1), i = 4 * (y * mini.size + x);
        for (let c = 0; c < 3; c++) data[i + c] *= light;
      }
    }
    return put(canvas, data, mini.size);
  }
}

const told = await get("mini.json").catch(() => null);
for (const place of document.querySelectorAll(".live")) {
  if (told) new Place(place, JSON.parse(new TextDecoder().decode(told)));
  else place.querySelector(".status").textContent =
    "This copy of the book was built without the networks for the browser; make docs with a network connection adds them.";
}
