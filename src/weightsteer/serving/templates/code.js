/* What the page asks, as code: Python, curl, and the command line. */
const KINDS = { python: "Python", curl: "curl", command: "command" };
const CHAT = "/v1/chat/completions";
const STAND_IN = "Hello!"; // where nothing has been written yet

/* JSON in ASCII: in a terminal or an editor no sign of it can do more than be read. */
function json(value, indent) {
  return JSON.stringify(value, null, indent).replace(/[\u007f-\uffff]/g, (sign) => "\\u" + sign.charCodeAt(0).toString(16).padStart(4, "0"));
}

/* One word of a shell. Control signs, and what turns the order of text around, are written out. */
function quoted(text) {
  const odd = /[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  if (!odd.test(text)) return "'" + text.replaceAll("'", "'\\''") + "'";
  const escaped = text.replace(/[\\']/g, "\\$&").replace(/\n/g, "\\n");
  return "$'" + escaped.replace(odd, (sign) => "\\u" + sign.charCodeAt(0).toString(16).padStart(4, "0")) + "'";
}

function asPython({ messages, names }) {
  const { max_tokens, temperature, seed } = settings(), one = names.length === 1;
  const said = [`max_tokens=${max_tokens}`, `temperature=${temperature}`];
  if (seed !== undefined) said.push(`seed=${seed}`);
  if (!isOurs()) said.push(`extra_body=${json(PLAIN)}`);
  const more = said.join(", ");
  const call = (model) => `client.chat.completions.create(model=${model}, messages=messages, ${more})`;
  const secret = key ? 'os.environ["WEIGHTSTEER_API_KEY"]' : '"none"';
  const lines = [
    ...(key ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${json(location.origin + "/v1")}, api_key=${secret})`,
    `messages = ${json(messages, 4)}`,
  ];
  if (one) lines.push(`reply = ${call(json(names[0]))}`, "print(reply.choices[0].message.content)");
  else {
    const shown = 'print(model, reply.choices[0].message.content, sep="\\n", end="\\n\\n")';
    lines.push(`for model in [${names.map((name) => json(name)).join(", ")}]:`, `    reply = ${call("model")}`, `    ${shown}`);
  }
  return lines.join("\n");
}

function asCurl({ messages, names, strengths: wanted }) {
  const call = (path, body) => [
    `curl ${path === CHAT ? "" : "-N "}${quoted(location.origin + path)}`,
    "  -H 'Content-Type: application/json'",
    ...(key ? ['  -H "Authorization: Bearer $WEIGHTSTEER_API_KEY"'] : []),
    `  -d ${quoted(json(body))}`,
  ].join(" \\\n");
  if (names.length > 1 && isOurs()) return call("/dial/fan", { messages, strengths: wanted.map(withoutZeros), ...settings() });
  return names.map((model) => call(CHAT, { model, messages, ...settings() })).join("\n");
}

/* `steer` takes one vector; a sum is made by `combine` first. */
function asCommand({ messages, strengths: wanted, turned: name }) {
  const { max_tokens, temperature, seed } = settings(), system = systemMessages()[0]?.content;
  const options = [`--max-new-tokens ${max_tokens}`];
  if (system) options.push(`--system ${quoted(system)}`);
  if (temperature) options.push(`--temperature ${temperature}`);
  if (seed !== undefined) options.push(`--seed ${seed}`);
  const content = messages.at(-1).content;  // a blank before a dash, else it would be read as an option
  const folder = (each) => `runs/${each}/vector`, ask = quoted(content.startsWith("-") ? ` ${content}` : content);
  const steer = (where, ks) => `weightsteer steer ${where} ${ask} --k=${ks} ${options.join(" ")}`;
  const used = served.vectors.map((v) => v.name).filter((each) => each === name || wanted.some((one) => onGrid(one[each] ?? 0)));
  if (used.length <= 1) {
    const only = used[0] ?? served.vectors[0].name;
    return steer(folder(only), wanted.map((one) => plain(one[only] ?? 0)));
  }
  const named = used.map((each, place) => `v${place + 1}=${folder(each)}`).join(" ");
  return wanted.map((one, number) => {
    const sum = used.map((each, place) => `${plain(one[each] ?? 0)}*v${place + 1}`).join(" + ").replaceAll("+ -", "- ");
    const made = "mixed" + (wanted.length > 1 ? number + 1 : "");
    return `weightsteer combine ${quoted(sum)} ${named} -o ${made}\n${steer(made, "1")}`;
  }).join("\n");
}

const WRITERS = { python: asPython, curl: asCurl, command: asCommand };

function chatRequest() {
  const written = find("message").value.trim(), last = talk.turns.at(-1);
  const earlier = last && written ? [...messagesBefore(last), ...shownReply(last)] : systemMessages();
  const messages = last && !written ? messagesBefore(last) : [...earlier, { role: "user", content: written || STAND_IN }];
  return { messages, names: [askedName(strengths)], strengths: [{ ...strengths }] };
}

function fanRequest() {
  const prompt = find("prompt").value.trim() || fan.prompt || STAND_IN;
  const wanted = fan.columns.map(wantedOf), names = wanted.map(askedName);
  return { messages: [...systemMessages(), { role: "user", content: prompt }], names, strengths: wanted, turned: chosen().name };
}

function showCode(kind, request) {
  const code = find("code"), told = request.messages.filter((one) => one.role !== "system"), notes = [];
  code.value = WRITERS[kind](request);
  find("code-title").textContent = `Copy as ${KINDS[kind]}`;
  if (kind === "command") notes.push("The folders are the usual ones of these names; put yours in their places.");
  if (kind === "command" && told.length > 1) notes.push("The command asks the last message alone, without the talk before it.");
  if (key && kind !== "command") notes.push("The key itself is left out: it is read from the variable WEIGHTSTEER_API_KEY.");
  find("code-note").textContent = notes.join(" ");
  find("copied").textContent = "";
  find("copy").textContent = "Copy";
  find("shown-code").showModal();
  code.select();
  code.scrollTo(0, 0);
}

/* The clipboard is open to pages of this machine and of https; elsewhere the text is selected for the user's own copy. */
async function copyCode() {
  find("code").select();
  try {
    await navigator.clipboard.writeText(find("code").value);
    find("copy").textContent = "Copied";
    find("copied").textContent = "Copied";
  } catch {
    find("code-note").textContent = "The browser keeps the clipboard closed here. The text is selected: copy it with Ctrl and C.";
  }
}

function copyButtons(request, of) {
  const kinds = Object.keys(KINDS).filter((kind) => kind !== "command" || served.vectors.length);
  return ["Copy as", ...kinds.map((kind) => {
    const attributes = { type: "button", class: "small", "aria-label": `Copy ${of} as ${KINDS[kind]}` };
    return make("button", { ...attributes, onclick: () => showCode(kind, request()) }, KINDS[kind]);
  })];
}

function startCode() {
  find("chat-copies").replaceChildren(...copyButtons(chatRequest, "the chat's request"));
  find("fan-copies").replaceChildren(...copyButtons(fanRequest, "the fan"));
  find("copy").onclick = copyCode;
  find("close").onclick = () => find("shown-code").close();
}
