// Elements. Text always becomes a text node: nothing of a result file is ever read as markup.

const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function fill(node, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

let numIds = 0;
const newId = (word) => `${word}-${++numIds}`;

// A labelled group of radio buttons that looks like one switch; calls back with the value chosen.
function toggle(label, options, chosen, onchange) {
  const name = newId("toggle");
  const buttons = options.map(([value, text]) =>
    html("label", {},
      html("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchange(value) }),
      html("span", {}, text)));
  return html("fieldset", { class: "toggle" }, html("legend", {}, label), buttons);
}

function choice(label, options, chosen, onchange) {
  const select = html("select", { onchange: () => onchange(select.value) },
    options.map(([value, text]) => html("option", { value, selected: value === chosen }, text)));
  return html("label", { class: "choice" }, html("span", {}, label), select);
}

const key = (colour, text, shape = "square") =>
  html("li", { class: `key ${shape}`, "--c": colour }, text);
