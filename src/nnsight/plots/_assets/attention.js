KINDS.attention = (body, data) => {
  const heads = make("div", { class: "heads" });
  const large = make("div", { class: "large" });
  const choose = (index) => {
    KINDS.attention.chosen = index;
    [...heads.children].forEach((figure, i) => figure.classList.toggle("on", i === index));
    const values = data.patterns[index];
    const cell = (i, j) => ({
      text: "",
      tip: () => [make("b", {}, number(values[i][j])), muted("\nfrom "), data.queries[i], muted("  to "), data.keys[j]],
    });
    large.replaceChildren(
      make("h1", { style: "margin-bottom:8px;font-size:14px" }, data.heads[index]),
      grid({ rows: data.queries, columns: data.keys, values, scale: data.scale, cell, kind: "square" }),
      colourBar(data.scale, "attention"));
  };
  data.patterns.forEach((pattern, index) => {
    const canvas = make("canvas", { width: data.keys.length, height: data.queries.length });
    const ink = canvas.getContext("2d");
    pattern.forEach((row, i) => row.forEach((value, j) => {
      if (value === null) return;
      ink.fillStyle = colour(data.scale, value);
      ink.fillRect(j, i, 1, 1);
    }));
    const figure = make("figure", { tabindex: 0 }, canvas, data.heads[index]);
    figure.addEventListener("click", () => choose(index));
    figure.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(index); });
    heads.append(figure);
  });
  body.append(make("div", { class: "beside" }, heads, large));
  choose(KINDS.attention.chosen || 0);
};
