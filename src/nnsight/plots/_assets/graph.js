KINDS.graph = (body, data) => {
  const [width, height] = data.size;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  const largest = Math.max(...data.edges.map((edge) => Math.abs(edge.weight)), 1e-12);
  const edges = data.edges.map((edge) => {
    const share = Math.abs(edge.weight) / largest;
    const line = make("path", { class: "edge", d: edge.path, "stroke-width": 0.8 + 3.7 * share,
      "stroke-linecap": "round", style: `opacity:${0.25 + 0.7 * share}` });
    if (edge.weight < 0) {
      line.classList.add("negative");
      line.setAttribute("stroke-dasharray", "6 5");
    }
    describe(line, () => [make("b", {}, data.weighted ? number(edge.weight) : "feeds"),
      muted(`\n${edge.source}  →  ${edge.target}`)]);
    svg.append(line);
    return line;
  });
  const boxes = data.nodes.map((node) => {
    const box = make("rect", { class: "box", x: node.x - node.width / 2, y: node.y - node.height / 2,
      width: node.width, height: node.height, rx: 7 });
    const text = make("text", { x: node.x, y: node.y + 4, "text-anchor": "middle", "font-size": 12 }, node.label);
    const group = make("g", {}, box, text);
    describe(group, () => [make("b", {}, node.name), ...(node.detail ? [muted(`\n${node.detail}`)] : [])]);
    const mark = (on) => () => {
      box.classList.toggle("on", on);
      edges.forEach((line, i) => {
        const touches = data.edges[i].source === node.name || data.edges[i].target === node.name;
        line.classList.toggle("on", on && touches);
        line.classList.toggle("faint", on && !touches);
      });
    };
    group.addEventListener("pointerenter", mark(true));
    group.addEventListener("pointerleave", mark(false));
    svg.append(group);
    return group;
  });
  body.append(make("div", { class: "scroll" }, svg));
  if (!data.weighted) return;
  const slider = make("input", { type: "range", min: 0, max: 100, value: 0 });
  const shown = make("span", {}, `all ${edges.length}`);
  slider.addEventListener("input", () => {
    const least = largest * (slider.value / 100) ** 2;
    let count = 0;
    edges.forEach((line, i) => {
      const keep = Math.abs(data.edges[i].weight) >= least;
      line.style.display = keep ? "" : "none";
      count += keep;
    });
    shown.textContent = `${count} of ${edges.length}, from ${number(least)}`;
  });
  body.append(make("div", { class: "bar" }, make("label", {}, "edges shown", slider), shown,
    make("span", { class: "name" }, data.label || "")));
};
