/* Texts: elements that hold them as text alone, numbers and names, and where a reply begins to repeat itself. */
function find(id) { return document.getElementById(id); }

/* An element; strings among its children become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

let digits = 3; // after the point; the server says it

function onGrid(k) { return Number(k.toFixed(digits)) + 0; }

function plain(k) { return String(onGrid(k)); }

/* As strength_names.strength_name: sorted, without those that are 0, and the base's name if all are. */
function modelName(base, strengths) {
  const parts = Object.keys(strengths).sort().filter((name) => onGrid(strengths[name]));
  return parts.map((name) => name + "@" + strengths[name].toFixed(digits).replace(/\.?0+$/, "")).join("+") || base;
}

/* Strengths as a request carries them. */
function withoutZeros(strengths) {
  return Object.fromEntries(Object.entries(strengths).filter(([, k]) => onGrid(k)));
}

function inWords(error) {
  return error instanceof ServerError ? error.message : "The page met something unexpected: " + error;
}

/* The rule of looping.py: words, and the share of their 4-grams that stood in the text before. */
const LOOPING = 0.2, SPAN = 4;
const ALONE = "\\u3040-\\u30ff\\u3400-\\u9fff\\uac00-\\ud7af";
const WORD = new RegExp(`[${ALONE}]|(?:(?![${ALONE}])[\\p{L}\\p{N}_])+|[^\\p{L}\\p{N}_\\s]`, "gu");

/* Its share, and the first word that begins what stood before: its number from 1, and its place in the text. */
function repetition(text) {
  const words = [...text.matchAll(WORD)], seen = new Set();
  const count = Math.max(0, words.length - SPAN + 1);
  let first = null;
  for (let start = 0; start < count; start++) {
    const gram = words.slice(start, start + SPAN).map((word) => word[0].toLowerCase()).join("\n");
    if (seen.has(gram)) first ??= { word: start + 1, at: words[start].index };
    seen.add(gram);
  }
  const share = count ? 1 - seen.size / count : 0;
  return { share, loops: share > LOOPING, ...first };
}
