// Operators: achieved rates under the measured roofs of the machine, and the table of their timings.

const CLOCKS = ["cold", "warm", "graph"];
const CLOCK_NAMES = { cold: "cold cache", warm: "warm cache", graph: "graph replay" };

function operatorsSection({ rows, ceilings }) {
  const timed = rows.filter((row) => CLOCKS.some((clock) => row.timings[clock]) || row.law_passed === false);
  if (!timed.length) return [html("p.note", "No operator was timed."), leftOut(rows)];
  const names = [...new Set(timed.map((row) => row.implementation))];
  const look = (name) => {
    const index = names.indexOf(name);
    return { index, colour: `var(--c${(index + Math.floor(index / SHAPES.length)) % 6})` }; // no two alike in both
  };
  const clocks = CLOCKS.filter((clock) => rows.some((row) => row.timings[clock]));
  const operators = [...new Set(timed.map((row) => row.operator))];
  const on = (one) => `${one.device} · ${one.dtype}`;
  const devices = [...new Set(timed.map(on))];
  const state = { device: devices[0], clock: clocks[0] ?? "cold", operator: "", only: null };
  const meant = (row) => on(row) === state.device && (!state.operator || row.operator === state.operator);
  const picked = () => timed.filter(meant);
  const roofs = () => ceilings.filter((roof) => on(roof) === state.device);

  const plot = chart("Roofline: FLOP per second over FLOP per byte, logarithmic.", (width) =>
    roofline(width, picked(), roofs(), state, look),
  );
  const body = html("div.scroll", { tabindex: 0, role: "region", "aria-label": "Timings" });
  const legend = html("ul.legend");
  const measured = caption();
  const update = () => {
    plot.redraw();
    measured.replaceChildren(...roofs().map(reached));
    body.replaceChildren(timings(picked(), state.clock));
    const here = new Set(picked().map((row) => row.implementation));
    legend.replaceChildren(...names.filter((name) => here.has(name)).map((name) => html("li", light(name))));
  };
  const light = (name) => {
    const lit = state.only === name;
    const attributes = {
      type: "button",
      "aria-pressed": `${lit}`,
      onclick: () => set("only", lit ? null : name, name),
    };
    return html("button.key", attributes, sign(look(name)), name);
  };
  const set = (key, value, focus) => {
    state[key] = value;
    update();
    if (focus) [...legend.querySelectorAll("button")].find((button) => button.textContent === focus)?.focus();
  };
  update();
  return [
    html(
      "div.bar-of-controls",
      choice(
        "On",
        devices.map((one) => [one, one]),
        state.device,
        (value) => set("device", value),
      ),
      choice("Operator", [["", "all"], ...operators.map((one) => [one, one])], "", (value) => set("operator", value)),
      clocks.length > 1 &&
        toggle(
          "Clock",
          clocks.map((one) => [one, CLOCK_NAMES[one]]),
          state.clock,
          (value) => set("clock", value),
        ),
    ),
    plot.frame,
    legend,
    measured,
    caption(
      "Hollow marks are peers and parts of an operator. Where the law check failed no speed is drawn. ",
      "Operators without FLOPs are in the table only.",
    ),
    body,
    leftOut(rows.filter((row) => !timed.includes(row))),
  ];
}

// What the machine was measured to reach, in words.
function reached({ bandwidth, product }) {
  const memory = bandwidth ? `memory ${prefixed(bandwidth, "B/s")}` : "memory not measured";
  return `Measured here: ${memory}, a large product ${product ? prefixed(product, "FLOP/s") : "not measured"}. `;
}

function leftOut(rows) {
  const reasons = new Set(rows.map((row) => `${row.implementation}, ${row.operator}: ${row.note ?? "not timed"}`));
  return disclosed(`${several(reasons.size, "implementation")} not timed`, [...reasons]);
}

function timings(rows, clock) {
  const share = (value) => (value === null ? "–" : percent(value, 0));
  const cells = (row) => {
    const timing = row.timings[clock];
    const law = row.law_passed === null ? "–" : row.law_passed ? "holds" : "fails";
    const fast = row.law_passed !== false;
    return [
      html("th", { scope: "row" }, row.operator, soft(` ${row.case}`)),
      html("td", row.implementation, row.role === "implementation" ? null : soft(` ${row.role}`)),
      html(
        "td.number",
        timing && fast
          ? [seconds(timing.median), soft(` ${seconds(timing.p20)}–${seconds(timing.p80)}`)]
          : soft(row.note ?? "–"),
      ),
      html("td.number", fast ? share(row.bandwidth_share) : "–"),
      html("td.number", fast ? share(row.rate_share) : "–"),
      html("td", { class: `law ${law}`, title: row.law }, law),
    ];
  };
  const titles = [
    "Operator and case",
    "Implementation",
    `Median, 20th–80th, ${CLOCK_NAMES[clock]}`,
    "Of bandwidth",
    "Of rate",
    "Law",
  ];
  const lines = rows.map((row) => html("tr", cells(row)));
  return html("table", headings(titles, [0, 0, 1, 1, 1, 0]), html("tbody", lines));
}
