/* Talking with the server: the key, mistakes in words, and events as they come. */
const LONGEST_LINE = 1 << 22; // characters of one event; a server that sends more is not ours
let key = ""; // in memory only

class ServerError extends Error {}

/* An address may bring the key in its fragment, which browsers send nowhere; it leaves the address at once. */
function takeKey() {
  const found = location.hash.match(/^#key=(.+)$/);
  if (!found) return;
  try { key = decodeURIComponent(found[1]); } catch { key = found[1]; }
  history.replaceState(null, "", location.pathname + location.search);
}

async function send(path, body, signal) {
  const headers = { ...(key && { Authorization: "Bearer " + key }), ...(body && { "Content-Type": "application/json" }) };
  const options = { headers, signal, credentials: "omit", redirect: "error", cache: "no-store" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`No answer from ${location.host}. Is the server still running there?`);
  }
}

/* The server's response; where it wants a key the user is asked for one, and the request is sent again. */
async function ask(path, body, signal) {
  for (;;) {
    const used = key, response = await send(path, body, signal);
    if (response.status !== 401) {
      if (!response.ok) throw new ServerError(await reason(response));
      return response;
    }
    if (used === key) await askForKey(used !== "");
  }
}

async function reason(response) {
  const text = await response.text().catch(() => "");
  try {
    const message = JSON.parse(text).error.message;
    if (typeof message === "string" && message) return message;
  } catch { /* not in OpenAI's form */ }
  return `The server answered ${response.status} ${response.statusText} ${text.slice(0, 300)}`.trim();
}

/* The JSON events of a stream, up to its [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = () => new ServerError("The server broke off in the middle of the reply. Is it still running?");
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : broken();
      });
      if (done || rest.length > LONGEST_LINE) throw broken();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const text = line.slice(5).trim();
        if (text === "[DONE]") return;
        const event = JSON.parse(text);
        if (event.error) throw new ServerError(String(event.error.message));
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let asking = null; // one dialog for all requests that wait

function askForKey(wrong) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = find("ask-key"), field = find("key");
    find("key-why").textContent = wrong
      ? "The server refused this key. Look for the one that it was started with."
      : "This server answers only with its API key. The key stays in this page's memory and is gone when the page is closed.";
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      const given = field.value.trim();
      if (!/^[\x21-\x7e]+$/.test(given)) return field.focus();
      key = given;
      resolve();
      dialog.close();
    };
    find("no-key").onclick = () => dialog.close();
    dialog.onclose = () => { field.value = ""; reject(new ServerError("The server answers only with its API key.")); };
    dialog.showModal();
  }).finally(() => { asking = null; });
  return asking;
}
