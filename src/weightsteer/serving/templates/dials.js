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

function makeDial(vector) {
  const { least, most } = rangeOf(vector), step = roundStep(most - least);
  const beyond = served.outOfRange === "warn" ? (most - least) / 5 : 0;
  const low = Math.min(0, Math.floor((least - beyond) / step) * step), high = Math.max(0, Math.ceil((most + beyond) / step) * step);
  const part = (k) => String((k - low) / (high - low));
  const slider = make("input", { type: "range", min: low, max: high, step: 10 ** -digits, "aria-label": `Strength of ${vector.name}` });
  const field = make("input", { type: "number", step, "aria-label": `Strength of ${vector.name}, as a number` });
  const set = (k) => {
    strengths[vector.name] = onGrid(k);
    slider.value = k;
    slider.setAttribute("aria-valuetext", "k = " + plain(k));
    if (Number(field.value) !== onGrid(k) || field.value === "") field.value = plain(k);
    turned();
  };
  dials[vector.name] = set;
  const snapped = (k) => {
    const near = marks(vector).find(([mark]) => Math.abs(mark - k) < (high - low) / 80);
    return near ? near[0] : Math.round(k / step) * step;
  };
  slider.addEventListener("input", () => set(snapped(Number(slider.value))));
  slider.addEventListener("dblclick", () => set(0));
  slider.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
    if (event.key === "0") set(0);
    else if (event.key in moves) set(clamp(strengths[vector.name] + moves[event.key] * (event.shiftKey ? 10 ** -digits : step), low, high));
    else return;
    event.preventDefault();
  });
  field.addEventListener("input", () => { if (field.value !== "" && Number.isFinite(field.valueAsNumber)) set(field.valueAsNumber); });
  field.addEventListener("change", () => set(strengths[vector.name]));
  const ticks = marks(vector).map(([k]) => make("span", { class: k ? "tick" : "tick zero", "--from": part(k) }));
  const tested = vector.least === null ? [] : [make("span", { class: "tested", "--from": part(least), "--wide": (most - least) / (high - low) })];
  const buttons = marks(vector).map(([k, short, full]) =>
    make("button", { type: "button", "aria-label": `Set ${vector.name} to ${full}`, title: full, onclick: () => set(k) }, `${plain(k)} ${short}`));
  return make("div", { class: "dial", "--own": ownColour(vector), role: "group", "aria-label": vector.name },
    make("h3", {}, make("span", { class: "foreign", dir: "auto" }, vector.name), field),
    ...(vector.about ? [make("p", { class: "about foreign", dir: "auto", title: vector.about }, vector.about)] : []),
    make("div", { class: "track" }, make("span", { class: "whole" }), ...tested, ...ticks, slider),
    make("div", { class: "marks" }, ...buttons, make("p", {}, rangeInWords(vector))));
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
