// The map of the pipeline, and the station on view: its tensors, its lines of code, its chapter.
import {$, $$, make} from "./api.js";

const LOOP = ["unet", "guidance", "sampler"];
let chosen = "sampler", around = chosen, facts = null, id = null;

const number = value => Math.abs(value) < 0.0005 ? "0" : value.toFixed(3);

// Shows the station that belongs to a place of the slider, or stays at one of the loop while it goes round.
export function show(drawing, now, places) {
  [id, facts] = [drawing, now];
  if (LOOP.includes(chosen)) around = chosen;
  chosen = now.step !== null ? around : now.place === 0 ? "noise" : "vae";
  draw();
}

export function choose(station) {
  chosen = station;
  if (facts) draw();
}

// How far it is while drawing, on the map.
export function running(step, total) {
  const loop = $("#map .loop");
  loop.classList.toggle("running", step !== null);
  loop.dataset.loop = total ? (step === null ? `× ${total} steps` : `step ${step} of ${total}`) : "× steps";
}

function draw() {
  for (const box of $$("#map [data-station]")) {
    const station = facts.stations[box.dataset.station];
    box.querySelector("b").textContent = station.title;
    box.querySelector("small").textContent = station.now;
    box.title = station.said;
    if (box.dataset.station !== chosen) box.removeAttribute("aria-current");
    else {
      box.setAttribute("aria-current", "true");
      const map = $("#map"), [here, frame] = [box, map].map(one => one.getBoundingClientRect());
      map.scrollLeft += here.left + here.width / 2 - frame.left - frame.width / 2;  // on a phone it is longer than the screen
    }
  }
  const station = facts.stations[chosen], panel = $("#station");
  const top = panel.dataset.chosen === chosen ? panel.scrollTop : 0;
  const chapter = station.book ? make("a", {href: station.book, target: "_blank"}, station.chapter) : station.chapter;
  panel.replaceChildren(
    make("div", {class: "head"}, make("h2", {}, station.title), make("small", {}, "Chapter: ", chapter)),
    make("p", {class: "said"}, station.said));
  const rows = make("ul", {class: "rows"}, ...station.rows.map(([name, value]) => make("li", {}, make("b", {}, name), ` ${value}`)));
  const code = station.code.flatMap(one => {
    const pre = make("pre"), [, source, equation] = one.equation.match(/^(.*?): (.*)$/s) ?? [];
    pre.innerHTML = one.html;  // made by the studio from its own source
    return [...(equation ? [make("p", {class: "equation"}, equation, make("small", {}, source))] : []), pre,
      make("p", {class: "place"}, make("a", {href: `/source/${one.place.replace(":", "#L")}`, target: "_blank"}, one.place))];
  });
  if (station.filled) code.splice(station.code[0].equation ? 1 : 0, 0, make("p", {class: "filled"}, station.filled));
  const tensors = make("div", {class: chosen === "clip" ? "tensors long" : "tensors"}, ...station.tensors.map(one => make("figure", {},
    make("img", {src: `/api/drawings/${id}/${facts.place}/${one.name}.png`, alt: `${one.label}: blue below zero, red above`}),
    make("figcaption", {}, make("b", {}, one.label), `${one.shape}; mean ${number(one.mean)}, std ${number(one.std)}`))));
  panel.append(...(station.rows.length && station.rows.length < 7 ? [rows] : []), ...code,
    ...(station.tensors.length ? [tensors] : []), ...(station.rows.length >= 7 ? [rows] : []));
  panel.dataset.chosen = chosen;
  panel.scrollTop = top;
}

// The noise schedule, from noise to picture, with the sampler's timesteps and the place on view.
export function curve(known, now) {
  const svg = $("#schedule-curve svg"), width = 560, high = 60;
  const x = t => (4 + (width - 8) * (1 - t / known.last)).toFixed(1), y = share => (4 + high * (1 - share)).toFixed(1);
  const line = (name, values) => `<polyline class="${name}" points="${known.t.map((t, k) => `${x(t)},${y(values[k])}`).join(" ")}"/>`;
  const t = now.t ?? (now.place === 0 ? known.timesteps[0] : 0);
  const said = now.share ? `picture × ${now.share[0].toFixed(3)}, noise × ${now.share[1].toFixed(3)}` : "picture × 1, noise × 0";
  svg.setAttribute("aria-label", `The noise schedule, from noise to picture. Here: ${said}`);
  svg.innerHTML = line("signal", known.signal) + line("noise", known.noise)
    + known.timesteps.map(at => `<path class="tick" d="M${x(at)},68v6"/>`).join("") + `<path class="marker" d="M${x(t)},0V76"/>`;
  $("#shares").textContent = said;
}
