// A profile: the sample, the figures of the run, its timeline and its phases.

// Shades of ink: colours are for models.
const SHADES = [85, 62, 46, 34, 25, 18, 12].map((share) => `color-mix(in oklab, var(--ink) ${share}%, var(--paper))`);

function profileSection(profile, colourOf) {
  const { request, models, ticks } = profile;
  return [
    trajectory(profile, colourOf),
    figures(profile),
    html("h3", "Ticks"),
    caption(
      `${several(ticks.count, "network call")}, each as high as it was full of sequences.`,
      ticks.merged > 1 ? ` A bar is the mean of ${ticks.merged}.` : "",
    ),
    ticks.count ? timeline(profile, colourOf) : html("p.note", "This run made no network call."),
    html("h3", "Where the time went"),
    phases(profile.phases),
    models.map((model, i) => blocks(model, profile.model_seconds[i], colourOf(model.name))),
    caption(Object.entries(request).map(asked).join(" · ")),
  ];
}

const asked = ([name, value]) =>
  `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`;

function figures(profile) {
  const known = (value) => value !== null;
  const nfe = Object.entries(profile.nfe);
  const calls = nfe.reduce((sum, [, value]) => sum + value, 0);
  const rates = [profile.flops_per_second, profile.ceiling_flops_per_second].filter(known);
  const perRate = rates.map((rate) => prefixed(rate, "FLOP/s")).join(" of ");
  const resident = known(profile.rss_peak_bytes) ? `process ${bytes(profile.rss_peak_bytes)}` : "";
  const found = [
    [profile.tokens_per_second, prefixed, "tokens per second", seconds(profile.phases.total)],
    [
      calls,
      (value) => plain(value, 4),
      "network calls per text (NFE)",
      nfe.map(([name, n]) => `${name} ${plain(n)}`).join(", "),
    ],
    [profile.occupancy, percent, "tick occupancy", `up to ${several(profile.max_batch, "sequence")}`],
    [profile.flops_share, percent, "of the measured FLOP/s (MFU)", perRate],
    [profile.peak_bytes, bytes, "beyond the weights", resident],
    [profile.logits_bytes_avoided, bytes, "of logits never stored", ""],
  ];
  const figure = ([value, words, what, more]) =>
    html("div", html("dt", what), html("dd", words(value)), html("dd.soft", more));
  return html("dl.facts", found.filter(([value]) => known(value)).map(figure));
}

function phases({ total, ...named }) {
  const parts = Object.entries(named)
    .filter(([, value]) => value > 0)
    .sort((a, b) => b[1] - a[1]);
  const sum = parts.reduce((all, [, value]) => all + value, 0);
  if (total > 1.005 * sum) parts.push(["unaccounted", total - sum]);
  const whole = Math.max(total, sum) || 1;
  const colour = (i) => SHADES[Math.min(i, SHADES.length - 1)];
  return html(
    "div.phases",
    html(
      "div.stack",
      { "aria-hidden": "true" },
      parts.map(([, value], i) => html("i", { "--c": colour(i), "--share": value / whole })),
    ),
    html(
      "ul.legend",
      parts.map(([name, value], i) =>
        html(
          "li.key.square",
          { "--c": colour(i) },
          html("span", name.replaceAll("_", " ")),
          html("b", seconds(value)),
          soft(percent(value / whole)),
        ),
      ),
    ),
  );
}

// Seconds of each block of a model as bars beside each other.
function blocks({ name, num_parameters: size }, { body, head, blocks: each }, colour) {
  const most = Math.max(...each, 1e-12);
  const bars = each.map((value, i) =>
    html("i", { title: `block ${i}: ${seconds(value)}`, "--c": colour, "--share": value / most }),
  );
  const spread = each.length
    ? `${several(each.length, "block")}, ${seconds(Math.min(...each))} to ${seconds(most)}`
    : "blocks not told apart";
  return html(
    "div.blocks",
    html(
      "p",
      html("b", name),
      soft(` ${prefixed(size)} parameters · body ${seconds(body)} · head ${seconds(head)} · ${spread}`),
    ),
    html("div.bars", { "aria-hidden": "true" }, bars),
  );
}
