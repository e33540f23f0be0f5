const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const ink = "currentColor"; // of the page: charts follow light, dark and print by themselves
const axis = { labelColor: ink, titleColor: ink, domainColor: ink, domainOpacity: 0.4, tickColor: ink, tickOpacity: 0.4,
  gridColor: ink, gridOpacity: 0.12, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
const config = { background: null, font: "system-ui, sans-serif", axis, view: { stroke: null }, rule: { color: ink },
  legend: { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12 }, title: { color: ink } };

const views = new Map(); // element -> its chart
for (const [id, spec] of Object.entries(specs)) {
  const place = document.getElementById(id);
  vegaEmbed(place, spec, { actions: false, renderer: "svg", config, tooltip: { theme: dark ? "dark" : "light" } })
    .then(({ view }) => views.set(place, view));
}

/* The number that a cell stands for, or its text. */
function content(cell) {
  const text = cell.textContent.trim();
  const number = cell.dataset.value ?? text.match(/^\(?([+-]?\d[\d,]*\.?\d*(e[+-]?\d+)?)(?![\w.])/i)?.[1].replaceAll(",", "");
  return number === undefined ? text : Number(number);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b);
}

function sortBy(head) {
  const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
  const body = head.closest("table").tBodies[0];
  const rows = [...body.rows].sort((a, b) => compare(content(a.cells[column]), content(b.cells[column])) * (up ? 1 : -1));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}

/* A spreadsheet must take no text for a formula. */
function csvCell(text) {
  const formula = new RegExp("^(?:" + csvRules.formula + ")"), number = new RegExp("^(?:" + csvRules.number + ")$", "i");
  const safe = formula.test(text) && !number.test(text) ? "'" + text : text;
  return /[",\r\n]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
}

function csvOf(table) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const withError = heads.map((_, column) => rows.some((row) => row.cells[column].dataset.error !== undefined));
  const line = (pairs) => pairs.flatMap(([text, error], column) => (withError[column] ? [text, error] : [text])).map(csvCell).join(",");
  const names = heads.map((head) => [head.textContent.trim(), head.textContent.trim() + ", standard error"]);
  const cells = rows.map((row) => [...row.cells].map((c) => [c.dataset.value ?? c.textContent.trim(), c.dataset.error ?? ""]));
  return [names, ...cells].map(line).join("\r\n") + "\r\n";
}

function download(table) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csvOf(table)], { type: "text/csv" }));
  link.download = table.dataset.name + ".csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const button of document.querySelectorAll("thead button")) button.onclick = () => sortBy(button.parentElement);
for (const button of document.querySelectorAll("button.download")) {
  button.onclick = () => download(button.parentElement.querySelector("table"));
}

/* On paper a chart is as wide as its place there, so that its letters keep their size; what is folded is shown. */
const PAPER = 680, GAP = 32; // A4 without its margins, in CSS pixels
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open]):not(.kept)")];
  for (const fold of opened) fold.open = true;
  for (const [place, view] of views) view.width(place.closest(".panels, .split") ? (PAPER - GAP) / 2 : PAPER).run();
});
addEventListener("afterprint", () => {
  for (const fold of opened) fold.open = false;
  dispatchEvent(new Event("resize")); // charts take the width of their places again
});
