// A search of schedules: what each placement of the lighter models costs in quality, and the frontier of both.

const MEASURES = { perplexity_ratio: ["perplexity, times that of", 1], exact_nll: ["nats per token more than", 0] };
const PUBLISHED = ["sandwich", "light first", "light last", "light middle", "interleaved", "random"];

function searchSection(search, colourOf) {
  const first = search.models[0];
  const [words, neutral] = MEASURES[search.measure] ?? [search.measure, 0];
  const title = `${words} ${first} alone`;
  const ranked = search.rows.filter((row) => row.rank !== null);
  return [
    caption(
      `${several(search.num_samples, "text")} of ${search.length} tokens for each of `,
      `${several(search.rows.length, "schedule")}, ${search.reveal}. Less is better; intervals are 95 %, text by text.`,
      search.scorer ? ` Read by ${search.scorer}.` : "",
    ),
    html(
      "ul.legend",
      search.models.map((name) => key(colourOf(name), name)),
    ),
    html("h3", "Placements by rank"),
    placements(ranked, first, colourOf, title, neutral),
    html("h3", "Quality and cost"),
    frontier(search.rows, title, neutral),
    html(
      "ul.legend",
      PUBLISHED.filter((name) => ranked.some((row) => row.shapes.includes(name))).map((name) =>
        html("li.key", sign({ colour: shapeColour(name), index: PUBLISHED.indexOf(name) }), name),
      ),
      html("li.key.line", "no other saves more and is better"),
    ),
    caption("Named placements stand to the right of their saving, for their intervals to be seen."),
  ];
}

const shapeColour = (name) => `var(--c${Math.max(0, PUBLISHED.indexOf(name)) % 6})`;

function placements(rows, first, colourOf, title, neutral) {
  const [low, high] = widened([...rows.flatMap((row) => row.measure), neutral], 0.03);
  const at = (value) => `${(100 * (value - low)) / (high - low)}%`;
  const ticks = linear([low, high], [0, 1]).ticks(4);
  const scale = html(
    "div.ticks",
    { "aria-hidden": "true" },
    ticks.map((tick) => html("span", { "--value": at(tick) }, plain(tick, 4))),
  );
  const segment = (name) => html(name === first ? "i.first" : "i", { "--c": colourOf(name) });
  const line = ({ rank, models, shapes, measure, saved }) =>
    html(
      shapes.length ? "tr.named" : "tr",
      html("td.number", `${rank}`),
      html(
        "td",
        html("div.segments", { role: "img", "aria-label": models.join(", ") }, models.map(segment)),
        shapes.length ? html("span.shape-name", shapes.join(", ")) : null,
      ),
      html("td", interval(measure, neutral, at)),
      html("td.amount.number", inDigits(measure)),
      html("td.number", percent(saved)),
    );
  const head = headings(
    ["#", "start → end of a text", [title, scale], "and its interval", "FLOPs saved"],
    [0, 0, 0, 1, 1],
  );
  const table = html("table.placements", head, html("tbody", rows.map(line)));
  return html("div.scroll", { tabindex: 0, role: "region", "aria-label": "Placements" }, table);
}

function inDigits(measure) {
  const [value, low, high] = measure.map((one) => one.toFixed(3));
  return [`${value} `, soft(`${low}–${high}`)];
}

function interval([value, low, high], neutral, at) {
  const ends = { "--neutral": at(neutral), "--value": at(value), "--low": at(low), "--high": at(high) };
  return html("div.interval", ends, html("i.rule"), html("i.span"), html("i.dot"));
}

function frontier(rows, title, neutral) {
  const named = rows.filter((row) => row.shapes.length);
  const ordered = [...rows].sort((a, b) => a.saved - b.saved || a.measure[0] - b.measure[0]);
  const span = widened([neutral, ...rows.map((row) => row.measure[0]), ...named.flatMap((row) => row.measure)]);
  const label = `Frontier of quality and cost: ${title} over the FLOPs saved.`;

  function draw(width) {
    const [height, apart] = [320, width < 560 ? 9 : 16];
    const box = [52, 26, width - 14, height - 44];
    const room = box[2] - apart * (named.length + 1);
    const x = linear(widened([0, ...rows.map((row) => row.saved)], 0.04), [box[0], room]);
    const y = linear(span, [box[3], box[1]]);
    const texts = { xText: (value) => percent(value, 0), yText: (value) => plain(value, 4) };
    const titles = { xTitle: "FLOPs saved, without the head", yTitle: title };
    const picture = canvasOf(width, height);
    const front = ordered.filter((row) => row.on_front).map((row) => `${x(row.saved)} ${y(row.measure[0])}`);
    picture.append(axes(x, y, box, { ...texts, ...titles }), svg("path.front", { d: `M${front.join("L")}` }));
    const taken = [];
    const marks = ordered.map((row) => {
      let left = x(row.saved);
      if (row.shapes.length) {
        taken.push(left);
        left += apart * taken.filter((other) => Math.abs(other - taken.at(-1)) < apart).length;
      }
      picture.append(...pointOf(row, left, y));
      return { x: left, y: y(row.measure[0]), lines: tellOf(row) };
    });
    return { picture, marks, height };
  }
  return chart(label, draw).frame;
}

// A named placement with its interval, any other as a dot, the first model alone as a larger one.
function pointOf({ rank, shapes, measure: [value, low, high] }, left, y) {
  if (!shapes.length)
    return [svg(rank === null ? "circle.alone" : "circle.other", { cx: left, cy: y(value), r: rank === null ? 6 : 3 })];
  const colour = shapeColour(shapes[0]);
  const error = svg("path.error", { d: `M${left} ${y(low)}V${y(high)}`, "--c": colour });
  return [error, shape(Math.max(0, PUBLISHED.indexOf(shapes[0])), left, y(value), colour)];
}

function tellOf({ rank, shapes, models, measure: [value, low, high], saved }) {
  const title = rank === null ? `${models[0]} alone` : `#${rank} ${shapes.join(", ")}`;
  return [
    title,
    models.join(" "),
    `${value.toFixed(3)} (${low.toFixed(3)}–${high.toFixed(3)})`,
    `${percent(saved)} saved`,
  ];
}
