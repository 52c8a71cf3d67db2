// The page: a section for each result file.

const SECTIONS = {
  profile: ["A run", profileSection],
  operators: ["Operators", operatorsSection],
  peers: ["Beside others", peersSection],
  search: ["Schedules", searchSection],
  importance: ["Importance of steps", importanceSection],
};

const results = JSON.parse(document.getElementById("data").textContent);

// A model has one colour on the whole page.
const modelNames = [...new Set(results.flatMap((result) => (result.models ?? []).map((model) => model.name ?? model)))];
const colourOf = (name) => `var(--c${modelNames.indexOf(name) % 6})`;

function sectionOf(result, id) {
  const [title, draw] = SECTIONS[result.kind];
  return html(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    html(
      "h2",
      { id: `${id}-title` },
      title,
      result.partial ? html("span.partial", "partial: not everything asked for is here") : null,
    ),
    html(
      "p.source",
      [result.file, ...originOf(result.about)].map((text) => html("span", text)),
    ),
    result.about.notes.length
      ? html(
          "ul.note",
          result.about.notes.map((text) => html("li", text)),
        )
      : null,
    draw(result, colourOf),
    methodOf(result.about),
  );
}

function originOf({ machine, commit, date }) {
  const on = machine?.gpu ?? machine?.cpu;
  return [
    on,
    machine?.threads && several(Number(machine.threads), "thread"),
    commit && `commit ${commit.slice(0, 9)}${commit.endsWith("+") && commit.length > 9 ? "+" : ""}`,
    date?.slice(0, 10),
  ].filter(Boolean);
}

function methodOf({ command, machine, versions }) {
  if (!command && !machine && !versions) return null;
  const pairs = Object.entries({ ...machine, ...versions });
  return html(
    "details.method",
    html("summary", "How it was measured"),
    command ? html("pre", { tabindex: 0 }, command.join(" ")) : null,
    html(
      "dl",
      pairs.map(([name, value]) => html("div", html("dt", name), html("dd", value))),
    ),
  );
}

const named = results.map((result, i) => [result, `result-${i}`]);
document.querySelector("main").replaceChildren(...named.map(([result, id]) => sectionOf(result, id)));
if (named.length > 1) {
  document.querySelector("nav").append(
    html(
      "ul",
      named.map(([result, id]) => html("li", html("a", { href: `#${id}` }, SECTIONS[result.kind][0]))),
    ),
  );
}
