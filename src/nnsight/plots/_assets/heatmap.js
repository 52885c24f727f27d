KINDS.heatmap = (body, data) => {
  const places = decimals(data.values);
  const cell = (i, j) => ({
    text: data.values[i][j] === null ? "" : data.values[i][j].toFixed(places),
    tip: () => [make("b", {}, number(data.values[i][j])), muted(`\n${data.rows[i]}  ·  ${data.columns[j]}`)],
  });
  body.append(grid({ ...data, cell }), colourBar(data.scale, data.label));
};
