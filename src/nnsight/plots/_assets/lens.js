KINDS.lens = (body, data) => {
  const bars = (list) => make("table", {}, ...list.map(([token, share]) => make("tr", {},
    make("td", {}, token), make("td", {}, number(share)),
    make("td", {}, Object.assign(make("span", { class: "share" }), {
      style: `width:${Math.round(90 * Math.min(Math.max(share, 0), 1))}px` })))));
  const cell = (i, j) => ({
    text: data.tokens[i][j].trim(),
    tip: () => [make("b", {}, data.tokens[i][j]), `  ${number(data.values[i][j])}`,
      muted(`\n${data.rows[i]}  ·  ${data.columns[j]}`), ...(data.details ? [bars(data.details[i][j])] : [])],
  });
  body.append(grid({ ...data, cell, kind: "wide" }), colourBar(data.scale, data.label));
};
