// Dark or light, before anything is painted: the reader's choice, and without one the system's.
const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function paint(choice) {
  const root = document.documentElement;
  root.style.colorScheme = choice || "light dark";
  root.dataset.theme = choice || (darkSystem.matches ? "dark" : "light");  // for what CSS cannot say in colours
}

function chosenTheme() {
  try { return localStorage.getItem("theme"); } catch { return null; }
}

paint(chosenTheme());
darkSystem.addEventListener("change", () => paint(chosenTheme()));
