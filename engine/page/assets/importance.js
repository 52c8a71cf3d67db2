// Importance of steps: loss of each model by mask rate, and what the lighter ones lose.

function importanceSection({ models, rates, loss, gap, kl, num_windows: windows, length }, colourOf) {
  const [first, ...others] = models;
  const pick = (curves, names, dashed, title) =>
    names.map((name) => ({ name, values: curves[name], colour: colourOf(name), dashed, title: title(name) }));
  const lost = [
    ...pick(gap, others, false, (name) => `loss of ${name} − ${first}`),
    ...pick(kl, others, true, (name) => `KL(${first} ‖ ${name})`),
  ];
  return [
    caption(
      `${several(windows, "window")} of ${length} tokens, masked at every rate: 1 is the start of a text, 0 its end. `,
      "Bands are 95 % intervals.",
    ),
    html(
      "ul.legend",
      models.map((name) => key(colourOf(name), name)),
      html("li.key.dashes", `dashed: divergence from ${first}`),
    ),
    html(
      "div.pair",
      html(
        "div",
        html("h3", "How well each model fills in"),
        curves(
          "Loss by mask rate.",
          rates,
          pick(loss, models, false, (name) => `loss of ${name}`),
        ),
      ),
      others.length
        ? html(
            "div",
            html("h3", "What a lighter model loses"),
            curves("Loss gap and divergence by mask rate.", rates, lost),
          )
        : null,
    ),
  ];
}

function curves(label, rates, lines) {
  return chart(label, (width) => {
    const height = 300;
    const box = [46, 26, width - 12, height - 44];
    const x = linear([1, 0], [box[0], box[2]]);
    x.ticks = () => [1, 0.75, 0.5, 0.25, 0];
    const y = linear(widened([...lines.flatMap(({ values }) => values.flat()), 0], 0.03), [box[3], box[1]]);
    const picture = canvasOf(width, height);
    picture.append(
      axes(x, y, box, {
        xText: String,
        yText: (value) => plain(value),
        xTitle: "share of positions still masked",
        yTitle: "nats per masked token",
      }),
    );
    const path = (values, at) => values.map((value, i) => `${i ? "L" : "M"}${x(rates[i])} ${y(value[at])}`).join("");
    for (const { values, colour, dashed } of lines) {
      const back = values
        .map((_, i) => values.length - 1 - i)
        .map((i) => `L${x(rates[i])} ${y(values[i][1])}`)
        .join("");
      picture.append(
        svg("path.spread", { d: `${path(values, 2)}${back}z`, "--c": colour }),
        svg("path", { class: dashed ? "curve dashed" : "curve", d: path(values, 0), "--c": colour }),
      );
    }
    const marks = rates
      .map((rate, i) => ({ rate, i }))
      .sort((a, b) => b.rate - a.rate)
      .flatMap(({ rate, i }) =>
        lines.map(({ values, title }) => ({
          x: x(rate),
          y: y(values[i][0]),
          lines: [
            title,
            `${values[i][0].toFixed(3)} (${values[i][1].toFixed(3)} to ${values[i][2].toFixed(3)})`,
            `at mask rate ${plain(rate)}`,
          ],
        })),
      );
    return { picture, marks, height };
  }).frame;
}
