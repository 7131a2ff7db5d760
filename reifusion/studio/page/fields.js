// The fields and the settings they stand for: texts by name, as on a command line; an empty one is left open.
import {$, $$, make} from "./api.js";

let about = {};  // what the studio says of each setting

const field = name => name === "prompt" || name === "model" ? $(`#${name}`) : $(`[data-name="${name}"]`);
const options = (select, choices, open) => select.replaceChildren(
  ...(open === undefined ? [] : [new Option(open, "")]), ...Object.entries(choices).map(([name, title]) => new Option(title, name)));

// Fits the fields to a model; its own settings stand in those that decide most.
export function fit(page) {
  about = page.all;
  options($("#sampler"), page.samplers);
  options($("#schedule"), page.schedules, "the sampler's own");
  for (const name of ["sampler", "steps", "cfg"]) field(name).value = page.usual[name];
  $("#size").placeholder = page.usual.size;
  if ($("#model").value === "") $("#model").value = page.model;
  if (!$("#more .grid").children.length) more();
}

function more() {
  for (const [name, one] of Object.entries(about)) {
    if (!one.more) continue;
    let input;
    if (one.choices.length) options(input = make("select"), Object.fromEntries(one.choices.map(x => [x, x])), one.shown || "–");
    else if (one.kind === "several") input = make("textarea", {rows: 1, placeholder: "one a line"});
    else if (one.kind === "yes") input = make("input", {type: "checkbox"});
    else input = make("input", {placeholder: one.shown, inputmode: {whole: "numeric", number: "decimal"}[one.kind] ?? "text"});
    input.dataset.name = name;
    input.title = one.help;
    $("#more .grid").append(make("label", {class: one.kind === "yes" ? "check wide" : one.kind === "text" || one.kind === "several" ? "wide" : "", title: one.help}, ...(one.kind === "yes" ? [input, one.title] : [one.title + " ", input])));
  }
  const names = Object.entries(about).filter(([name, one]) => one.kind !== "yes" && name !== "model");
  options($("#b-name"), Object.fromEntries(names.map(([name, one]) => [name, one.title])));
  $("#b-name").value = "seed";
}

const typed = input => input.type === "checkbox" ? (input.checked ? "true" : "")
  : input.tagName === "TEXTAREA" ? input.value.split("\n").map(line => line.trim()).filter(Boolean) : input.value.trim();

export function read() {
  const found = {prompt: $("#prompt").value, model: $("#model").value.trim()};
  for (const input of $$("[data-name]")) {
    const value = typed(input);
    if (value.length) found[input.dataset.name] = value;
  }
  return found;
}

// Takes over the settings of a picture; those that it does not name become empty again.
export function write(settings) {
  for (const input of [$("#prompt"), $("#model"), ...$$("[data-name]")]) {
    const value = settings[input.dataset.name ?? input.id];
    if (input.type === "checkbox") input.checked = value === true;
    else if (input.tagName === "TEXTAREA") input.value = (value ?? []).join("\n");
    else if (input.id === "strength") {  // a slider rounds to its steps
      const number = Number(value ?? 0.8), fits = Math.abs(20 * number - Math.round(20 * number)) < 1e-9;
      Object.assign(input, {min: Math.min(0.05, number), step: fits ? 0.05 : "any"});
      input.value = number;
    } else if (input.tagName === "SELECT") {  // of another model, perhaps, with other choices
      if (value && ![...input.options].some(one => one.value === value)) input.append(new Option(value, value));
      input.value = value ?? "";
    } else if (input.id !== "model" || value) input.value = String(value ?? "").replace(/\s*\n\s*/g, " ");
  }
  $("#strength").dispatchEvent(new Event("input"));
  if (settings.model) $("#prompt").dataset.model = settings.model;
  // A dtype is in every picture's settings.
  if ($$("#more [data-name]").some(input => input.dataset.name !== "dtype" && typed(input).length)) $("#more").open = true;
}

export const title = name => about[name]?.title ?? name;
