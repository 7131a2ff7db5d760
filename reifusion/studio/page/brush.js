// The picture to begin with, and a soft red brush for the part that is to change.
import {$, say} from "./api.js";

const start = $("#start"), paint = $("#paint");
let turn = 0, there = false, painted = false, cursor = [0.5, 0.5], last = null;

export const picture = () => there ? asUrl(start, start.naturalWidth, start.naturalHeight) : null;

// White where it is painted, and transparent elsewhere.
export function mask() {
  if (!there || !painted) return null;
  const copy = Object.assign(document.createElement("canvas"), {width: paint.width, height: paint.height}), pen = copy.getContext("2d");
  pen.drawImage(paint, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, copy.width, copy.height);
  return copy.toDataURL("image/png");
}

function asUrl(image, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return canvas.toDataURL("image/png");
}

export async function begin(source, maskSource = null) {
  if (!source) return remove();
  const mine = ++turn;
  start.src = source;
  try {
    await start.decode();
  } catch {
    if (mine !== turn) return;  // another one was opened since
    remove();
    return say("what was opened cannot be read as a picture", true);
  }
  if (mine !== turn) return;
  there = true;
  $("#editor").hidden = false;
  $("#begin").open = true;
  [paint.width, paint.height] = [start.naturalWidth, start.naturalHeight];
  painted = false;
  if (maskSource) await repaint(maskSource);
}

async function repaint(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const pen = paint.getContext("2d");
  pen.drawImage(image, 0, 0, paint.width, paint.height);
  const levels = pen.getImageData(0, 0, paint.width, paint.height);
  for (let i = 0; i < levels.data.length; i += 4) levels.data.set([224, 32, 48, levels.data[i]], i);
  pen.putImageData(levels, 0, 0);
  painted = true;
}

function remove() {
  turn++;
  there = painted = false;
  start.removeAttribute("src");
  $("#editor").hidden = true;
}

function clear() {
  paint.getContext("2d").clearRect(0, 0, paint.width, paint.height);
  painted = false;
}

// A dot with a soft edge, at x and y from 0 to 1; the brush is in pixels of the page.
function dot(x, y) {
  const scale = paint.width / paint.getBoundingClientRect().width, radius = Number($("#brush").value) / 2 * scale, pen = paint.getContext("2d");
  const edge = pen.createRadialGradient(x * paint.width, y * paint.height, 0.6 * radius, x * paint.width, y * paint.height, radius);
  edge.addColorStop(0, "rgb(224 32 48)");
  edge.addColorStop(1, "rgb(224 32 48 / 0)");
  pen.fillStyle = edge;
  pen.beginPath();
  pen.arc(x * paint.width, y * paint.height, radius, 0, 7);
  pen.fill();
  painted = true;
}

function stroke(x, y) {
  const [fromX, fromY] = last ?? [x, y], parts = Math.max(1, Math.ceil(Math.hypot(x - fromX, y - fromY) * 60));
  for (let k = 1; k <= parts; k++) dot(fromX + (x - fromX) * k / parts, fromY + (y - fromY) * k / parts);
  last = [x, y];
}

const place = event => {
  const box = paint.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
};
paint.addEventListener("pointerdown", event => {
  paint.setPointerCapture(event.pointerId);
  last = null;
  stroke(...place(event));
});
paint.addEventListener("pointermove", event => { if (event.buttons) stroke(...place(event)); });
paint.addEventListener("keydown", event => {
  const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0]}[event.key];
  if (!move) return;
  event.preventDefault();
  cursor = cursor.map((at, k) => Math.min(1, Math.max(0, at + move[k] / 32)));
  if (event.key === " " || event.shiftKey) dot(...cursor);
  for (const [k, name] of ["--x", "--y"].entries()) $("#editor").style.setProperty(name, cursor[k]);
  paint.setAttribute("aria-label", `The brush: ${Math.round(100 * cursor[0])}% from the left, ${Math.round(100 * cursor[1])}% from the top`);
});

function file(one) {
  if (!one?.type.startsWith("image/")) return;
  const url = URL.createObjectURL(one);
  begin(url).finally(() => URL.revokeObjectURL(url));
}
$("#open").addEventListener("change", event => { file(event.target.files[0]); event.target.value = ""; });
$("#clear").addEventListener("click", clear);
$("#drop").addEventListener("click", remove);
document.addEventListener("paste", event => file(event.clipboardData.files[0]));
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => { event.preventDefault(); file(event.dataTransfer.files[0]); });
$("#strength").addEventListener("input", event => { $('output[for="strength"]').textContent = event.target.value; });
