// A profile: the sample, the figures of the run, its timeline and its phases.

// Shades of ink: colours are for models.
const SHADES = [85, 62, 46, 34, 25, 18, 12].map((share) => `color-mix(in oklab, var(--ink) ${share}%, var(--paper))`);

function profileSection(profile, colourOf) {
  const { request, models, ticks } = profile;
  const nfe = Object.entries(profile.nfe).map(([name, value]) => `${name} ${plain(value)}`).join(", ");
  const facts = [
    [prefixed(profile.tokens_per_second ?? 0), "tokens per second", seconds(profile.phases.total)],
    [plain(Object.values(profile.nfe).reduce((sum, one) => sum + one, 0), 4), "network calls per text (NFE)", nfe],
    [percent(profile.occupancy ?? 0), "tick occupancy", `up to ${several(profile.max_batch, "sequence")}`],
    profile.flops_share !== null && [percent(profile.flops_share), "of the measured FLOP/s (MFU)", `${prefixed(profile.flops_per_second ?? 0, "FLOP/s")} of ${prefixed(profile.ceiling_flops_per_second ?? 0, "FLOP/s")}`],
    profile.peak_bytes !== null && [bytes(profile.peak_bytes), "beyond the weights", profile.rss_peak_bytes === null ? "" : `process ${bytes(profile.rss_peak_bytes)}`],
    profile.logits_bytes_avoided !== null && [bytes(profile.logits_bytes_avoided), "of logits never stored", ""],
  ].filter(Boolean);
  return [
    trajectory(profile, colourOf),
    html("dl", { class: "facts" }, facts.map(([value, what, more]) => html("div", {}, html("dt", {}, what), html("dd", {}, value), html("dd", { class: "soft" }, more)))),
    html("h3", {}, "Ticks"),
    html("p", { class: "caption" }, `${several(ticks.count, "network call")}, each as high as it was full of sequences${ticks.merged > 1 ? `; a bar is the mean of ${ticks.merged}` : ""}.`),
    ticks.count ? timeline(profile, colourOf) : html("p", { class: "note" }, "This run made no network call."),
    html("h3", {}, "Where the time went"),
    phases(profile.phases),
    models.map((model, i) => blocks(model, profile.model_seconds[i], colourOf(model.name))),
    html("p", { class: "caption" }, Object.entries(request).map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ")),
  ];
}

function phases({ total, ...named }) {
  const parts = Object.entries(named).filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
  const sum = parts.reduce((all, [, value]) => all + value, 0);
  if (total > 1.005 * sum) parts.push(["unaccounted", total - sum]);
  const whole = Math.max(total, sum) || 1;
  const colour = (i) => SHADES[Math.min(i, SHADES.length - 1)];
  return html("div", { class: "phases" },
    html("div", { class: "stack", "aria-hidden": "true" }, parts.map(([, value], i) => html("i", { "--c": colour(i), "--share": value / whole }))),
    html("ul", { class: "legend" }, parts.map(([name, value], i) => html("li", { class: "key square", "--c": colour(i) }, html("span", {}, name.replaceAll("_", " ")), html("b", {}, seconds(value)), html("span", { class: "soft" }, percent(value / whole))))));
}

// Seconds of each block of a model as bars beside each other.
function blocks({ name, num_parameters: size }, { body, head, blocks: each }, colour) {
  const most = Math.max(...each, 1e-12);
  const bars = each.map((value, i) => html("i", { title: `block ${i}: ${seconds(value)}`, "--c": colour, "--share": value / most }));
  const spread = each.length ? `${several(each.length, "block")}, ${seconds(Math.min(...each))} to ${seconds(most)}` : "blocks not told apart";
  return html("div", { class: "blocks" },
    html("p", {}, html("b", {}, name), html("span", { class: "soft" }, ` ${prefixed(size)} parameters · body ${seconds(body)} · head ${seconds(head)} · ${spread}`)),
    html("div", { class: "bars", "aria-hidden": "true" }, bars));
}
