// Numbers and units as text.

const PREFIXES = [
  [1e15, "P"],
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

const plain = (value, digits = 3) => String(Number(value.toPrecision(digits)));
const grouped = (value) => Math.round(value).toLocaleString("en-GB");
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

// 1.23 T, 45.6 k: three digits and a prefix.
function prefixed(value, unit = "") {
  const [size, prefix] = PREFIXES.find(([size]) => value >= size) ?? [1, ""];
  return `${plain(value / size)} ${prefix}${unit}`.trim();
}

function bytes(value) {
  const power = Math.min(4, Math.floor(Math.log10(Math.max(1, value)) / 3));
  return `${plain(value / 10 ** (3 * power))} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function seconds(value) {
  if (value === 0) return "0 s";
  const [size, unit] = [
    [1, "s"],
    [1e-3, "ms"],
    [1e-6, "µs"],
    [1e-9, "ns"],
  ].find(([size]) => value >= size) ?? [1e-9, "ns"];
  return `${plain(value / size)} ${unit}`;
}

const several = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
