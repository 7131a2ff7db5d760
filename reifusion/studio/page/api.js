// How the page asks the studio: an answer, or a line of JSON for each news of something that takes long.

const post = body => ({method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
const LOST = "The studio does not answer; is it still running?";

async function answer(path, options) {
  let found;
  try {
    found = await fetch(path, options);
  } catch {
    throw new Error(LOST);
  }
  if (found.ok) return found;
  const said = await found.json().catch(() => ({}));
  throw new Error(said.note ?? said.error?.message ?? `The studio failed (${found.status}); its terminal says why.`);
}

export const ask = async (path, body) => (await answer(path, body && post(body))).json();

// Calls `hear` with each news; returns the last one.
export async function follow(path, body, hear) {
  const reader = (await answer(path, post(body))).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = null;
  for (;;) {
    const {done, value} = await reader.read().catch(() => { throw new Error(LOST); });
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) hear(last = JSON.parse(line));
    if (done) return last;
  }
}

export const $ = selector => document.querySelector(selector);
export const $$ = selector => [...document.querySelectorAll(selector)];

// Makes an element: make("button", {type: "button"}, "text", another)
export function make(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

export function say(text, failed = false) {
  const status = $("#status");
  if (status.textContent === text && status.classList.contains("failed") === failed) return;
  status.setAttribute("role", failed ? "alert" : "status");
  status.classList.toggle("failed", failed);
  status.textContent = text;
}
