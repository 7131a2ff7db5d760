// The toy world: asks for a journey of points whenever something is chosen, and shows it place by place.

import {$, ask, make} from "./api.js";

const SAMPLERS = {ddim: "DDIM", ddpm: "DDPM", euler: "Euler", euler_a: "Euler a", heun: "Heun", dpmpp_2m_karras: "DPM++ 2M Karras", flow: "rectified flow"};
const FIELDS = ["world", "sampler", "steps", "guidance", "seed"];
let journey = null, playing = 0, asked = 0;

for (const [name, title] of Object.entries(SAMPLERS)) $("#sampler").append(make("option", {value: name}, title));
for (const name of FIELDS) $(`#${name}`).addEventListener("change", load);
$("#place").addEventListener("input", () => { stop(); show(); });
$("#arrows").addEventListener("change", show);
$("#play").addEventListener("click", () => playing ? stop() : play());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
load();

async function load() {
  const mine = ++asked, query = new URLSearchParams(FIELDS.map(name => [name, $(`#${name}`).value]));
  try {
    const found = await ask(`/api/toy?${query}`);
    if (mine !== asked) return;  // something else was chosen since
    journey = found;
    $("#status").textContent = "";
    $("#place").max = journey.frames.length - 1;
    play();
  } catch (error) {
    if (mine === asked) { stop(); $("#status").textContent = error.message; }
  }
}

function play() {
  stop();
  $("#place").value = 0;
  $("#play").textContent = "Stop";
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches, last = +$("#place").max;
  playing = setInterval(() => {
    $("#place").value = still ? last : +$("#place").value + 1;
    show();
    if (+$("#place").value >= last) stop();
  }, Math.max(25, 2500 / last));
  show();
}

function stop() {
  clearInterval(playing);
  playing = 0;
  $("#play").textContent = "Play";
}

function show() {
  if (!journey) return;
  const canvas = $("#plane"), pen = canvas.getContext("2d"), place = +$("#place").value, style = getComputedStyle(document.body);
  const colour = name => { pen.fillStyle = pen.strokeStyle = style.getPropertyValue(name); };
  const at = ([x, y]) => [canvas.width * (x / journey.reach + 1) / 2, canvas.height * (1 - y / journey.reach) / 2];
  const dot = (point, size) => { const [x, y] = at(point); pen.fillRect(x - size / 2, y - size / 2, size, size); };
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.globalAlpha = .8;
  journey.data.forEach((point, i) => { pen.fillStyle = journey.labels[i] ? "#8886" : "#5b7cfa88"; dot(point, 4); });
  if ($("#arrows").checked && place < journey.arrows.length) {
    colour("color");
    pen.globalAlpha = .35;
    journey.grid.forEach((from, i) => {
      const [dx, dy] = journey.arrows[place][i], length = Math.hypot(dx, dy) || 1, scale = Math.min(.3, .25 * length) / length;
      const tip = [from[0] + scale * dx, from[1] + scale * dy], [x, y] = at(from), [u, v] = at(tip), turn = Math.atan2(v - y, u - x);
      pen.beginPath();
      pen.moveTo(x, y); pen.lineTo(u, v);
      for (const side of [-.5, .5]) { pen.moveTo(u, v); pen.lineTo(u - 6 * Math.cos(turn + side), v - 6 * Math.sin(turn + side)); }
      pen.stroke();
    });
  }
  pen.strokeStyle = pen.fillStyle = "#e8590c";
  pen.globalAlpha = .25;
  for (let i = 0; i < 24; i++) {  // the ways of some
    pen.beginPath();
    for (let k = 0; k <= place; k++) pen.lineTo(...at(journey.frames[k][i]));
    pen.stroke();
  }
  pen.globalAlpha = .9;
  journey.frames[place].forEach(point => dot(point, 4));
  $("#caption").textContent = place < journey.times.length ? `${journey.times.length > $("#steps").value ? "call" : "step"} ${place + 1} of ${journey.times.length}, t = ${journey.times[place]}` : "drawn";
}
