/* What the page asks, as code: Python, curl, and the command line. */
const KINDS = { python: "Python", curl: "curl", command: "command" };
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
  const more = `max_tokens=${max_tokens}, temperature=${temperature}` + (seed === undefined ? "" : `, seed=${seed}`);
  const call = (model) => `client.chat.completions.create(model=${model}, messages=messages, ${more})`;
  const lines = ["from openai import OpenAI", "", `client = OpenAI(base_url=${json(location.origin + "/v1")}, api_key=${key ? 'os.environ["WEIGHTSTEER_API_KEY"]' : '"none"'})`, `messages = ${json(messages, 4)}`];
  if (key) lines.unshift("import os", "");
  if (one) lines.push(`reply = ${call(json(names[0]))}`, "print(reply.choices[0].message.content)");
  else lines.push(`for model in ${json(names)}:`, `    reply = ${call("model")}`, "    print(model, reply.choices[0].message.content, sep=\"\\n\", end=\"\\n\\n\")");
  return lines.join("\n");
}

function asCurl({ messages, names, strengths: wanted }) {
  const one = names.length === 1, path = one ? "/v1/chat/completions" : "/dial/fan";
  const body = one ? { model: names[0], messages, ...settings() } : { messages, strengths: wanted, ...settings() };
  const lines = [`curl ${one ? "" : "-N "}${quoted(location.origin + path)}`, "  -H 'Content-Type: application/json'"];
  if (key) lines.push('  -H "Authorization: Bearer $WEIGHTSTEER_API_KEY"');
  return [...lines, `  -d ${quoted(json(body))}`].join(" \\\n");
}

/* `steer` takes one vector; a sum is made by `combine` first. */
function asCommand({ messages, strengths: wanted, turned: name, fan: ks }) {
  const { max_tokens, temperature, seed } = settings(), system = systemMessages()[0]?.content;
  const prompt = messages.at(-1).content, folder = (each) => `runs/${each}/vector`;
  const more = [`--max-new-tokens ${max_tokens}`, ...(system ? [`--system ${quoted(system)}`] : []),
    ...(temperature ? [`--temperature ${temperature}`] : []), ...(seed === undefined ? [] : [`--seed ${seed}`])].join(" ");
  const used = served.vectors.map((v) => v.name).filter((each) => each === name || wanted.some((one) => onGrid(one[each] ?? 0)));
  const steer = (where, list) => `weightsteer steer ${where} ${quoted(prompt)} --k=${list} ${more}`;
  if (used.length <= 1) return steer(folder(used[0] ?? served.vectors[0].name), wanted.map((one) => plain(one[used[0]] ?? 0)));
  return wanted.map((one, number) => {
    const sum = used.map((each, place) => `${plain(one[each] ?? 0)}*v${place + 1}`).join(" + ").replaceAll("+ -", "- ");
    const made = `mixed${ks ? number + 1 : ""}`;
    return `weightsteer combine ${quoted(sum)} ${used.map((each, place) => `v${place + 1}=${folder(each)}`).join(" ")} -o ${made}\n${steer(made, "1")}`;
  }).join("\n");
}

const WRITERS = { python: asPython, curl: asCurl, command: asCommand };

function chatRequest() {
  const written = find("message").value.trim(), last = talk.turns.at(-1);
  const earlier = last && written ? [...messagesBefore(last), ...shownReply(last)] : systemMessages();
  const messages = last && !written ? messagesBefore(last) : [...earlier, { role: "user", content: written || STAND_IN }];
  return { messages, names: [modelName(served.base, strengths)], strengths: [{ ...strengths }] };
}

function fanRequest() {
  const prompt = find("prompt").value.trim() || fan.prompt || STAND_IN;
  const wanted = fan.columns.map(wantedOf);
  return { messages: [...systemMessages(), { role: "user", content: prompt }], names: wanted.map((one) => modelName(served.base, one)), strengths: wanted, turned: chosen().name, fan: true };
}

function showCode(kind, request) {
  const code = find("code");
  code.value = WRITERS[kind](request);
  find("code-title").textContent = `Copy as ${KINDS[kind]}`;
  const notes = [];
  if (kind === "command") notes.push("The folders are the usual ones of these names; put yours in their places.");
  if (kind === "command" && request.messages.filter((one) => one.role !== "system").length > 1) notes.push("The command asks the last message alone, without the talk before it.");
  if (key && kind !== "command") notes.push("The key itself is left out: it is read from the variable WEIGHTSTEER_API_KEY.");
  find("code-note").textContent = notes.join(" ");
  find("copied").textContent = "";
  find("copy").textContent = "Copy";
  find("shown-code").showModal();
  code.select();
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

function startCode() {
  const buttons = (request, of) => ["Copy as", ...Object.entries(KINDS).filter(([kind]) => kind !== "command" || served.vectors.length).map(([kind, name]) =>
    make("button", { type: "button", class: "small", "aria-label": `Copy ${of} as ${name}`, onclick: () => showCode(kind, request()) }, name))];
  find("chat-copies").replaceChildren(...buttons(chatRequest, "the chat's request"));
  find("fan-copies").replaceChildren(...buttons(fanRequest, "the fan"));
  find("copy").onclick = copyCode;
  find("close").onclick = () => find("shown-code").close();
}
