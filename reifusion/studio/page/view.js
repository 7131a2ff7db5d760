// The pictures: side by side, with a slider through the steps, and words and pixels that light each other up.
import {$, $$, ask, make, say} from "./api.js";
import * as map from "./map.js";

const view = {a: null, b: null, place: 0, asked: 0};  // a drawing: {id, places, size, curve, about}
const pane = name => $(`.pane[data-pane="${name}"]`);
const seen = new Map();  // drawing/place -> its facts
const url = (one, place, what) => `/api/drawings/${one.id}/${place}/${what}.png`;

export const drawing = () => view.a;
export const both = () => ({a: view.a, b: view.b});

async function facts(one, place) {
  const key = `${one.id}/${place}/${one.places ? "done" : ""}`;
  if (!seen.has(key)) {
    const found = await ask(`/api/drawings/${one.id}/${place}`);
    const heats = found.heats;
    for (const word of heats.words) word.map = Uint8Array.from(atob(word.map), letter => letter.charCodeAt(0));
    if (seen.size > 400) seen.clear();
    seen.set(key, found);
  }
  return seen.get(key);
}

// Puts a picture into a pane when it is there, so that nothing flickers; returns it.
function put(name, source, alt, sharp = false) {
  const image = pane(name).querySelector("img");
  return new Promise(done => {
    if (image.dataset.source === source && image.complete) return done(image);
    const next = new Image();
    next.onload = () => {
      if (image.dataset.source !== source) return done(image);
      image.src = source;
      image.alt = alt;
      image.hidden = false;
      image.classList.toggle("sharp", sharp);
      done(next);
    };
    next.onerror = () => done(image);
    image.dataset.source = source;
    next.src = source;
  });
}

// Begins a drawing: the frames take its shape before there is a picture, so that nothing jumps.
export function begin(two) {
  pane("given").hidden = two;
  pane("other").hidden = pane("difference").hidden = !two;
  Object.assign(view, {a: null, b: null});
  $("#place").disabled = true;
  $("#words").replaceChildren();
  delete $("#words").dataset.texts;
  lit.seen = lit.other = null;
  $("#here").textContent = "";
  clear();
}

export function shape([width, height]) {
  document.documentElement.style.setProperty("--ratio", `${width} / ${height}`);
}

// A step while it is drawn.
export async function step(one, news, second) {
  if (second) return put("other", url(one, news.newest, "seen"), "B, while it is drawn");
  if (view.a) return;  // another one is looked at meanwhile
  $("#place").max = news.total + 1;
  $("#place").value = news.newest;
  $("#caption").textContent = `step ${news.newest} of ${news.total}`;
  if (pane("other").hidden) put("given", url(one, news.newest, "given"), "x_t, while it is drawn");
  put("seen", url(one, news.newest, "seen"), "x̂₀, while it is drawn");
  const now = await facts(one, news.newest).catch(() => null);
  if (!now || view.a) return;
  map.show(one.id, now);
  map.curve(news.curve, now);
}

// A finished drawing, or two of them; two: there is room for the other one, which is still to come.
export async function end(a, b, two = Boolean(b)) {
  if (!a) return;
  Object.assign(view, {a, b});
  pane("given").hidden = two;
  pane("other").hidden = pane("difference").hidden = !two;
  const slider = $("#place");
  slider.max = Math.max(1, a.places - 1);
  slider.value = a.places - 1;
  slider.disabled = false;
  shape(a.size);
  map.running(null, a.total);
  await look(a.places - 1);
}

// A picture whose drawing is no longer in memory: its file, without its steps.
export function still(one) {
  begin(false);
  pane("given").hidden = true;
  shape(one.size);
  $("#caption").textContent = "the picture; its steps are no longer in memory";
  return put("seen", `/pictures/${encodeURIComponent(one.name)}`, one.about);
}

// Shows a place of the slider.
export async function look(place) {
  const {a, b} = view, turn = ++view.asked;
  if (!a) return;
  view.place = place;
  const there = b && Math.round(place / Math.max(1, a.places - 1) * (b.places - 1));
  const [now, other] = await Promise.all([facts(a, place), b && facts(b, there)]);
  if (turn !== view.asked) return;
  $("#caption").textContent = now.caption;
  $("#place").setAttribute("aria-valuetext", now.caption);
  const ends = now.step === null;
  pane("given").querySelector("figcaption").textContent = now.under[0];
  pane("seen").querySelector("figcaption").textContent = b ? `A: ${a.said}` : now.under[1];
  map.show(a.id, now);
  map.curve(a.curve, now);
  words(now, other);
  const shown = [put("seen", url(a, place, "seen"), `${now.caption}: ${a.prompt}`)];
  if (b) {
    pane("other").querySelector("figcaption").textContent = `B: ${b.said}${other.step === now.step ? "" : `, step ${other.step + 1} of ${b.total}`}`;
    shown.push(put("other", url(b, there, "seen"), `${other.caption}: ${b.prompt}`));
    difference(await Promise.all(shown), turn);
  } else await Promise.all([...shown, put("given", url(a, place, "given"), now.under[0], ends)]);
}

