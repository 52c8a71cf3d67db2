// Peers: tokens per second of whole runs as bars, with the spread of their rounds.

function peersSection({ rows, skipped }) {
  const workloads = [...new Set(rows.map((row) => row.workload))];
  return [
    rows.length ? null : html("p", { class: "note" }, "No run was timed."),
    workloads.map((name) => workload(name, rows.filter((row) => row.workload === name))),
    skipped.length ? html("details", {}, html("summary", {}, `${several(skipped.length, "comparison")} left out`),
      html("ul", {}, skipped.map(({ peer, workload: name, reason }) => html("li", {}, `${peer}, ${name}: ${reason}`)))) : null,
  ];
}

function workload(name, rows) {
  const span = (row) => {
    const per = row.tokens_per_second * row.seconds.median; // tokens, as the bar's own rate counts them
    return [per / row.seconds.p80, per / row.seconds.p20];
  };
  const most = 1.04 * Math.max(...rows.map((row) => Math.max(row.tokens_per_second, span(row)[1])));
  const sizes = rows[0];
  const about = [sizes.batch && `batch ${sizes.batch}`, sizes.length && `${sizes.length} tokens`, sizes.num_steps && `${sizes.num_steps} steps`, sizes.device];
  const sorted = [...rows].sort((a, b) => b.tokens_per_second - a.tokens_per_second);
  return html("section", { class: "workload" },
    html("h3", {}, name, html("span", { class: "soft" }, ` ${about.filter(Boolean).join(" · ")}`)),
    html("table", { class: "bars-table" },
      html("thead", {}, html("tr", {}, ["Sampler", "Tokens per second", "Time, times ours"].map((title, i) => html("th", { scope: "col", class: i === 2 && "number" }, title)))),
      html("tbody", {}, sorted.map((row) => {
        const [low, high] = span(row), at = (value) => `${(100 * value) / most}%`;
        return html("tr", { class: row.role },
          html("th", { scope: "row" }, row.peer, html("span", { class: "soft" }, ` ${row.dtype}`)),
          html("td", {},
            html("div", { class: "track", "--value": at(row.tokens_per_second), "--low": at(low), "--high": at(high), title: `20th to 80th percentile of ${several(row.num_runs, "round")}: ${prefixed(low)} to ${prefixed(high)}` }, html("i", { class: "value" }), html("i", { class: "whisker" })),
            html("span", { class: "amount" }, html("b", {}, prefixed(row.tokens_per_second)), row.tokens_per_second_std === null ? null : html("span", { class: "soft" }, ` ± ${plain(row.tokens_per_second_std, 2)}`), row.law_passed === false ? html("span", { class: "law fails" }, " law check fails") : null, row.note ? html("span", { class: "soft" }, ` ${row.note}`) : null)),
          html("td", { class: "number" }, ratioOf(row)));
      }))));
}

function ratioOf({ role, ratio, ratio_low: low, ratio_high: high }) {
  if (role === "ours" || ratio === null) return null;
  const between = low === null || high === null ? null : html("span", { class: "soft" }, ` ${plain(low)}–${plain(high)}`);
  return [html("b", {}, `${plain(ratio)} ×`), between];
}
