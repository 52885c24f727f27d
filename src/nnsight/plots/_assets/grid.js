// A table of coloured cells. `cell(i, j)` gives {text, tip}; labels light up under the pointer.
function grid({ rows, columns, values, scale, cell, corner, kind }) {
  const dense = columns.length > 60 || rows.length > 60;
  const table = make("table", { class: `grid ${dense ? "dense" : kind || ""}` });
  const room = { wide: 9, square: 2 }[kind] || 6;
  const upright = columns.some((name) => name.length > room);
  const feet = columns.map((name) => make("th", { class: upright ? "foot upright" : "foot" }, make("span", {}, name.trim())));
  rows.forEach((name, i) => {
    const side = make("th", { class: "side" }, name.trim());
    const line = make("tr", {}, side);
    columns.forEach((_, j) => {
      const value = values[i][j];
      const box = make("td");
      const found = cell(i, j);
      if (value === null) box.className = "missing";
      else {
        const paint = colour(scale, value);
        box.style.background = paint;
        box.style.color = inkOn(paint);
        if (!dense) box.textContent = found.text;
      }
      describe(box, found.tip);
      const mark = (on) => () => { side.classList.toggle("on", on); feet[j].classList.toggle("on", on); };
      box.addEventListener("pointerenter", mark(true));
      box.addEventListener("pointerleave", mark(false));
      line.append(box);
    });
    table.append(line);
  });
  table.append(make("tr", {}, make("th", { class: "side foot corner" }, corner || ""), ...feet));
  return make("div", { class: "scroll" }, table);
}

function decimals(values) {
  const largest = Math.max(0, ...values.flat().filter((value) => value !== null).map(Math.abs));
  return largest === 0 ? 2 : Math.min(Math.max(2 - Math.ceil(Math.log10(largest)), 0), 9);
}
