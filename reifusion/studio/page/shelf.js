// The last pictures and the gallery: to look at again, to draw again, and to begin with.
import {$, $$, ask, make, say} from "./api.js";
import * as brush from "./brush.js";
import * as fields from "./fields.js";
import * as view from "./view.js";

const MOST = 24;
const strip = [];  // drawings, newest first
const file = name => `/pictures/${encodeURIComponent(name)}`;
let asked = 0;

const item = (name, about) => {
  const [, prompt, rest] = about.match(/^([\s\S]*): (seed -?\d+[\s\S]*)$/) ?? [null, about, ""];
  const made = make("button", {type: "button", class: "item", title: about}, make("img", {src: file(name), alt: ""}), make("span", {}, prompt), make("small", {}, rest));
  made.dataset.name = name;
  return made;
};

export function add(one) {
  strip.unshift(one);
  strip.length = Math.min(strip.length, MOST);
  $("#strip .hint")?.remove();
  const made = item(one.name, one.about);
  made.addEventListener("click", async () => {
    if (!await take(one.name)) return;
    repeat(one);
    mark(one);
    await view.end(one, null).catch(error => { view.still(one); say(error.message); });
  });
  $("#strip").prepend(made);
  while ($("#strip").children.length > MOST) $("#strip").lastChild.remove();
  mark(one);
}

function mark(one) {
  for (const made of $$("#strip .item")) made.dataset.name === one.name ? made.setAttribute("aria-current", "true") : made.removeAttribute("aria-current");
}

export function repeat(one) {
  $("#command").value = one?.command ?? "";
  $("#python").value = one?.python ?? "";
}

// Fills the fields with the settings of a picture; false if another one has been asked for since.
async function take(name) {
  const mine = ++asked;
  try {
    const found = await ask(`/api/pictures/${encodeURIComponent(name)}`);
    if (mine !== asked) return false;
    fields.write(found.settings);
    $("#prompt").dispatchEvent(new Event("input"));
    await brush.begin(found.picture && file(found.picture), found.mask && file(found.mask));
    $("#facts").replaceChildren(...Object.entries(found.facts).map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, value))));
    say(found.said);
  } catch (error) {
    say(error.message, true);
  }
  return mine === asked;
}

$("#gallery").addEventListener("toggle", async event => {
  if (!event.target.open) return;
  const found = await ask("/api/pictures").catch(error => (say(error.message, true), []));
  $("#shelf").replaceChildren(...found.map(one => {
    const made = item(one.name, one.about);
    made.addEventListener("click", () => take(one.name));
    return made;
  }));
  if (!found.length) $("#shelf").replaceChildren(make("p", {class: "hint"}, "There is no picture of the studio's in this folder yet."));
});
for (const name of ["command", "python"])
  $(`#copy-${name}`).addEventListener("click", async () => {
    const text = $(`#${name}`).value;
    if (!text) return say("Nothing to copy yet: draw a picture first.", true);
    await navigator.clipboard.writeText(text);
    say("Copied.");
  });
$("#reuse").addEventListener("click", () => {
  if (!view.drawing()) return say("There is no last picture yet: draw one first.", true);
  const {id, name, places} = view.drawing();
  brush.begin(name ? file(name) : `/api/drawings/${id}/${places - 1}/seen.png`);
});
