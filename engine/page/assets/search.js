// A search of schedules: what each placement of the lighter models costs in quality, and the frontier of both.

const MEASURES = { perplexity_ratio: ["perplexity, times that of", 1], exact_nll: ["nats per token more than", 0] };
const PUBLISHED = ["sandwich", "light first", "light last", "light middle", "interleaved", "random"];

function searchSection(search, colourOf) {
  const first = search.models[0];
  const [words, neutral] = MEASURES[search.measure] ?? [search.measure, 0];
  const title = `${words} ${first} alone`;
  const ranked = search.rows.filter((row) => row.rank !== null);
  return [
    html("p", { class: "caption" }, `${several(search.num_samples, "text")} of ${search.length} tokens for each of ${several(search.rows.length, "schedule")}, ${search.reveal}. Less is better; intervals are 95 %, text by text.${search.scorer ? ` Read by ${search.scorer}.` : ""}`),
    html("ul", { class: "legend" }, search.models.map((name) => key(colourOf(name), name))),
    html("h3", {}, "Placements by rank"),
    placements(ranked, first, colourOf, title, neutral),
    html("h3", {}, "Quality and cost"),
    frontier(search.rows, title, neutral),
    html("ul", { class: "legend" }, PUBLISHED.filter((name) => ranked.some((row) => row.shapes.includes(name))).map((name) => html("li", { class: "key" }, sign({ colour: shapeColour(name), index: PUBLISHED.indexOf(name) }), name)),
      html("li", { class: "key line" }, "no other saves more and is better")),
    html("p", { class: "caption" }, "Named placements stand to the right of their saving, for their intervals to be seen."),
  ];
}

const shapeColour = (name) => `var(--c${PUBLISHED.indexOf(name) % 6})`;

function placements(rows, first, colourOf, title, neutral) {
  const values = rows.flatMap((row) => row.measure);
  const [low, high] = widened([...values, neutral], 0.03);
  const at = (value) => `${(100 * (value - low)) / (high - low)}%`;
  const ticks = linear([low, high], [0, 1]).ticks(4);
  const head = html("tr", {}, html("th", { scope: "col" }, "#"), html("th", { scope: "col" }, "start → end of a text"), html("th", { scope: "col", class: "scaled" }, title,
    html("div", { class: "ticks", "aria-hidden": "true" }, ticks.map((tick) => html("span", { "--value": at(tick) }, plain(tick, 4))))), html("th", { scope: "col", class: "number" }, "FLOPs saved"));
  const line = (row) => html("tr", { class: row.shapes.length ? "named" : null },
    html("td", { class: "number" }, `${row.rank}`),
    html("td", {}, html("div", { class: "segments", role: "img", "aria-label": row.models.join(", ") }, row.models.map((name) => html("i", { class: name === first ? "first" : null, "--c": colourOf(name) }))),
      row.shapes.length ? html("span", { class: "shape-name" }, row.shapes.join(", ")) : null),
    html("td", {}, html("div", { class: "interval", "--neutral": at(neutral), "--value": at(row.measure[0]), "--low": at(row.measure[1]), "--high": at(row.measure[2]) }, html("i", { class: "rule" }), html("i", { class: "span" }), html("i", { class: "dot" })),
      html("span", { class: "amount" }, `${row.measure[0].toFixed(3)} `, html("span", { class: "soft" }, `${row.measure[1].toFixed(3)}–${row.measure[2].toFixed(3)}`))),
    html("td", { class: "number" }, percent(row.saved)));
  return html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Placements" }, html("table", { class: "placements" }, html("thead", {}, head), html("tbody", {}, rows.map(line))));
}

function frontier(rows, title, neutral) {
  return chart(`Frontier of quality and cost: ${title} over the FLOPs saved.`, (width) => {
    const height = 320, box = [52, 26, width - 14, height - 44];
    const named = rows.filter((row) => row.shapes.length);
    const [low, high] = widened([neutral, ...rows.map((row) => row.measure[0]), ...named.flatMap((row) => row.measure)]);
    const apart = width < 560 ? 9 : 16, x = linear(widened([0, ...rows.map((row) => row.saved)], 0.04), [box[0], box[2] - apart * (named.length + 1)]), y = linear([low, high], [box[3], box[1]]);
    const picture = canvasOf(width, height);
    picture.append(axes(x, y, box, { xText: (value) => percent(value, 0), yText: (value) => plain(value, 4), xTitle: "FLOPs saved, without the head", yTitle: title }));
    const front = rows.filter((row) => row.on_front).sort((a, b) => a.saved - b.saved);
    picture.append(svg("path", { class: "front", d: front.map((row, i) => `${i ? "L" : "M"}${x(row.saved)} ${y(row.measure[0])}`).join("") }));
    const ordered = [...rows].sort((a, b) => a.saved - b.saved || a.measure[0] - b.measure[0]);
    const taken = [];
    const marks = ordered.map((row) => {
      const at = PUBLISHED.indexOf(row.shapes[0]), top = y(row.measure[0]);
      let left = x(row.saved);
      if (row.shapes.length) {
        taken.push(left);
        left += apart * taken.filter((other) => Math.abs(other - taken.at(-1)) < apart).length;
      }
      if (row.shapes.length) picture.append(svg("path", { class: "error", d: `M${left} ${y(row.measure[1])}V${y(row.measure[2])}`, "--c": shapeColour(row.shapes[0]) }), shape(Math.max(0, at), left, top, shapeColour(row.shapes[0])));
      else picture.append(svg("circle", { class: row.rank === null ? "alone" : "other", cx: left, cy: top, r: row.rank === null ? 6 : 3 }));
      return { x: left, y: top, lines: [row.rank === null ? `${row.models[0]} alone` : `#${row.rank} ${row.shapes.join(", ")}`, row.models.join(" "), `${row.measure[0].toFixed(3)} (${row.measure[1].toFixed(3)}–${row.measure[2].toFixed(3)}), ${percent(row.saved)} saved`] };
    });
    return { picture, marks, height };
  }).frame;
}
