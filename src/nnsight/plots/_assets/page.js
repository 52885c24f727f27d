const KINDS = {};
const page = document.getElementById("page");
const system = window.matchMedia("(prefers-color-scheme: dark)");

function themeName() { return document.documentElement.dataset.theme; }

function make(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "rect", "circle", "line", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  for (const child of children) element.append(child);
  return element;
}

function number(value) {
  if (value === null) return "none";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function colour(scale, value) {
  const colours = scale[themeName()];
  const share = (value - scale.low) / ((scale.high - scale.low) || 1);
  return colours[Math.round(Math.min(Math.max(share, 0), 1) * (colours.length - 1))];
}

function inkOn(hex) {
  const [r, g, b] = [1, 3, 5].map((i) => (parseInt(hex.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? "#000" : "#fff";
}

// Texts reach the page as text nodes only, so that nothing in a prompt is taken for markup.
const tip = make("div", { id: "tip", hidden: "" });
function describe(element, fill) {
  element.addEventListener("pointerenter", () => { tip.replaceChildren(...fill()); tip.hidden = false; });
  element.addEventListener("pointerleave", () => { tip.hidden = true; });
  element.addEventListener("pointermove", (event) => {
    const box = tip.getBoundingClientRect();
    const x = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
    const y = event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16;
    tip.style.left = `${Math.max(x, 4)}px`;
    tip.style.top = `${Math.max(y, 4)}px`;
  });
}

function muted(text) { return make("span", { class: "of" }, text); }

function colourBar(scale, label) {
  const colours = scale[themeName()];
  const strip = make("span", { class: "colours" });
  strip.style.background = `linear-gradient(to right, ${colours.join(",")})`;
  return make("div", { class: "bar" }, number(scale.low), strip, number(scale.high),
    make("span", { class: "name" }, label || ""));
}

function show(data) {
  const root = document.documentElement;
  if (!root.dataset.theme) root.dataset.theme = system.matches ? "dark" : "light";
  const body = make("div");
  const button = make("button", { type: "button" });
  const draw = () => {
    button.textContent = themeName() === "dark" ? "light" : "dark";
    tip.hidden = true;
    body.replaceChildren();
    KINDS[data.kind](body, data);
  };
  button.addEventListener("click", () => { root.dataset.theme = button.textContent; draw(); });
  page.append(make("header", {}, make("h1", {}, data.title || ""), button), body, tip);
  draw();
}
