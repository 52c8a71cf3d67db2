// The roofline: achieved rates over arithmetic intensity, under what the machine was measured to reach.

const sign = ({ colour, index }) =>
  svg("svg.sign", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape(index, 0, 0, colour));

function roofline(width, rows, roofs, { clock, only }, look) {
  const height = 380;
  const box = [62, 24, width - 12, height - 44];
  const points = rows
    .filter((row) => row.timings[clock]?.median && row.flops && row.num_bytes && row.law_passed !== false)
    .map((row) => ({ row, intensity: row.flops / row.num_bytes, rate: row.flops / row.timings[clock].median }));
  const picture = canvasOf(width, height);
  if (!points.length) {
    picture.append(
      svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Nothing with FLOPs was timed here."),
    );
    return { picture, marks: [], height };
  }
  const knees = roofs.filter((roof) => roof.bandwidth && roof.product).map((roof) => roof.product / roof.bandwidth);
  const intensities = [...points.map((point) => point.intensity), ...knees];
  const rates = [...points.map((point) => point.rate), ...roofs.map((roof) => roof.product).filter(Boolean)];
  const [left, right] = [Math.min(...intensities) / 2, Math.max(...intensities) * 2.5];
  const x = logarithmic([left, right], [box[0], box[2]]);
  const y = logarithmic([Math.min(...rates) / 2.5, Math.max(...rates) * 2], [box[3], box[1]]);
  const texts = { xText: plain, yText: (value) => prefixed(value), xTitle: "FLOP per byte", yTitle: "FLOP/s" };
  picture.append(axes(x, y, box, { ...texts, yCount: 7, xCount: Math.max(3, Math.floor(width / 100)) }));
  for (const roof of roofs) picture.append(roofOf(roof, x, y, left, right, box));
  points.sort((a, b) => a.intensity - b.intensity);
  const marks = points.map(({ row, intensity, rate }) => {
    const { colour, index } = look(row.implementation);
    const hollow = row.role === "implementation" ? "" : ".hollow";
    const dimmed = only === null || only === row.implementation ? "" : ".dimmed";
    picture.append(shape(index, x(intensity), y(rate), colour, hollow + dimmed));
    return { x: x(intensity), y: y(rate), row, lines: achieved(row, row.timings[clock].median) };
  });
  return { picture, marks: marks.filter(({ row }) => only === null || only === row.implementation), height };
}

function achieved(row, time) {
  const rates = [prefixed(row.flops / time, "FLOP/s"), prefixed(row.num_bytes / time, "B/s")];
  return [`${row.operator} · ${row.implementation}`, row.case, seconds(time), rates.join(", ")];
}

// The lower of what the memory feeds and what the units multiply.
function roofOf({ bandwidth, product }, x, y, left, right, box) {
  const low = y.invert(box[3]);
  const parts = svg("g.roof");
  const from = bandwidth ? Math.max(left, low / bandwidth) : left;
  const knee = bandwidth && product ? product / bandwidth : bandwidth ? right : left;
  const line = [];
  if (bandwidth) line.push(`M${x(from)} ${y(bandwidth * from)}L${x(knee)} ${y(bandwidth * knee)}`);
  if (product) line.push(`M${x(Math.max(left, knee))} ${y(product)}H${x(right)}`);
  parts.append(svg("path", { d: line.join("") }));
  if (product) {
    const place = { x: x(right) - 4, y: y(product) - 7, "text-anchor": "end" };
    parts.append(svg("text", place, `product ${prefixed(product, "FLOP/s")}`));
  }
  if (bandwidth && box[2] > 520) {
    const rise = (Math.atan2(y(10 * bandwidth) - y(bandwidth), x(10) - x(1)) * 180) / Math.PI;
    const place = { transform: `translate(${x(from) + 12} ${y(bandwidth * from) - 16}) rotate(${rise})` };
    parts.append(svg("text", place, `memory ${prefixed(bandwidth, "B/s")}`));
  }
  return parts;
}
