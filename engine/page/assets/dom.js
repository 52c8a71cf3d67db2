// Elements. Text always becomes a text node: nothing of a result file is ever read as markup.

// html("p.caption", {title: "…"}, "text"): tag and classes, attributes where there are any, children.
const html = (name, ...rest) => fill((tag) => document.createElement(tag), name, rest);
const svg = (name, ...rest) => fill((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag), name, rest);

function fill(create, name, rest) {
  const [tag, ...classes] = name.split(".");
  const node = create(tag);
  node.classList.add(...classes);
  const attributes = rest[0]?.constructor === Object ? rest.shift() : {};
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...rest.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const soft = (...text) => html("span.soft", ...text);
const caption = (...text) => html("p.caption", ...text);
// The head row of a table; columns of numbers stand to the right.
function headings(titles, areNumbers) {
  const cells = titles.map((title, i) => html(areNumbers[i] ? "th.number" : "th", { scope: "col" }, title));
  return html("thead", html("tr", cells));
}

// A list that opens on demand, none where there is nothing in it.
function disclosed(summary, items) {
  const lines = items.map((item) => html("li", item));
  return items.length ? html("details", html("summary", summary), html("ul", lines)) : null;
}

let numIds = 0;
const newId = (word) => `${word}-${++numIds}`;

// A labelled group of radio buttons that looks like one switch; calls back with the value chosen.
function toggle(label, options, chosen, onchange) {
  const name = newId("toggle");
  const buttons = options.map(([value, text]) =>
    html(
      "label",
      html("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchange(value) }),
      html("span", text),
    ),
  );
  return html("fieldset.toggle", html("legend", label), buttons);
}

function choice(label, options, chosen, onchange) {
  const select = html(
    "select",
    { onchange: () => onchange(select.value) },
    options.map(([value, text]) => html("option", { value, selected: value === chosen }, text)),
  );
  return html("label.choice", html("span", label), select);
}

const key = (colour, text, shape = "square") => html("li", { class: `key ${shape}`, "--c": colour }, text);
