KINDS.trajectory = (body, data) => {
  const [width, height, edge] = [860, 560, 46];
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  const xs = data.points.flat().map((point) => point[0]);
  const ys = data.points.flat().map((point) => point[1]);
  const along = (list, from, to) => {
    const [low, high] = [Math.min(...list), Math.max(...list)];
    return (value) => from + ((value - low) / ((high - low) || 1)) * (to - from);
  };
  const [x, y] = [along(xs, edge, width - edge), along(ys, height - edge, edge)];
  svg.append(make("line", { class: "axis", x1: edge / 2, x2: width - 10, y1: height - 20, y2: height - 20 }),
    make("line", { class: "axis", x1: edge / 2, x2: edge / 2, y1: 10, y2: height - 20 }),
    make("text", { class: "muted", x: width - 10, y: height - 4, "text-anchor": "end", "font-size": 12 }, data.axes[0]),
    make("text", { class: "muted", transform: `translate(14 12) rotate(-90)`, "text-anchor": "end", "font-size": 12 },
      data.axes[1]));
  const legend = make("div", { class: "legend" });
  data.points.forEach((line, i) => {
    const paint = data.series[themeName()][i % data.series[themeName()].length];
    const group = make("g", { color: paint });
    const d = line.map((point, k) => `${k ? "L" : "M"}${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join("");
    const stroke = { fill: "none", stroke: paint, "stroke-width": 1.6, "stroke-linejoin": "round", opacity: 0.75 };
    if (i >= data.series[themeName()].length) stroke["stroke-dasharray"] = "5 4";
    group.append(make("path", { d, ...stroke }));
    line.forEach((point, k) => {
      const last = k === line.length - 1;
      const dot = make("circle", { cx: x(point[0]), cy: y(point[1]), r: last ? 6 : 2.5 + (1.5 * k) / line.length,
        fill: k ? paint : "var(--paper)", stroke: paint, "stroke-width": 1.5 });
      describe(dot, () => [make("b", {}, data.labels[i]), muted(`\n${data.steps[k]}`)]);
      group.append(dot);
    });
    const end = line[line.length - 1];
    const right = x(end[0]) > width - 130;
    group.append(make("text", { x: x(end[0]) + (right ? -10 : 10), y: y(end[1]) + 4, "font-size": 12,
      "text-anchor": right ? "end" : "start" }, data.labels[i]));
    svg.append(group);
    const key = make("span", {}, Object.assign(make("i"), {
      style: i < data.series[themeName()].length ? `background:${paint}`
        : `background:repeating-linear-gradient(to right, ${paint} 0 4px, transparent 4px 6px)` }), data.labels[i]);
    key.addEventListener("click", () => {
      const off = key.classList.toggle("off");
      group.style.display = off ? "none" : "";
    });
    legend.append(key);
  });
  body.append(svg, legend);
};
