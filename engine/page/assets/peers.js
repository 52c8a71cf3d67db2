// Peers: tokens per second of whole runs as bars, with the spread of their rounds.

function peersSection({ rows, skipped }) {
  const workloads = [...new Set(rows.map((row) => row.workload))];
  return [
    rows.length ? null : html("p.note", "No run was timed."),
    workloads.map((name) => {
      const mine = rows.filter((row) => row.workload === name);
      return workload(name, mine);
    }),
    disclosed(
      `${several(skipped.length, "comparison")} left out`,
      skipped.map(({ peer, workload: name, reason }) => `${peer}, ${name}: ${reason}`),
    ),
  ];
}

function workload(name, rows) {
  const most = 1.04 * Math.max(...rows.flatMap((row) => [row.tokens_per_second, ...spread(row)]));
  const { batch, length, num_steps: numSteps, device } = rows[0];
  const about = [batch && `batch ${batch}`, length && `${length} tokens`, numSteps && `${numSteps} steps`, device];
  const sorted = [...rows].sort((a, b) => b.tokens_per_second - a.tokens_per_second);
  const lines = sorted.map((row) =>
    html(
      `tr.${row.role}`,
      html("th", { scope: "row" }, row.peer, soft(` ${row.dtype}`)),
      html("td", bar(row, most), amount(row)),
      html("td.number", ratioOf(row)),
    ),
  );
  const head = headings(["Sampler", "Tokens per second", "Time, times ours"], [0, 0, 1]);
  return html(
    "section.workload",
    html("h3", name, soft(` ${about.filter(Boolean).join(" · ")}`)),
    html("table.bars-table", head, html("tbody", lines)),
  );
}

// Tokens per second of the slower and the quicker rounds.
function spread({ tokens_per_second: rate, seconds: { median, p20, p80 } }) {
  return [(rate * median) / p80, (rate * median) / p20];
}

function bar(row, most) {
  const at = (value) => `${(100 * value) / most}%`;
  const [low, high] = spread(row);
  const ends = { "--value": at(row.tokens_per_second), "--low": at(low), "--high": at(high) };
  const title = `20th to 80th percentile of ${several(row.num_runs, "round")}`;
  return html("div.track", { ...ends, title }, html("i.value"), html("i.whisker"));
}

function amount(row) {
  return html(
    "span.amount",
    html("b", prefixed(row.tokens_per_second)),
    row.tokens_per_second_std === null ? null : soft(` ± ${plain(row.tokens_per_second_std, 2)}`),
    row.law_passed === false ? html("span.law.fails", " law check fails") : null,
    row.note ? soft(` ${row.note}`) : null,
  );
}

function ratioOf({ role, ratio, ratio_low: low, ratio_high: high }) {
  if (role === "ours" || ratio === null) return null;
  const between = low === null || high === null ? null : soft(` ${plain(low)}–${plain(high)}`);
  return [html("b", `${plain(ratio)} ×`), between];
}
