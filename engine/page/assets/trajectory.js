// A sample while it unmasks. A masked token keeps the place of its text, so nothing moves when it appears.

const HOT = 8; // nats of surprise that are coloured fullest
const NEWLINE = /^\s*\n\s*$/;

function trajectory(profile, colourOf) {
  const shown = profile.samples.filter((sample) => sample.pieces?.length);
  if (!shown.length) return html("p.note", "No text: the models of this run have no tokenizer, or no sample was kept.");
  let [sample, tokens, done] = [shown[0], [], 0];

  const text = html("div.text.by-model", { role: "group" });
  const about = html("p.about", { role: "status" });
  const where = html("output.where");
  const strip = html("div.strip", { "aria-hidden": "true" });
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
    where.replaceChildren(
      html("b", `step ${step}`),
      ` of ${profile.num_steps}${who} · `,
      html("b", `${revealed}`),
      ` of ${several(tokens.length, "token")}`,
    );
  }

  function show(chosen) {
    sample = chosen;
    tokens = sample.pieces.map((_, i) => tokenOf(sample, i, nameOf, colourOf));
    text.replaceChildren(...tokens);
    text.setAttribute("aria-label", `Sample ${sample.index}. Arrow keys go from token to token.`);
    tokens[0].tabIndex = 0;
    strip.replaceChildren(stripOf(profile, sample, colourOf));
    tell(null);
    onstep(done);
  }

  function tell(i) {
    const hint = "Point at a token, or tab to the text and use the arrow keys.";
    about.replaceChildren(...(i === null ? [html("span", hint)] : described(sample, i, done, nameOf)));
  }

  const at = (event) => event.target.closest?.(".token")?.dataset.at;
  for (const event of ["pointerover", "focusin"])
    text.addEventListener(event, (e) => at(e) !== undefined && tell(Number(at(e))));
  text.addEventListener("pointerleave", () => tell(null));
  text.addEventListener(
    "click",
    (event) => at(event) !== undefined && control.go(Math.max(0, sample.reveal_step[at(event)] + 1)),
  );
  text.addEventListener("keydown", roam);

  const byModel = html(
    "ul.legend.models",
    profile.models.map(({ name }) => key(colourOf(name), name)),
  );
  const byHeat = html("p.legend.heat", "certain", html("i.ramp"), `${HOT} nats or more`);
  const colours = toggle(
    "Colour by",
    [
      ["model", "model"],
      ["logprob", "log-probability"],
    ],
    "model",
    (value) => {
      text.classList.toggle("by-model", value === "model");
      text.classList.toggle("by-logprob", value === "logprob");
    },
  );
  const samples = choice(
    "Sample",
    shown.map((one, i) => [String(i), `${one.index}`]),
    "0",
    (i) => show(shown[i]),
  );
  const figure = html(
    "div.trajectory",
    { onkeydown: control.onkeydown },
    html("div.bar-of-controls", samples, colours, byModel, byHeat),
    text,
    about,
    html("div.scrubber", strip, control.slider),
    html("div.bar-of-controls", control.buttons, where, control.speeds),
  );
  show(sample);
  control.go(0);
  return figure;
}

function tokenOf(sample, i, nameOf, colourOf) {
  const piece = sample.pieces[i];
  const reveal = sample.reveal_step[i];
  const isBreak = NEWLINE.test(piece);
  const [, lead, core] = isBreak ? [null, "", piece] : piece.match(/^(\s*)([^]*)$/);
  const kinds = [reveal < 0 && ".given", isBreak && ".newline", piece === "" && ".empty"].filter(Boolean).join("");
  const heat = reveal < 0 ? 0 : Math.min(1, -sample.logprobs[i] / HOT);
  const looks = { "--c": reveal < 0 ? null : colourOf(nameOf(reveal)), "--heat": `${(68 * heat).toFixed(1)}%` };
  return html(
    `span.token${kinds}`,
    { tabindex: -1, role: "button", "data-at": i, ...looks },
    html("span.ink", lead),
    html("span.bar", html("span.ink", core)),
  );
}

// What is known of token i after `done` steps; of a masked one its step, which was planned before the run.
function described(sample, i, done, nameOf) {
  const reveal = sample.reveal_step[i];
  const place = ` position ${i}`;
  if (reveal >= done) return [html("b", "masked"), `${place} · planned for step ${reveal + 1} · ${nameOf(reveal)}`];
  const word = html("b", sample.pieces[i] ? JSON.stringify(sample.pieces[i]) : "a part of the next character");
  if (reveal < 0) return [word, `${place} · given`];
  const logprob = sample.logprobs[i];
  const chance = Math.exp(logprob) < 0.001 ? Math.exp(logprob).toExponential(1) : percent(Math.exp(logprob));
  const drawn = `log-probability ${logprob.toFixed(2).replace("-", "−")} (${chance})`;
  return [word, `${place} · step ${reveal + 1} · ${nameOf(reveal)} · ${drawn}`];
}

// Arrow keys go from token to token, enter to the step of one; one of them at a time is reached by tab.
function roam(event) {
  if (event.key === "Enter") return event.target.click();
  const tokens = [...event.currentTarget.children];
  const from = tokens.indexOf(event.target);
  const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  const next = tokens[to] ?? tokens[from];
  tokens[from].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// How many tokens each step reveals, in the colour of its model, over bands of the schedule.
function stripOf({ num_steps: numSteps, step_models: who, models }, sample, colourOf) {
  const height = 40;
  const counts = new Array(numSteps).fill(0);
  for (const reveal of sample.reveal_step) if (reveal >= 0) counts[reveal] += 1;
  const most = Math.max(...counts, 1);
  const picture = svg("svg", { viewBox: `0 0 ${numSteps} ${height}`, preserveAspectRatio: "none" });
  for (let from = 0, to; from < numSteps; from = to) {
    for (to = from; to < numSteps && who[to] === who[from]; to += 1);
    const colour = colourOf(models[who[from]].name);
    picture.append(svg("rect.band", { x: from, width: to - from, height, "--c": colour }));
    const bars = counts
      .slice(from, to)
      .map((count, i) =>
        count ? `M${from + i + 0.1} ${height}v${-(count / most) * (height - 5)}h0.8V${height}z` : "",
      );
    picture.append(svg("path.fill", { d: bars.join(""), "--c": colour }));
  }
  return picture;
}
