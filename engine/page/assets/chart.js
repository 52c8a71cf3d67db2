// A chart that follows the width of the page, and whose marks tell about themselves under a pointer or by arrow keys.

const REACH = 36; // pixels between the pointer and a mark that it means

// draw(width) gives {picture: svg, marks: [{x, y, lines: [title, ...more]}]}; marks in the order of the arrow keys.
// across: marks are found by their x alone.
function chart(label, draw, { across = false } = {}) {
  const tip = html("div.tip", { role: "status" });
  const canvas = html("div.canvas", { "aria-hidden": "true" });
  const frame = html(
    "div.chart",
    {
      tabindex: 0,
      role: "group",
      "aria-roledescription": "chart",
      "aria-label": `${label} Arrow keys go from mark to mark.`,
    },
    canvas,
    tip,
  );
  let drawn = null,
    at = -1,
    width = 0,
    cursor = null;

  const point = (index) => {
    at = index;
    cursor?.remove();
    tip.replaceChildren();
    if (index < 0) return;
    const {
      x,
      y,
      lines: [title, ...more],
    } = drawn.marks[index];
    cursor = svg(
      "g.cursor",
      across ? svg("path", { d: `M${x} 0V${drawn.height}` }) : svg("circle", { cx: x, cy: y, r: 9 }),
    );
    drawn.picture.append(cursor);
    tip.append(html("b", title), ...more.map((line) => html("span", line)));
    const room = width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, x - tip.offsetWidth / 2))}px`;
    tip.style.top = `${across || y < tip.offsetHeight + 20 ? y + 16 : y - tip.offsetHeight - 14}px`;
  };
  const nearest = (event) => {
    const box = canvas.getBoundingClientRect();
    const left = event.clientX - box.left;
    const top = event.clientY - box.top;
    const distances = drawn.marks.map(({ x, y }) =>
      across ? Math.abs(x - left) + 1e-3 * Math.abs(y - top) : Math.hypot(x - left, y - top),
    );
    const best = distances.indexOf(Math.min(...distances));
    return distances[best] < REACH ? best : -1;
  };
  const redraw = () => {
    if (!frame.clientWidth || !frame.isConnected) return;
    width = frame.clientWidth;
    drawn = draw(width);
    point(-1);
    canvas.replaceChildren(drawn.picture);
  };
  for (const event of ["pointermove", "pointerdown"]) canvas.addEventListener(event, (e) => point(nearest(e)));
  canvas.addEventListener("pointerleave", () => point(-1));
  frame.addEventListener("blur", () => point(-1));
  frame.addEventListener("keydown", (event) => {
    const last = drawn.marks.length - 1;
    const to = { ArrowRight: Math.min(last, at + 1), ArrowLeft: Math.max(0, at - 1), Home: 0, End: last, Escape: -1 }[
      event.key
    ];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    point(to);
  });
  new ResizeObserver(() => frame.clientWidth !== width && redraw()).observe(frame);
  return { frame, redraw };
}

const canvasOf = (width, height) => svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });

// Grid lines and labels of both axes, for scales x and y over the box [left, top, right, bottom].
function axes(x, y, [left, top, right, bottom], { xText, yText, xTitle, yTitle, xCount, yCount = 5 }) {
  const count = xCount ?? Math.max(2, Math.floor((right - left) / 110));
  return svg(
    "g.axes",
    y
      .ticks(yCount)
      .map((value) => [
        svg("path", { d: `M${left} ${y(value)}H${right}` }),
        svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, yText(value)),
      ]),
    x
      .ticks(count)
      .map((value) => [
        svg("path", { d: `M${x(value)} ${top}V${bottom}`, class: "faint" }),
        svg("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, xText(value)),
      ]),
    svg("text", { x: right, y: bottom + 38, "text-anchor": "end", class: "title" }, xTitle),
    svg("text", { x: 0, y: 12, class: "title" }, yTitle),
  );
}

// Shapes that differ without their colour, around (x, y).
const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.3 * r}L${1.25 * r} ${0.9 * r}H${-1.25 * r}z`,
  (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0z`,
  (r) => `M0 ${1.3 * r}L${1.25 * r} ${-0.9 * r}H${-1.25 * r}z`,
  (r) => `M${-r} ${-r}L${r} ${r}M${r} ${-r}L${-r} ${r}`,
];

function shape(index, x, y, colour, kinds = "") {
  const number = index % SHAPES.length;
  const place = { d: SHAPES[number](5), transform: `translate(${x} ${y})`, "--c": colour };
  return svg(`path.shape.shape-${number}${kinds}`, place);
}
