// The ticks of a run: a lane for each model, a bar for each network call, as high as the call was full.

const LANE = 46;
const GAP = 30;

function timeline({ ticks, models, max_batch: maxBatch }, colourOf) {
  const used = models.map((model, i) => ({ ...model, i })).filter(({ i }) => ticks.model.includes(i));
  const lane = new Map(used.map(({ i }, at) => [i, at]));
  const end = Math.max(...ticks.end);

  function draw(width) {
    const height = used.length * (LANE + GAP) + 26;
    const x = linear([0, end], [1, width - 1]);
    const bottom = (model) => (lane.get(model) + 1) * (LANE + GAP);
    const picture = canvasOf(width, height);
    const marks = ticks.model.map((model, i) => ({
      x: (x(ticks.start[i]) + x(ticks.end[i])) / 2,
      y: bottom(model) - LANE,
      lines: tell(i),
    }));
    picture.append(
      svg(
        "g.axes",
        x
          .ticks(Math.max(2, Math.floor(width / 130)))
          .map((value) => [
            svg("path.faint", { d: `M${x(value)} ${GAP}V${height - 26}` }),
            label(x(value), height - 8, seconds(value), width),
          ]),
      ),
    );
    for (const { i, name } of used) {
      const mine = ticks.model.map((model, at) => (model === i ? at : -1)).filter((at) => at >= 0);
      const full = mine.reduce((sum, at) => sum + ticks.num_sequences[at], 0) / (mine.length * maxBatch);
      const bars = mine.map((at) => {
        const left = x(ticks.start[at]);
        const wide = Math.max(0.4, (x(ticks.end[at]) - left) * 0.92);
        return `M${left} ${bottom(i)}v${(-LANE * ticks.num_sequences[at]) / maxBatch}h${wide}V${bottom(i)}z`;
      });
      picture.append(
        svg("rect.lane", { y: bottom(i) - LANE, width, height: LANE }),
        svg("path.fill", { d: bars.join(""), "--c": colourOf(name) }),
        svg(
          "text",
          { x: 0, y: bottom(i) - LANE - 6, class: "name" },
          name,
          svg("tspan.soft", { dx: 8 }, `${percent(full, 0)} full`),
        ),
      );
    }
    return { picture, marks, height: height - 26 };
  }

  function tell(i) {
    const many = ticks.merged > 1 ? `mean of ${ticks.merged} ticks: ` : "";
    const count = (value) => plain(value);
    return [
      `${models[ticks.model[i]].name} at ${seconds(ticks.start[i])}`,
      `${many}${count(ticks.num_sequences[i])} of ${maxBatch} sequences, ${count(ticks.num_rows[i])} tokens revealed`,
      `${seconds(ticks.end[i] - ticks.start[i])} long`,
    ];
  }
  return chart(`Timeline of ${several(ticks.count, "tick")} in ${seconds(end)}.`, draw, { across: true }).frame;
}

// A label at x that stays inside the picture.
function label(x, y, text, width) {
  const anchor = x < 24 ? "start" : x > width - 24 ? "end" : "middle";
  return svg("text", { x, y, "text-anchor": anchor }, text);
}
