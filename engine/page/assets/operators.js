// Operators: achieved rates under the measured roofs of the machine, and the table of their timings.

const CLOCKS = ["cold", "warm", "graph"];
const CLOCK_NAMES = { cold: "cold cache", warm: "warm cache", graph: "graph replay" };

function operatorsSection({ rows, ceilings }) {
  const timed = rows.filter((row) => CLOCKS.some((clock) => row.timings[clock]) || row.law_passed === false);
  if (!timed.length) return [html("p", { class: "note" }, "No operator was timed."), leftOut(rows)];
  const names = [...new Set(timed.map((row) => row.implementation))];
  const look = (name) => {
    const index = names.indexOf(name);
    return { index, colour: `var(--c${(index + Math.floor(index / SHAPES.length)) % 6})` }; // no two alike in both
  };
  const devices = [...new Set(timed.map((row) => `${row.device} · ${row.dtype}`))];
  const clocks = CLOCKS.filter((clock) => rows.some((row) => row.timings[clock]));
  const operators = [...new Set(timed.map((row) => row.operator))];
  const state = { device: devices[0], clock: clocks[0] ?? "cold", operator: "", only: null };
  const picked = () => timed.filter((row) => `${row.device} · ${row.dtype}` === state.device && (!state.operator || row.operator === state.operator));
  const roofs = () => ceilings.filter((roof) => `${roof.device} · ${roof.dtype}` === state.device);

  const plot = chart("Roofline: FLOP per second over FLOP per byte, logarithmic.", (width) => roofline(width, picked(), roofs(), state, look));
  const body = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Timings" });
  const legend = html("ul", { class: "legend" });
  const measured = html("p", { class: "caption" });
  const update = () => {
    plot.redraw();
    measured.replaceChildren(roofs().map(({ bandwidth, product }) => `Measured here: ${[bandwidth && `memory ${prefixed(bandwidth, "B/s")}`, product && `a large product ${prefixed(product, "FLOP/s")}`].filter(Boolean).join(", ")}.`).join(" "));
    body.replaceChildren(timings(picked(), state.clock));
    const here = new Set(picked().map((row) => row.implementation));
    legend.replaceChildren(...names.filter((name) => here.has(name)).map((name) => html("li", {},
      html("button", { type: "button", class: "key", "aria-pressed": String(state.only === name), onclick: () => set("only", state.only === name ? null : name, name) }, sign(look(name)), name))));
  };
  const set = (key, value, focus) => {
    state[key] = value;
    update();
    if (focus) [...legend.querySelectorAll("button")].find((button) => button.textContent === focus)?.focus();
  };
  update();
  return [
    html("div", { class: "bar-of-controls" },
      choice("On", devices.map((one) => [one, one]), state.device, (value) => set("device", value)),
      choice("Operator", [["", "all"], ...operators.map((one) => [one, one])], "", (value) => set("operator", value)),
      clocks.length > 1 && toggle("Clock", clocks.map((one) => [one, CLOCK_NAMES[one]]), state.clock, (value) => set("clock", value))),
    plot.frame, legend, measured,
    html("p", { class: "caption" }, "Hollow marks are peers and parts of an operator. Where the law check failed no speed is drawn. Operators without FLOPs are in the table only."),
    body, leftOut(rows.filter((row) => !timed.includes(row))),
  ];
}

function leftOut(rows) {
  const reasons = new Set(rows.map((row) => `${row.implementation}, ${row.operator}: ${row.note ?? "not timed"}`));
  return reasons.size ? html("details", {}, html("summary", {}, `${several(reasons.size, "implementation")} not timed`), html("ul", {}, [...reasons].map((reason) => html("li", {}, reason)))) : null;
}

const sign = ({ colour, index }) => svg("svg", { viewBox: "-8 -8 16 16", class: "sign", "aria-hidden": "true" }, shape(index, 0, 0, colour));

