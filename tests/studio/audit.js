// What is wrong with a page: text paler than 4.5 : 1 (WCAG 1.4.3), controls smaller than 24 px (2.5.8),
// controls without a name (4.1.2), and anything wider than the window.
() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const colour = text => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data;
  };
  const linear = byte => byte <= 10 ? byte / 255 / 12.92 : ((byte / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const found = colour(getComputedStyle(element).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255];
  };
  const shown = element => element.offsetParent !== null && getComputedStyle(element).visibility === "visible";
  const faults = [];

  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || !shown(element) || element.matches("script, style")) continue;
    const [dark, light] = [colour(getComputedStyle(element).color), behind(element)].map(luminance).sort((a, b) => a - b);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) faults.push(`pale, ${contrast.toFixed(1)} : 1: ${text.slice(0, 40)}`);
  }
  for (const element of document.querySelectorAll("button, input, textarea, select, [role=slider]")) {
    if (!shown(element) || element.type === "file") continue;
    const {width, height} = element.getBoundingClientRect(), what = element.outerHTML.slice(0, 120);
    if (width < 24 || height < 24) faults.push(`small, ${Math.round(width)} x ${Math.round(height)}: ${what}`);
    const names = [element.labels?.length, element.ariaLabel, element.title, element.getAttribute("aria-labelledby"), element.innerText?.trim()];
    if (!names.some(Boolean)) faults.push(`nameless: ${what}`);
  }
  const {scrollWidth, clientWidth} = document.documentElement;
  if (scrollWidth > clientWidth) faults.push(`wide: ${scrollWidth} of ${clientWidth}`);
  return faults;
}
