// The page: draws what the fields ask for, one picture or several, or two beside each other.
import {$, ask, follow, say} from "./api.js";
import * as brush from "./brush.js";
import * as fields from "./fields.js";
import * as known from "./known.js";
import * as map from "./map.js";
import * as shelf from "./shelf.js";
import * as view from "./view.js";

const work = {turn: 0, cancelled: 0, id: null, wanted: "", loads: 0};
const over = turn => turn !== work.turn || turn === work.cancelled;

// Draws one picture; returns it when it is complete, null when it was stopped or failed.
async function draw(settings, k, turn, two, second = false) {
  let one = null, shown = null, halted = false;
  work.id = null;
  const last = await follow("/api/draw", {settings, picture: brush.picture(), mask: brush.mask(), k}, news => {
    if (over(turn) && !halted) halt(news.id), halted = true;  // its name was not known when it was to stop
    if (turn !== work.turn) return;
    work.id = news.id;
    if (!one && !second) view.begin(two);
    one ??= {id: news.id};
    warned(news.warnings ?? []);
    if (!news.done) {
      say(news.note);
      if (news.size && !shown) view.shape(news.size);
      map.running(news.total ? news.places - 1 : 0, news.total);
      if (news.newest !== null && news.newest !== shown) view.step(one, news, second), shown = news.newest;
    }
  });
  if (turn !== work.turn) return null;
  say(last.note, last.failed);
  const prompt = settings.prompt;
  if (last.failed || !last.places) return null;
  return Object.assign(one, last, {prompt, said: "", complete: Boolean(last.name)});
}

// What the model warns of, unless it stands there already: what was cut off is told while one writes.
function warned(sentences) {
  const said = sentences.filter(one => !$("#notes").textContent.includes(one)).join(" ");
  if ($("#warned").textContent !== said) $("#warned").textContent = said;
}

async function start() {
  const turn = ++work.turn, settings = fields.read(), num = Math.max(1, Number($("#num").value) || 1);
  const two = $("#compare").checked, before = view.both();
  stop();  // a page draws one picture at a time: the newest
  work.wanted = JSON.stringify(settings);
  const settle = () => turn === work.turn && (map.running(null, 0), view.end(before.a, before.b));
  try {
    if (two) return await beside(settings, turn, settle);
    for (let k = 0; k < num && !over(turn); k++) {
      const one = await draw(settings, k, turn, false);
      if (!one) return settle();
      if (!settings.seed) settings.seed = String(one.seed - k);  // the others follow the first
      await finish(one, false);
      if (!one.complete) return;
    }
  } catch (error) {
    if (turn === work.turn) say(error.message, true), settle();
  }
}

async function beside(settings, turn, settle) {
  const name = $("#b-name").value, value = $("#b-value").value;
  const a = await draw(settings, 0, turn, true);
  if (!a) return settle();
  await finish(a, true);
  if (!a.complete || over(turn)) return;
  const b = await draw({...settings, seed: settings.seed ?? String(a.seed), [name]: value}, 0, turn, true, true);
  if (!b) return turn === work.turn && view.end(a, null);
  const own = a.settings[name] ?? "as usual", title = fields.title(name);
  Object.assign(a, {said: `${title} ${own}`});
  Object.assign(b, {said: `${title} ${value || "as usual"}`});
  if (b.complete) shelf.add(b);
  shelf.repeat(b.complete ? b : a);
  await view.end(a, b);
}

async function finish(one, two) {
  if (one.complete) shelf.add(one);
  shelf.repeat(one.complete ? one : null);
  await view.end(one, null, two);
}

function cancel() {
  work.cancelled = work.turn;
  stop();
  if (!$("#load").disabled) return;
  work.loads++;  // the studio goes on, and has it the next time
  $("#load").disabled = false;
  say("Stopped waiting for the model.");
}

const halt = id => id && fetch(`/api/drawings/${id}/stop`, {method: "POST"}).catch(() => null);
const stop = () => halt(work.id);

async function load() {
  const turn = ++work.loads, mine = () => turn === work.loads;
  $("#load").disabled = true;
  try {
    const last = await follow("/api/model", {model: $("#model").value.trim()}, news => mine() && say(news.note, news.failed));
    if (mine() && !last.failed) fit(last);
  } catch (error) {
    if (mine()) say(error.message, true);
  }
  if (mine()) $("#load").disabled = false;
}

function fit(page) {
  fields.fit(page);
  known.fit(page.known);
  $("#prompt").dataset.model = page.model;
  known.notes();
}

$("#ask").addEventListener("submit", event => { event.preventDefault(); start(); });
$("#cancel").addEventListener("click", cancel);
$("#load").addEventListener("click", load);
$("#model").addEventListener("keydown", event => event.key === "Enter" && load());
$("#compare").addEventListener("change", event => { $("#other").hidden = !event.target.checked; });
$("#settings").addEventListener("change", event => {
  if ($("#live").checked && event.target.matches("[data-name]") && work.wanted && JSON.stringify(fields.read()) !== work.wanted) start();
});
$("#map").addEventListener("click", event => {
  const box = event.target.closest("button");
  if (box?.dataset.station) map.choose(box.dataset.station);
  else if (box?.dataset.go === "prompt") $("#prompt").focus();
  else if (box?.dataset.go === "picture" && view.drawing()) {
    $("#place").value = view.drawing().places - 1;
    view.look(view.drawing().places - 1).catch(error => say(error.message, true));
  }
});
$("#scheme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
  localStorage.scheme = document.documentElement.style.colorScheme = dark ? "light" : "dark";
});
addEventListener("pagehide", stop);

// The page of trainings leaves a model to begin with; an address cannot, as any other page may link to one.
const model = sessionStorage.getItem("model");
sessionStorage.removeItem("model");
ask("/api/page").then(page => {
  $("#folder").textContent = page.folder;
  fit(page);
  if (model) { $("#model").value = model; load(); }
}, error => say(error.message, true));