// |A - B|, its largest level made white
function difference(images, turn) {
  if (turn !== view.asked) return;
  const canvas = pane("difference").querySelector("canvas"), [width, height] = [images[0].naturalWidth, images[0].naturalHeight];
  const [a, b] = images.map(image => {
    const context = Object.assign(document.createElement("canvas"), {width, height}).getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  });
  const apart = a.map((level, i) => i % 4 === 3 ? 255 : Math.abs(level - b[i])), levels = apart.filter((_, i) => i % 4 < 3);
  let sum = 0, most = 1;
  for (const level of levels) { sum += level; most = Math.max(most, level); }
  [canvas.width, canvas.height] = [width, height];
  const picture = new ImageData(new Uint8ClampedArray(apart.map((level, i) => i % 4 === 3 ? 255 : level * 255 / most)), width, height);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  const mean = (sum / levels.length).toFixed(1);
  canvas.dataset.mean = mean;
  pane("difference").querySelector("figcaption").textContent = `difference × ${(255 / most).toFixed(1)}; on average ${mean} of 255 levels`;
}

// ---- words and pixels ----

const lit = {seen: null, other: null};  // the heats of the panes on view

function words(now, other) {
  lit.seen = now.heats;
  lit.other = other ? other.heats : null;
  clear();
  const known = now.heats.words, row = $("#words");
  const texts = known.map(word => word.text).join(" ");
  if (row.dataset.texts === texts && row.children.length === known.length) {
    known.forEach((word, k) => { const share = row.children[k].querySelector("small"); if (share) share.textContent = percent(word.share); });
  } else {
    row.replaceChildren(...known.map((word, k) => word.little ? make("span", {}, word.text)
      : make("button", {type: "button", class: "word", "data-word": k}, word.text, " ", make("small", {}, percent(word.share)))));
    row.dataset.texts = texts;
  }
  $("#here").textContent = known.length ? "Point at a word to see its pixels, or at the picture to see its words."
    : now.step === null && now.place === 0 ? "Noise: nobody has looked at a word yet." : "Words are not recorded for a drawing of this kind.";
}

const percent = share => `${(100 * share).toFixed(1)}%`;
const chips = () => $$("#words .word");

// A word -> its pixels: all others are darkened, those that look at it least the most.
function showWord(k) {
  clear();
  const text = lit.seen.words[k].text;
  for (const name of ["seen", "other"]) {
    const heats = lit[name], word = heats?.words.find((one, i) => name === "seen" ? i === k : one.text === text);
    if (!word) continue;
    const canvas = pane(name).querySelector("canvas"), low = word.map.reduce((a, b) => Math.min(a, b), 255);
    [canvas.width, canvas.height] = [heats.width, heats.height];
    const shade = new ImageData(heats.width, heats.height);
    word.map.forEach((heat, i) => { shade.data[4 * i + 3] = 0.85 * 255 * (255 - heat) / (255 - low || 1); });
    canvas.getContext("2d").putImageData(shade, 0, 0);
  }
  $(`#words [data-word="${k}"]`).classList.add("lit");
}

// A place of the picture, x and y from 0 to 1 -> its words, by their share of its attention.
function showPlace(x, y) {
  clear();
  const {width, height, words} = lit.seen ?? {words: []};
  if (!words.length) return;
  const at = Math.min(height - 1, Math.floor(y * height)) * width + Math.min(width - 1, Math.floor(x * width));
  const here = words.map((word, k) => ({k, text: word.text, little: word.little, share: word.map[at] / 255 * word.peak}))
    .filter(word => !word.little).sort((a, b) => b.share - a.share);
  const most = Math.max(...words.map(word => word.little ? 0 : word.peak), 1e-9);
  for (const {k, share} of here) $(`#words [data-word="${k}"]`).style.setProperty("--lit", (share / most).toFixed(3));
  $("#here").textContent = "Here: " + here.slice(0, 4).map(word => `${word.text} ${percent(word.share)}`).join(", ");
  const frame = pane("seen").querySelector(".frame");
  frame.dataset.place = `${x.toFixed(2)},${y.toFixed(2)}`;
  frame.style.setProperty("--x", x);
  frame.style.setProperty("--y", y);
}

function clear() {
  for (const canvas of $$('.pane:not([data-pane="difference"]) canvas')) canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  for (const chip of chips()) {
    chip.classList.remove("lit");
    chip.style.setProperty("--lit", 0);
  }
  delete pane("seen").querySelector(".frame").dataset.place;
}

for (const kind of ["pointerover", "focusin"])
  $("#words").addEventListener(kind, event => {
    const chip = event.target.closest(".word");
    if (chip) showWord(Number(chip.dataset.word));
  });
for (const kind of ["pointerout", "focusout"]) $("#words").addEventListener(kind, clear);
{
  const frame = pane("seen").querySelector(".frame");
  const inside = value => Math.min(1, Math.max(0, value));
  for (const kind of ["pointermove", "pointerdown"])
    frame.addEventListener(kind, event => {
      const box = frame.getBoundingClientRect();
      showPlace(inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height));
    });
  frame.addEventListener("pointerleave", clear);
  frame.addEventListener("blur", clear);
  frame.addEventListener("keydown", event => {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!move) return;
    event.preventDefault();
    const [x, y] = (frame.dataset.place ?? "0.5,0.5").split(",").map(Number);
    showPlace(inside(x + move[0] / 16), inside(y + move[1] / 16));
  });
}
$("#place").addEventListener("input", event => look(Number(event.target.value)).catch(error => say(error.message, true)));
