// What a page does by itself: dark or light, copying a listing, the search. All of it works from a disk.
const up = document.body.dataset.up;

document.querySelector("button.theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paint(theme);
  try { localStorage.setItem("theme", theme); } catch { /* not kept */ }
});

// On a narrow screen the contents begin folded.
if (matchMedia("(max-width: 60rem)").matches) document.querySelector("details.contents").open = false;

for (const listing of document.querySelectorAll("div.highlight")) {
  const button = Object.assign(document.createElement("button"), { className: "copy", textContent: "copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(listing.querySelector("pre").textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  if (navigator.clipboard) listing.append(button);
}

// The search: every word must be there; titles count more than text.
const field = document.querySelector(".search input"), list = document.querySelector(".search ol");
let sections = null;
window.searchable = (rows) => { sections = rows; search(); };

function search() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (const [page, heading, address, text] of sections ?? []) {
    const head = `${page} ${heading}`.toLowerCase(), body = text.toLowerCase();
    if (!words.every((word) => head.includes(word) || body.includes(word))) continue;
    const score = words.reduce((sum, word) => sum + (head.includes(word) ? 20 : 0) + body.split(word).length, 0);
    const at = Math.max(0, body.indexOf(words[0]) - 40);
    found.push({ page, heading, address, score, text: text.slice(at, at + 120) });
  }
  found.sort((a, b) => b.score - a.score);
  list.replaceChildren(...found.slice(0, 12).map(({ page, heading, address, text }) => {
    const item = document.createElement("li"), link = document.createElement("a"), some = document.createElement("small");
    link.href = up + address;
    link.textContent = heading ? `${page} · ${heading}` : page;
    some.textContent = text;
    link.append(some);
    item.append(link);
    return item;
  }));
  list.hidden = words.length === 0;
  if (!list.hidden && sections && !found.length) list.textContent = "Nothing has all of these words.";
}

field.addEventListener("focus", () => {
  document.head.append(Object.assign(document.createElement("script"), { src: `${up}assets/search.js` }));
}, { once: true });
field.addEventListener("input", search);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) { event.preventDefault(); field.focus(); }
  if (event.key === "Escape") { field.value = ""; search(); field.blur(); }
});
