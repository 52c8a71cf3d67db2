// A sample while it unmasks. A masked token keeps the place of its text, so nothing moves when it appears.

const HOT = 8; // nats of surprise that are coloured fullest
const NEWLINE = /^\s*\n\s*$/;

function trajectory(profile, colourOf) {
  const shown = profile.samples.filter((sample) => sample.pieces?.length);
  if (!shown.length) return html("p", { class: "note" }, "No text: the models of this run have no tokenizer, or no sample was kept.");
  let sample = shown[0], tokens = [], done = 0;

  const text = html("div", { class: "text by-model", role: "group" });
  const about = html("p", { class: "about", role: "status" });
  const where = html("output", { class: "where" });
  const strip = html("div", { class: "strip", "aria-hidden": "true" });
  const control = player(profile.num_steps, onstep);
  const nameOf = (step) => profile.models[profile.step_models[step]].name;

  function onstep(step) {
    done = step;
    tokens.forEach((token, i) => {
      const reveal = sample.reveal_step[i];
      token.classList.toggle("masked", reveal >= step);
      token.classList.toggle("fresh", reveal >= 0 && reveal === step - 1 && step < profile.num_steps);
    });
    const revealed = sample.reveal_step.filter((reveal) => reveal < step).length;
    const who = step ? ` · ${nameOf(step - 1)}` : "";
    where.replaceChildren(html("b", {}, `step ${step}`), ` of ${profile.num_steps}${who} · `, html("b", {}, `${revealed}`), ` of ${several(tokens.length, "token")}`);
  }

  function show(chosen) {
    sample = chosen;
    tokens = sample.pieces.map(token);
    text.replaceChildren(...tokens);
    text.setAttribute("aria-label", `Sample ${sample.index}. Arrow keys go from token to token.`);
    tokens[0].tabIndex = 0;
    strip.replaceChildren(stripOf(profile, sample, colourOf));
    tell(null);
    onstep(done);
  }

  function token(piece, i) {
    const reveal = sample.reveal_step[i];
    const [, lead, core] = NEWLINE.test(piece) ? [null, "", piece] : piece.match(/^(\s*)([^]*)$/);
    const heat = reveal < 0 ? 0 : Math.min(1, -sample.logprobs[i] / HOT);
    return html("span", {
      class: `token${reveal < 0 ? " given" : ""}${NEWLINE.test(piece) ? " newline" : ""}${piece ? "" : " empty"}`, tabindex: -1, role: "button", "data-at": i,
      "--c": reveal < 0 ? null : colourOf(nameOf(reveal)), "--heat": `${(68 * heat).toFixed(1)}%`,
    }, html("span", { class: "ink" }, lead), html("span", { class: "bar" }, html("span", { class: "ink" }, core)));
  }

  function tell(i) {
    if (i === null) return about.replaceChildren(html("span", { class: "hint" }, "Point at a token, or tab to the text and use the arrow keys."));
    const reveal = sample.reveal_step[i], masked = reveal >= done;
    const word = masked ? "masked" : sample.pieces[i] ? JSON.stringify(sample.pieces[i]) : "a part of the next character";
    if (reveal < 0) return about.replaceChildren(html("b", {}, word), ` position ${i} · given`);
    const p = Math.exp(sample.logprobs[i]);
    const drawn = ` · log-probability ${sample.logprobs[i].toFixed(2)} (${p < 0.001 ? p.toExponential(1) : percent(p)})`;
    const when = masked ? `planned for step ${reveal + 1}` : `step ${reveal + 1}`;
    about.replaceChildren(html("b", {}, word), ` position ${i} · ${when} · ${nameOf(reveal)}${masked ? "" : drawn}`);
  }

  const at = (event) => event.target.closest?.(".token")?.dataset.at;
  for (const event of ["pointerover", "focusin"]) text.addEventListener(event, (e) => at(e) !== undefined && tell(Number(at(e))));
  text.addEventListener("pointerleave", () => tell(null));
  text.addEventListener("click", (event) => at(event) !== undefined && control.go(Math.max(0, sample.reveal_step[at(event)] + 1)));
  text.addEventListener("keydown", (event) => {
    const from = Number(at(event)), last = tokens.length - 1;
    const to = { ArrowRight: Math.min(last, from + 1), ArrowLeft: Math.max(0, from - 1), Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    tokens[from].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  });

  const byModel = html("ul", { class: "legend models" }, profile.models.map(({ name }) => key(colourOf(name), name)));
  const byHeat = html("p", { class: "legend heat" }, "certain", html("i", { class: "ramp" }), `${HOT} nats or more`);
  const colours = toggle("Colour by", [["model", "model"], ["logprob", "log-probability"]], "model", (value) => {
    text.classList.toggle("by-model", value === "model");
    text.classList.toggle("by-logprob", value === "logprob");
  });
  const samples = choice("Sample", shown.map((one, i) => [String(i), `${one.index}`]), "0", (i) => show(shown[i]));
  const figure = html("div", { class: "trajectory", onkeydown: control.onkeydown },
    html("div", { class: "bar-of-controls" }, samples, colours, byModel, byHeat),
    text, about,
    html("div", { class: "scrubber" }, strip, control.slider),
    html("div", { class: "bar-of-controls" }, control.buttons, where, control.speeds));
  show(sample);
  control.go(0);
  return figure;
}

// How many tokens each step reveals, in the colour of its model, over bands of the schedule.
function stripOf({ num_steps: numSteps, step_models: who, models }, sample, colourOf) {
  const height = 40, counts = new Array(numSteps).fill(0);
  for (const reveal of sample.reveal_step) if (reveal >= 0) counts[reveal] += 1;
  const most = Math.max(...counts, 1);
  const picture = svg("svg", { viewBox: `0 0 ${numSteps} ${height}`, preserveAspectRatio: "none" });
  for (let from = 0, to; from < numSteps; from = to) {
    for (to = from; to < numSteps && who[to] === who[from]; to += 1);
    const colour = colourOf(models[who[from]].name);
    picture.append(svg("rect", { class: "band", x: from, width: to - from, height, "--c": colour }));
    const bars = counts.slice(from, to).map((count, i) => (count ? `M${from + i + 0.1} ${height}v${-(count / most) * (height - 5)}h0.8V${height}z` : ""));
    picture.append(svg("path", { class: "fill", d: bars.join(""), "--c": colour }));
  }
  return picture;
}
