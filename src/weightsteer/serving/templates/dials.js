/* The dials: a slider and a number for each vector. */
const served = { base: "", vectors: [], outOfRange: "warn" };
const strengths = {}; // name -> k, as the sliders stand
const dials = {}; // name -> what sets its slider

function rangeOf(vector) { return vector.least === null ? { least: -1, most: 1 } : vector; }

function roundStep(span) {
  const power = 10 ** Math.floor(Math.log10(span / 50));
  return Math.max(10 ** -digits, [1, 2, 5, 10].map((part) => part * power).find((step) => span / step <= 100));
}

/* The strengths that have a name: [k, what it is, the same in full]. */
function marks(vector) {
  const named = [[0, "base", "0, where this vector changes nothing"]];
  if (vector.negative) named.unshift([vector.negative, "less", `the recommended ${plain(vector.negative)} for less`]);
  if (vector.recommended) named.push([vector.recommended, "more", `the recommended ${plain(vector.recommended)} for more`]);
  return named;
}

function rangeInWords(vector) {
  return vector.least === null
    ? "No range was tested. At k = 1 the vector is added as it is."
    : `Tested from ${plain(vector.least)} to ${plain(vector.most)}.`;
}

function ownColour(vector) { return `var(--vector${served.vectors.indexOf(vector) % COLOURS})`; }

/* The slider's own ends: somewhat beyond the tested range where the server takes such strengths; 0 is always there. */
function endsOf(vector) {
  const { least, most } = rangeOf(vector), step = roundStep(most - least);
  const beyond = served.outOfRange === "warn" ? (most - least) / 5 : 0;
  const low = Math.min(0, Math.floor((least - beyond) / step) * step), high = Math.max(0, Math.ceil((most + beyond) / step) * step);
  return { least, most, step, low, high };
}

function makeDial(vector) {
  const { step, low, high } = endsOf(vector), label = `Strength of ${vector.name}`;
  const slider = make("input", { type: "range", min: low, max: high, step: 10 ** -digits, "aria-label": label });
  const field = make("input", { type: "number", step, "aria-label": label + ", as a number" });
  const set = (k) => {
    strengths[vector.name] = onGrid(k);
    slider.value = k;
    slider.setAttribute("aria-valuetext", "k = " + plain(k));
    if (Number(field.value) !== onGrid(k) || field.value === "") field.value = plain(k);
    turned();
  };
  dials[vector.name] = set;
  slider.addEventListener("input", () => set(snapped(vector, Number(slider.value))));
  slider.addEventListener("dblclick", () => set(0));
  slider.addEventListener("keydown", (event) => turnByKey(event, vector, set));
  field.addEventListener("input", () => { if (Number.isFinite(field.valueAsNumber)) set(field.valueAsNumber); });
  field.addEventListener("change", () => set(strengths[vector.name]));
  const about = vector.about ? [make("p", { class: "about foreign", dir: "auto", title: vector.about }, vector.about)] : [];
  return make("div", { class: "dial", "--own": ownColour(vector), role: "group", "aria-label": vector.name },
    make("h3", {}, make("span", { class: "foreign", dir: "auto" }, vector.name), field),
    ...about,
    make("div", { class: "track" }, ...trackParts(vector), slider),
    make("div", { class: "marks" }, ...markButtons(vector, set), make("p", {}, rangeInWords(vector))));
}

/* A dragged slider keeps to steps, and to the marks that it comes near. */
function snapped(vector, k) {
  const { step, low, high } = endsOf(vector), near = marks(vector).find(([mark]) => Math.abs(mark - k) < (high - low) / 80);
  return near ? near[0] : Math.round(k / step) * step;
}

const MOVES = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };

function turnByKey(event, vector, set) {
  const { step, low, high } = endsOf(vector), by = event.shiftKey ? 10 ** -digits : step;
  if (event.key === "0") set(0);
  else if (event.key in MOVES) set(clamp(strengths[vector.name] + MOVES[event.key] * by, low, high));
  else return;
  event.preventDefault();
}

function trackParts(vector) {
  const { least, most, low, high } = endsOf(vector), part = (k) => (k - low) / (high - low);
  const ticks = marks(vector).map(([k]) => make("span", { class: k ? "tick" : "tick zero", "--from": part(k) }));
  const tested = make("span", { class: "tested", "--from": part(least), "--wide": part(most) - part(least) });
  return [make("span", { class: "whole" }), ...(vector.least === null ? [] : [tested]), ...ticks];
}

function markButtons(vector, set) {
  return marks(vector).map(([k, short, full]) => {
    const attributes = { type: "button", "aria-label": `Set ${vector.name} to ${full}`, title: full };
    return make("button", { ...attributes, onclick: () => set(k) }, `${plain(k)} ${short}`);
  });
}

function clamp(k, low, high) { return Math.min(high, Math.max(low, k)); }

/* What the server does with strengths outside the tested ranges, in words; "" if none is. */
function farInWords(wanted) {
  const far = served.vectors.filter((v) => v.least !== null && clamp(wanted[v.name] ?? 0, v.least, v.most) !== (wanted[v.name] ?? 0));
  if (!far.length) return "";
  const where = far.map((v) => `${v.name} was tested from ${plain(v.least)} to ${plain(v.most)}`).join("; ");
  const then = { warn: "replies may break", refuse: "the server refuses this", clamp: "the server takes the nearest tested strength" };
  return `${where}: ${then[served.outOfRange] ?? then.warn}.`;
}

function showDials() {
  find("dials").replaceChildren(...served.vectors.map(makeDial));
  if (!served.vectors.length) find("dials").append(make("p", {}, "No vector is served, so every reply is the base's."));
  const alone = served.vectors.length === 1;
  for (const vector of served.vectors) dials[vector.name](strengths[vector.name] ?? (alone ? vector.recommended ?? 0 : 0));
}

function turned() {
  if (Object.keys(strengths).length < served.vectors.length) return; // still being made
  const far = farInWords(strengths), told = find("next").querySelector("span");
  find("next").querySelector("code").textContent = modelName(served.base, strengths);
  told.textContent = far || (modelName("", strengths) ? "" : "(the base itself)");
  told.classList.toggle("far", far !== "");
  document.dispatchEvent(new Event("turned"));
}
