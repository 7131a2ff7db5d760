// Words and pixels light each other up. The page sends, with each picture, one heat map for each word.
(() => {
  "use strict";
  const decoded = new WeakMap(); // figure -> {text, width, height, maps, means, lows}

  function heats(figure) {
    const text = figure.dataset.heats;
    let known = decoded.get(figure);
    if (!known || known.text !== text) { // the page fills the same element anew
      const {width, height, maps = []} = JSON.parse(text);
      const bytes = maps.map(map => Uint8Array.from(atob(map), letter => letter.charCodeAt(0)));
      const means = bytes.map(map => map.reduce((a, b) => a + b, 0) / map.length);
      known = {text, width, height, maps: bytes, means, lows: bytes.map(map => Math.min(...map))};
      decoded.set(figure, known);
    }
    return known;
  }

  // A word -> its pixels: all others are darkened, those that look at it least the most.
  function showWord(figure, word) {
    const {width, height, maps, lows} = heats(figure), canvas = figure.querySelector("canvas");
    clear(figure);
    if (!maps[word]) return;
    [canvas.width, canvas.height] = [width, height];
    const shade = new ImageData(width, height);
    const range = 255 - lows[word] || 1;
    maps[word].forEach((heat, i) => { shade.data[4 * i + 3] = 0.85 * 255 * (255 - heat) / range; });
    canvas.getContext("2d").putImageData(shade, 0, 0);
    figure.dataset.lit = word;
    chips(figure)[word].style.setProperty("--lit", 1);
  }

  // A place of the picture, x and y from 0 to 1 -> its words: the more, the further above the word's mean.
  function showPlace(figure, x, y) {
    const {width, height, maps, means} = heats(figure);
    clear(figure);
    if (!maps.length) return;
    const at = Math.min(height - 1, Math.floor(y * height)) * width + Math.min(width - 1, Math.floor(x * width));
    const lit = maps.map((map, k) => Math.max(0, (map[at] - means[k]) / (255 - means[k] || 1)));
    chips(figure).forEach((chip, k) => chip.style.setProperty("--lit", lit[k].toFixed(3)));
    const names = lit.map((value, k) => [value, chips(figure)[k].firstChild.textContent.trim()])
      .filter(([value]) => value > 0.25).sort((a, b) => b[0] - a[0]).map(([, name]) => name);
    figure.dataset.place = `${x.toFixed(2)},${y.toFixed(2)}`;
    figure.querySelector(".here").textContent = names.length ? `Here: ${names.join(", ")}` : "Here: no word stands out";
  }

  function clear(figure) {
    const canvas = figure.querySelector("canvas");
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    chips(figure).forEach(chip => chip.style.setProperty("--lit", 0));
    delete figure.dataset.lit;
    delete figure.dataset.place;
  }

  const chips = figure => [...figure.querySelectorAll(".word")];
  const within = (event, part) => event.target.closest?.(`figure.view ${part}`);

  for (const kind of ["pointerover", "focusin"])
    document.addEventListener(kind, event => {
      const chip = within(event, ".word");
      if (chip) showWord(chip.closest("figure"), Number(chip.dataset.word));
    });
  for (const kind of ["pointerout", "focusout"])
    document.addEventListener(kind, event => {
      const part = within(event, ".word, .canvas") ?? within(event, ".canvas");
      if (part && !part.contains(event.relatedTarget)) clear(part.closest("figure"));
    });
  for (const kind of ["pointermove", "pointerdown"])
    document.addEventListener(kind, event => {
      const canvas = within(event, ".canvas");
      if (!canvas) return;
      const box = canvas.getBoundingClientRect();
      const share = (value, low, length) => Math.min(1, Math.max(0, (value - low) / length));
      showPlace(canvas.closest("figure"), share(event.clientX, box.left, box.width), share(event.clientY, box.top, box.height));
    });
  document.addEventListener("keydown", event => {
    const canvas = within(event, ".canvas");
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!canvas || !move) return;
    event.preventDefault();
    const [x, y] = (canvas.closest("figure").dataset.place ?? "0.5,0.5").split(",").map(Number);
    const inside = value => Math.min(1, Math.max(0, value));
    showPlace(canvas.closest("figure"), inside(x + move[0] / 16), inside(y + move[1] / 16));
    const [px, py] = canvas.closest("figure").dataset.place.split(",");
    canvas.style.setProperty("--x", px);
    canvas.style.setProperty("--y", py);
  });
})();
