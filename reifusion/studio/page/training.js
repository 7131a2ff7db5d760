// A training as it goes on: asks every two seconds for what is new, and shows the curve and the newest sheet.

import {$, ask, make, say} from "./api.js";

const EVERY = 2000, WIDE = 720, HIGH = 240, LEFT = 44, BELOW = 22;
let run = null, newest = true, state = {runs: [], going: false}, asked = 0;

$("#begin").addEventListener("submit", event => { event.preventDefault(); tell("/api/training/start", {minutes: Number($("#minutes").value)}); });
$("#stop").addEventListener("click", () => { say("It stores where it is, and stops."); tell("/api/training/stop", {}); });
$("#model a").addEventListener("click", () => sessionStorage.setItem("model", run.model));
$("#name").addEventListener("change", () => { newest = true; look(); });
$("#place").addEventListener("input", () => { newest = $("#place").value === $("#place").max; sheet(); });
again();

async function tell(path, body) {
  for (const button of [$("#start"), $("#stop")]) button.disabled = true;
  try { await ask(path, body); await look(); } catch (error) { say(error.message, true); }
  for (const button of [$("#start"), $("#stop")]) button.disabled = false;
}

async function again() {
  try { await look(); } catch (error) { say(error.message, true); }
  setTimeout(again, EVERY);
}

async function look() {
  const mine = ++asked, before = state;
  const now = await ask("/api/training");
  if (mine !== asked) return;
  state = now;
  $("#start").hidden = state.going;
  $("#stop").hidden = !state.going;
  $("#minutes").disabled = state.going;
  if (state.going || state.said) say(state.said, state.failed);
  $("#none").hidden = state.runs.length > 0 || state.going;
  $("#run").hidden = state.runs.length === 0;
  if (!state.runs.length) return;
  const chosen = $("#name").value, began = state.runs.find(name => !before.runs.includes(name));
  const names = [...state.runs].sort();
  if ([...$("#name").options].map(one => one.value).join() !== names.join()) {
    $("#name").replaceChildren(...names.map(name => make("option", {value: name}, name)));
  }
  // What has just begun is shown, and at first what was written to last.
  $("#name").value = state.going && began ? began : names.includes(chosen) ? chosen : state.runs[0];
  const found = await ask(`/api/training/run?${new URLSearchParams({name: $("#name").value})}`);
  if (mine !== asked) return;
  run = found;
  show();
}

function show() {
  const live = run.quiet < 90, last = run.smooth.at(-1);
  $("#about").textContent = `${run.steps.toLocaleString("en")} steps, ${run.minutes} minutes${last ? `; loss ${last[1]}` : ""}`
    + `${live ? "" : "; nothing new for a while"}. ${run.verdict && `${run.verdict[0].toUpperCase()}${run.verdict.slice(1)}.`}`;
  curve();
  $("#place").max = Math.max(0, run.sheets.length - 1);
  if (newest) $("#place").value = $("#place").max;
  sheet();
  $("#model").hidden = !run.model;
  if (run.model) {
    $("#model code").textContent = run.model;
  }
}

function sheet() {
  const step = run.sheets[$("#place").value], image = $("#sheet img");
  $("#sheet").hidden = step === undefined;
  $("#caption").textContent = step === undefined ? "the first comes after a minute"
    : `after ${step.toLocaleString("en")} steps, ${+$("#place").value + 1} of ${run.sheets.length}`;
  if (step === undefined) return;
  const source = `/api/training/sheet?${new URLSearchParams({name: run.name, step})}`;
  if (image.getAttribute("src") !== source) image.setAttribute("src", source);
  image.alt = `What ${run.name} draws after ${step} steps, each picture with its prompt`;
}

// The loss by step, on axes that begin at 0: what was measured, its running mean, and dots for pictures held out.
function curve() {
  const all = [...run.loss, ...run.held_out], svg = $("#losses svg");
  $("#losses").hidden = all.length === 0;
  if (!all.length) return;
  const most = Math.max(...run.smooth.map(([, loss]) => loss), ...run.held_out.map(([, loss]) => loss)) * 1.05;
  const last = Math.max(1, ...all.map(([step]) => step));
  const x = step => (LEFT + (WIDE - LEFT - 8) * step / last).toFixed(1);
  const y = loss => (4 + (HIGH - BELOW - 4) * (1 - Math.min(loss, most) / most)).toFixed(1);
  const line = (name, points) => `<polyline class="${name}" points="${points.map(([step, loss]) => `${x(step)},${y(loss)}`).join(" ")}"/>`;
  const marks = [0, .25, .5, .75, 1].map(share => share * most / 1.05), steps = [0, .25, .5, .75, 1].map(share => Math.round(share * last));
  svg.innerHTML = marks.map(loss => `<path class="rule" d="M${LEFT},${y(loss)}H${WIDE - 8}"/><text x="${LEFT - 6}" y="${+y(loss) + 4}" text-anchor="end">${loss.toFixed(2)}</text>`).join("")
    + steps.map((step, k) => `<text x="${x(step)}" y="${HIGH - 4}" text-anchor="${k === 4 ? "end" : "middle"}">${step.toLocaleString("en")}</text>`).join("")
    + line("signal faint", run.loss) + line("signal", run.smooth) + line("noise", run.held_out)
    + run.held_out.map(([step, loss]) => `<circle class="noise" cx="${x(step)}" cy="${y(loss)}" r="3"/>`).join("");
  $("#losses figcaption .noise").hidden = !run.held_out.length;
  svg.setAttribute("aria-label", `The loss over ${last} steps, now ${run.smooth.at(-1)?.[1] ?? run.held_out.at(-1)[1]}`);
}
