/* The fan on the right: one prompt at five strengths of one vector, from one batch. */
const EXAMPLES = ["How are you doing?", "It has been raining all week. What now?", "How does a rainbow form?"];
const fan = { columns: [], prompt: "", messages: [], running: null, measuring: null };
// a column: a Reply with `field`, the number above it, and `caption`

/* Five strengths: the recommended ones, their halves, and 0; the range's end on a side where none is recommended. */
function fiveOf(vector) {
  const { least, most } = rangeOf(vector);
  const low = vector.negative || Math.min(0, least), high = vector.recommended || Math.max(0, most);
  return [low || -high, (low || -high) / 2, 0, (high || -low) / 2, high || -low].map(onGrid).sort((a, b) => a - b);
}

function caption(vector, k) {
  const { least, most } = vector, named = marks(vector).find(([mark]) => onGrid(mark) === k);
  if (!k) return alone() ? "base" : "without it";
  if (named) return "recommended";
  if (least !== null && (k < least || k > most)) return "not tested";
  if (k === least || k === most) return "end of the range";
  return [vector.negative, vector.recommended].some((mark) => mark && onGrid(mark / 2) === k) ? "half" : "";
}

function chosen() { return served.vectors.find((vector) => vector.name === find("turned").value); }

/* Whether the other vectors all stand at 0. */
function alone() { return served.vectors.every((v) => v === chosen() || !onGrid(strengths[v.name] ?? 0)); }

function makeColumns() {
  const vector = chosen(), { least, most } = rangeOf(vector);
  fan.running?.abort();
  fan.measuring?.abort();
  fan.columns = fiveOf(vector).map((k, place) => {
    const field = make("input", { type: "number", step: roundStep(most - least), value: plain(k), "aria-label": `Strength ${place + 1} of the fan` });
    const told = make("span", { class: "soft" });
    const column = new Reply({}, make("label", {}, "k = ", field), told);
    Object.assign(column, { field, told });
    column.extra = () => (column.text && !fan.running ? [continueButton(column)] : []);
    column.node.style.setProperty("--own", ownColour(vector));
    field.addEventListener("input", showFan);
    return column;
  });
  find("columns").replaceChildren(...fan.columns.map((column) => column.node));
  showFan();
}

function continueButton(column) {
  const title = "The prompt and this reply begin a talk; the sliders go to its strengths";
  const press = () => continueTalk(fan.prompt, column);
  return make("button", { type: "button", class: "small", title, onclick: press }, "Continue in chat");
}

function strengthOf(column) { return onGrid(column.field.valueAsNumber || 0); }

/* All strengths at which this column would be asked now. */
function wantedOf(column) { return { ...strengths, [chosen().name]: strengthOf(column) }; }

/* Whether its reply was given at other strengths than those that stand now. */
function isStale(column) { return column.text !== "" && modelName("", column.strengths) !== modelName("", wantedOf(column)); }

function showFan() {
  const vector = chosen(), others = served.vectors.filter((v) => v !== vector && onGrid(strengths[v.name] ?? 0));
  for (const column of fan.columns) {
    const k = strengthOf(column);
    column.told.textContent = isStale(column) ? `reply at ${modelName(served.base, column.strengths)}` : caption(vector, k);
    column.node.classList.toggle("stale", isStale(column));
    column.node.setAttribute("aria-label", `Reply at k = ${plain(k)}`);
    column.node.classList.toggle("moved", k !== 0);
  }
  find("others").textContent = others.length
    ? `Held at their sliders meanwhile: ${others.map((v) => `${v.name} at ${plain(strengths[v.name])}`).join(", ")}.`
    : "";
  find("fan-empty").hidden = fan.prompt !== "";
  find("spread").querySelector("[type=submit]").textContent = fan.running ? "Stop" : "Ask at five strengths";
  const measured = fan.columns.filter((column) => column.tokens), all = measured.length > 0 && measured.every((column) => column.shaded);
  find("shade").disabled = !measured.length;
  find("shade").setAttribute("aria-pressed", all);
  find("scale").hidden = !measured.some((column) => column.shaded);
  find("turned").disabled = fan.running !== null;
}

async function spread(prompt) {
  fan.measuring?.abort();
  find("said").textContent = "";
  fan.prompt = prompt;
  fan.messages = [...systemMessages(), { role: "user", content: prompt }];
  fan.running = new AbortController();
  const { columns, messages, running: { signal } } = fan;
  for (const column of columns) column.strengths = wantedOf(column);
  showFan();
  await (isOurs() ? stream(columns, () => fromOneBatch(columns, messages, signal)) : fromEach(columns, messages, signal));
  fan.running = null;
  for (const column of columns) column.show();
  showFan();
  await measureAll(columns, messages);
}

async function fromOneBatch(columns, messages, signal) {
  const body = { messages, strengths: columns.map((column) => withoutZeros(column.strengths)), ...settings() };
  for await (const event of events(await ask("/dial/fan", body, signal))) {
    if (event.delta) columns[event.index].push(event.delta);
    if (event.finish_reason) columns[event.index].end(event.finish_reason);
  }
  if (columns.some((column) => column.reason === null)) throw new ServerError("The server left this reply unfinished.");
}

/* Five requests at once, to a server that knows strengths as names of models alone. */
function fromEach(columns, messages, signal) {
  return Promise.all(columns.map((column) => stream([column], () => write(column, messages, signal))));
}

/* One after the other, so that a talk beside it is not kept waiting by five at once. */
async function measureAll(columns, messages) {
  fan.measuring?.abort();
  const own = (fan.measuring = new AbortController());
  for (const column of columns) {
    await column.measure(messages, own.signal);
    if (own.signal.aborted) return;
    showFan();
  }
  const largest = Math.max(...columns.map((column) => column.kl ?? 0));
  for (const column of columns.filter((one) => one.kl !== null && largest > 0)) {
    column.part = column.kl / largest;
    column.show();
  }
  find("said").textContent = "The five replies are there.";
}

function shadeAll() {
  const on = find("shade").getAttribute("aria-pressed") !== "true";
  for (const column of fan.columns) if (column.tokens) column.shade(on);
  showFan();
}

function startFan() {
  const field = find("prompt");
  find("turned").replaceChildren(...served.vectors.map((vector) => make("option", { value: vector.name }, vector.name)));
  find("of").hidden = served.vectors.length < 2;
  find("fan").hidden = !served.vectors.length;
  find("shade").hidden = !isOurs();
  if (!served.vectors.length) return;
  makeColumns();
  find("turned").onchange = makeColumns;
  find("shade").onclick = shadeAll;
  sendsOnEnter(field);
  find("fan-empty").append(...EXAMPLES.flatMap((text) =>
    [" ", make("button", { type: "button", class: "small", onclick: () => { field.value = text; field.form.requestSubmit(); } }, text)]));
  find("spread").addEventListener("submit", (event) => {
    event.preventDefault();
    if (fan.running) return fan.running.abort();
    const prompt = field.value.trim();
    if (prompt) spread(prompt); else field.focus();
  });
  document.addEventListener("turned", showFan);
}