function roofline(width, rows, roofs, { clock, only }, look) {
  const height = 380, box = [62, 24, width - 12, height - 44];
  const points = rows.filter((row) => row.timings[clock]?.median && row.flops && row.num_bytes && row.law_passed !== false)
    .map((row) => ({ row, intensity: row.flops / row.num_bytes, rate: row.flops / row.timings[clock].median }));
  const picture = canvasOf(width, height);
  if (!points.length) {
    picture.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Nothing with FLOPs was timed here."));
    return { picture, marks: [], height };
  }
  const knees = roofs.filter((roof) => roof.bandwidth && roof.product).map((roof) => roof.product / roof.bandwidth);
  const intensities = [...points.map((point) => point.intensity), ...knees];
  const rates = [...points.map((point) => point.rate), ...roofs.map((roof) => roof.product).filter(Boolean)];
  const x = logarithmic([Math.min(...intensities) / 2, Math.max(...intensities) * 2.5], [box[0], box[2]]);
  const y = logarithmic([Math.min(...rates) / 2.5, Math.max(...rates) * 2], [box[3], box[1]]);
  picture.append(axes(x, y, box, {
    xText: plain, yText: (value) => prefixed(value), xTitle: "FLOP per byte", yTitle: "FLOP/s", yCount: 7, xCount: Math.max(3, Math.floor(width / 100)),
  }));
  const [left, right] = [Math.min(...intensities) / 2, Math.max(...intensities) * 2.5];
  for (const roof of roofs) picture.append(roofOf(roof, x, y, left, right, box));
  points.sort((a, b) => a.intensity - b.intensity);
  const marks = points.map(({ row, intensity, rate }) => {
    const { colour, index } = look(row.implementation), hollow = row.role !== "implementation";
    const dimmed = only !== null && only !== row.implementation;
    picture.append(shape(index, x(intensity), y(rate), colour, { class: `shape shape-${index % SHAPES.length}${hollow ? " hollow" : ""}${dimmed ? " dimmed" : ""}` }));
    return { x: x(intensity), y: y(rate), row, lines: [`${row.operator} · ${row.implementation}`, row.case, `${seconds(row.timings[clock].median)}, ${prefixed(rate, "FLOP/s")}`, `${prefixed(row.num_bytes / row.timings[clock].median, "B/s")}`] };
  });
  return { picture, marks: marks.filter(({ row }) => only === null || only === row.implementation), height };
}

// The lower of what the memory feeds and what the units multiply.
function roofOf({ bandwidth, product }, x, y, left, right, box) {
  const low = y.invert(box[3]), parts = svg("g", { class: "roof" });
  const from = bandwidth ? Math.max(left, low / bandwidth) : left;
  const knee = bandwidth && product ? product / bandwidth : bandwidth ? right : left;
  const line = [];
  if (bandwidth) line.push(`M${x(from)} ${y(bandwidth * from)}L${x(knee)} ${y(bandwidth * knee)}`);
  if (product) line.push(`M${x(Math.max(left, knee))} ${y(product)}H${x(right)}`);
  parts.append(svg("path", { d: line.join("") }));
  if (product) parts.append(svg("text", { x: x(right) - 4, y: y(product) - 7, "text-anchor": "end" }, `product ${prefixed(product, "FLOP/s")}`));
  if (bandwidth && box[2] > 520) {
    const rise = (Math.atan2(y(10 * bandwidth) - y(bandwidth), x(10) - x(1)) * 180) / Math.PI;
    parts.append(svg("text", { transform: `translate(${x(from) + 12} ${y(bandwidth * from) - 16}) rotate(${rise})` }, `memory ${prefixed(bandwidth, "B/s")}`));
  }
  return parts;
}

function timings(rows, clock) {
  const share = (value) => (value === null ? "–" : percent(value, 0));
  const cells = (row) => {
    const timing = row.timings[clock];
    const law = row.law_passed === null ? "–" : row.law_passed ? "holds" : "fails";
    const fast = row.law_passed !== false;
    return [
      html("th", { scope: "row" }, row.operator, html("span", { class: "soft" }, ` ${row.case}`)),
      html("td", {}, row.implementation, row.role === "implementation" ? null : html("span", { class: "soft" }, ` ${row.role}`)),
      html("td", { class: "number" }, timing && fast ? [seconds(timing.median), html("span", { class: "soft" }, ` ${seconds(timing.p20)}–${seconds(timing.p80)}`)] : html("span", { class: "soft" }, row.note ?? "–")),
      html("td", { class: "number" }, fast ? share(row.bandwidth_share) : "–"),
      html("td", { class: "number" }, fast ? share(row.rate_share) : "–"),
      html("td", { class: `law ${law}`, title: row.law }, law),
    ];
  };
  const titles = ["Operator and case", "Implementation", `Median, 20th–80th, ${CLOCK_NAMES[clock]}`, "Of bandwidth", "Of rate", "Law"];
  const isNumber = (title) => /^(Median|Of)/.test(title);
  return html("table", {}, html("thead", {}, html("tr", {}, titles.map((title) => html("th", { scope: "col", class: isNumber(title) && "number" }, title)))),
    html("tbody", {}, rows.map((row) => html("tr", {}, cells(row)))));
}
