/* The talk on the left: turns, a reply's versions at other strengths, and what was cleared. */
const talk = { turns: [], kept: null, running: null };
// a turn: { said, node, versions: [Reply], shown }

function shownReply(turn) {
  const text = turn.versions[turn.shown]?.text;
  return text ? [{ role: "assistant", content: text }] : [];
}

/* What the model reads before it answers a turn: the versions that are shown; a turn without a reply is left out. */
function messagesBefore(turn) {
  const earlier = talk.turns.slice(0, talk.turns.indexOf(turn)).filter((one) => shownReply(one).length);
  const told = earlier.flatMap((one) => [{ role: "user", content: one.said }, ...shownReply(one)]);
  return [...systemMessages(), ...told, { role: "user", content: turn.said }];
}

function addTurn(said) {
  const turn = { said, versions: [], shown: -1, node: make("div", { class: "stack" }) };
  talk.turns.push(turn);
  find("log").append(make("p", { class: "said foreign", dir: "auto" }, said), turn.node);
  return turn;
}

/* Another reply to a turn, at the strengths of the sliders. */
async function answer(turn) {
  const messages = messagesBefore(turn), reply = new Reply(strengths);
  turn.versions.push(reply);
  reply.extra = () => versionButtons(turn);
  showVersion(turn, turn.versions.length - 1);
  talk.running = new AbortController();
  const signal = talk.running.signal;
  showChat();
  await stream([reply], async () => {
    await write(reply, messages, signal, follow);
  });
  talk.running = null;
  showChat();
  await reply.measure(messages);
}

/* A reply as it grows, from one request. */
async function write(reply, messages, signal, grown = () => {}) {
  const body = { model: askedName(reply.strengths), messages, stream: true, ...settings() };
  let reason = "stop";
  for await (const event of events(await ask("/v1/chat/completions", body, signal))) {
    const choice = event.choices?.[0];
    if (choice?.delta?.content) { reply.push(choice.delta.content); grown(); }
    reason = choice?.finish_reason ?? reason;
  }
  reply.end(reason);
}

/* The log stays at its end while it is there. */
function follow() {
  const log = find("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
}

function showVersion(turn, number) {
  turn.shown = number;
  const reply = turn.versions[number];
  const name = make("code", { class: "foreign" }, modelName(served.base, reply.strengths));
  reply.node.querySelector("h4").replaceChildren(name);
  turn.node.replaceChildren(reply.node);
  if (reply.loop) reply.show();
  const log = find("log");
  if (turn === talk.turns.at(-1)) log.scrollTop = log.scrollHeight;
}

function versionButtons(turn) {
  const count = turn.versions.length;
  if (count < 2) return [];
  const button = (text, label, by) => {
    const step = () => {
      showVersion(turn, turn.shown + by);
      (turn.node.querySelector(`[aria-label="${label}"]:enabled`) ?? turn.node.querySelector(".versions button:enabled")).focus();
    };
    const off = talk.running || !turn.versions[turn.shown + by] ? "" : false;
    return make("button", { type: "button", class: "small", "aria-label": label, disabled: off, onclick: step }, text);
  };
  const place = `${turn.shown + 1} of ${count}`;
  return [make("span", { class: "versions" }, button("\u2039", "Earlier version", -1), place, button("\u203a", "Later version", 1))];
}

function showChat() {
  const some = talk.turns.length > 0, running = talk.running !== null, say = find("say").querySelector("[type=submit]");
  find("log").hidden = !some;
  find("chat-empty").hidden = some;
  say.textContent = running ? "Stop" : "Send";
  find("again").disabled = find("clear").disabled = running || !some;
  find("again").textContent = some ? `Again at ${modelName(served.base, strengths)}` : "Again";
  find("back").hidden = running || talk.kept === null;
  for (const turn of talk.turns) if (turn.versions[turn.shown]?.loop) turn.versions[turn.shown].show();
}

/* An empty talk; the one before it can be brought back. */
function clearTalk() {
  talk.kept = talk.turns.length ? { turns: talk.turns, nodes: [...find("log").childNodes] } : talk.kept;
  talk.turns = [];
  find("log").replaceChildren();
  showChat();
}

function bringBack() {
  const { turns, nodes } = talk.kept;
  talk.kept = null;
  talk.turns = turns;
  find("log").replaceChildren(...nodes);
  showChat();
}

/* A reply of the fan becomes the beginning of a talk, and the sliders stand where it was made. */
function continueTalk(prompt, reply) {
  talk.running?.abort();
  clearTalk();
  for (const [name, k] of Object.entries(reply.strengths)) dials[name](k);
  const turn = addTurn(prompt), copy = new Reply(reply.strengths);
  const { text, longest, kl, tokens, reason, loop } = reply;
  Object.assign(copy, { text, longest, kl, tokens, reason, loop });
  copy.extra = () => versionButtons(turn);
  turn.versions.push(copy);
  showVersion(turn, 0);
  showChat();
  find("message").focus();
}

/* Enter sends, Shift and Enter begin a line; not while an input method composes. */
function sendsOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
}

function startChat() {
  const field = find("message");
  sendsOnEnter(field);
  find("say").addEventListener("submit", (event) => {
    event.preventDefault();
    if (talk.running) return talk.running.abort();
    const said = field.value.trim();
    if (!said) return field.focus();
    field.value = "";
    answer(addTurn(said));
  });
  find("again").onclick = () => answer(talk.turns.at(-1));
  find("clear").onclick = () => { clearTalk(); field.focus(); };
  find("back").onclick = bringBack;
  document.addEventListener("turned", showChat);
}
