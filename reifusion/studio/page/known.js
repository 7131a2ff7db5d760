// What the model knows, as chips and by search, and what a reader of the prompt should know before drawing.
import {$, ask, make} from "./api.js";

let known = null, waiting = 0;

const chip = (text, title) => make("button", {type: "button", "data-text": text, title}, text);

export function fit(what) {
  known = what;
  $("#known").hidden = $("#strength-hint").hidden = !known;
  if (!known) return;
  $("#examples").replaceChildren(...known.examples.map(text => chip(text, "Take this prompt")));
  search();
}

// The subjects whose name, or other name, has the text in it; without a text, some of each kind of word.
function search() {
  const text = $("#search").value.trim().toLowerCase(), more = [...known.colours, ...known.sizes, ...known.styles, ...known.positions, ...known.places];
  const subjects = Object.entries(known.subjects);
  const hits = text ? subjects.filter(([name, others]) => [name, ...others].some(one => one.includes(text))).map(([name]) => name)
    .sort((a, b) => b.startsWith(text) - a.startsWith(text)).concat(more.filter(word => word.includes(text))) : more;
  $("#search").placeholder = `${subjects.length} things`;
  $("#found").replaceChildren(...(hits.length ? hits.slice(0, 40).map(one => chip(one, "Add it to the prompt")) : [make("small", {}, "nothing of this name")]));
}

function add(text) {
  const prompt = $("#prompt"), known_subject = text in known.subjects;
  const article = known_subject && !prompt.value.trim() ? (/^[aeiou]/.test(text) ? "an " : "a ") : "";
  prompt.value = `${prompt.value.trim()} ${article}${text}`.trim();
  prompt.dispatchEvent(new Event("input"));
  prompt.focus();
}

export function notes() {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const prompt = $("#prompt").value;
    const said = await ask("/api/notes", {prompt, model: $("#prompt").dataset.model ?? "mini"}).catch(() => []);
    if ($("#prompt").value === prompt) $("#notes").textContent = said.join(" ");
  }, 300);
}

$("#search").addEventListener("input", search);
$("#search").addEventListener("keydown", event => { if (event.key === "Enter") { event.preventDefault(); $("#found button")?.click(); } });
$("#found").addEventListener("click", event => event.target.dataset.text && add(event.target.dataset.text));
$("#examples").addEventListener("click", event => {
  if (!event.target.dataset.text) return;
  $("#prompt").value = event.target.dataset.text;
  notes();
  $("#ask").requestSubmit();
});
$("#prompt").addEventListener("input", notes);
