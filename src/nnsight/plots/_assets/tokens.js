KINDS.tokens = (body, data) => {
  const words = make("div", { class: "words" });
  data.tokens.forEach((token, i) => {
    const value = data.values[i];
    const span = make("span", {}, token.replaceAll("\n", "↵"));
    if (value === null) span.style.background = "var(--missing)";
    else {
      const paint = colour(data.scale, value);
      span.style.background = paint;
      span.style.color = inkOn(paint);
    }
    describe(span, () => [make("b", {}, number(value)), muted(`\ntoken ${i}  ·  `), JSON.stringify(token)]);
    words.append(span);
    if (token.includes("\n")) words.append(make("br"));
  });
  body.append(words, colourBar(data.scale, data.label));
};
