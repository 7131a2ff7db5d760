// The last pictures and the gallery: to look at again, to draw again, and to begin with.
import {$, $$, ask, make, say} from "./api.js";
import * as brush from "./brush.js";
import * as fields from "./fields.js";
import * as view from "./view.js";

const MOST = 24;
const strip = [];  // drawings, newest first

const item = (name, about) => {
  const made = make("button", {type: "button", class: "item", title: about}, make("img", {src: `/pictures/${name}`, alt: ""}), make("span", {}, about.replace(/: seed \d+.*$/, "")), make("small", {}, about.match(/seed \d+.*$/)?.[0] ?? ""));
  made.dataset.name = name;
  return made;
};

export function add(one) {
  strip.unshift(one);
  strip.length = Math.min(strip.length, MOST);
  $("#strip .hint")?.remove();
  const made = item(one.name, one.about);
  made.addEventListener("click", async () => {
    await take(one.name);
    repeat(one);
    mark(one);
    await view.end(one, null).catch(error => say(error.message));
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

// Fills the fields with the settings of a picture.
async function take(name) {
  try {
    const found = await ask(`/api/pictures/${encodeURIComponent(name)}`);
    fields.write(found.settings);
    $("#prompt").dispatchEvent(new Event("input"));
    await brush.begin(found.picture && `/pictures/${found.picture}`, found.mask && `/pictures/${found.mask}`);
    $("#facts").replaceChildren(...Object.entries(found.facts).map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, value))));
    say(found.said);
  } catch (error) {
    say(error.message, true);
  }
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
  brush.begin(`/api/drawings/${view.drawing().id}/${view.drawing().places - 1}/seen.png`);
});
