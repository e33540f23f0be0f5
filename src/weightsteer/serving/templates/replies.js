/* One reply: it grows, says how far it lies from the base, where it begins to loop, and shades its tokens. */
const HOTTEST = 3; // nats at which a token has the full shade

class Reply {
  constructor(strengths, ...head) {
    this.strengths = { ...strengths };
    this.text = "";
    this.reason = null; // why it ended
    this.loop = null; // where it begins to repeat itself, once it has ended
    this.tokens = null; // [{text, kl}], once measured
    this.kl = null; // their mean
    this.part = null; // of the largest mean in the fan
    this.shaded = false;
    this.body = make("p", { class: "text foreign", dir: "auto" });
    this.facts = make("div", { class: "facts" }); // in the fan they stand above the text, side by side
    this.buttons = make("div", { class: "facts" });
    this.node = make("article", { class: "card reply" }, make("h4", {}, ...head), this.body, this.facts, this.buttons);
    this.node.classList.toggle("steered", !this.isBase);
  }

  start() {
    this.text = "";
    this.longest = settings().max_tokens;
    this.tokens = this.kl = this.reason = this.part = this.loop = null;
    this.unmeasured = "";
    this.shaded = false;
    this.node.querySelector(".problem")?.remove();
    this.body.replaceChildren(document.createTextNode(""));
    this.facts.replaceChildren();
    this.buttons.replaceChildren();
    this.busy(true);
  }

  busy(on) {
    this.node.classList.toggle("loading", on);
    this.node.setAttribute("aria-busy", on);
  }

  push(delta) {
    this.text += delta;
    this.body.firstChild.appendData(delta);
  }

  end(reason) {
    this.reason = reason;
    this.busy(false);
    this.loop = repetition(this.text);
    this.show();
  }

  fail(message) {
    this.end("failed");
    this.buttons.before(make("div", { class: "problem foreign", role: "alert", dir: "auto" }, message));
  }

  get isBase() { return modelName("", this.strengths) === ""; }

  /* Token KL of the base to the steered model, from the server. */
  async measure(messages, signal) {
    if (!isOurs() || !this.text || this.reason === "failed" || this.isBase) return;
    try {
      const found = await (await ask("/dial/kl", { messages, reply: this.text, strengths: this.strengths }, signal)).json();
      this.kl = found.kl;
      this.tokens = found.tokens;
    } catch (error) {
      if (error.name === "AbortError") return;
      this.unmeasured = inWords(error);
    }
    this.show();
  }

  shade(on) {
    this.shaded = on && this.tokens !== null;
    this.show();
  }

  show() {
    this.body.replaceChildren(...(this.shaded ? this.shadedParts() : this.plainParts()));
    this.facts.replaceChildren(...this.said());
    this.buttons.replaceChildren(...(this.tokens ? [this.shadeButton()] : []), ...(this.extra?.() ?? []));
  }

  /* What is known of the reply, in words. */
  said() {
    const parts = [], tell = (attributes, text) => parts.push(make("span", attributes, text));
    if (this.kl !== null) tell({ class: "kl", title: "Mean over the reply's tokens of KL(base || steered)" }, `KL ${this.kl.toFixed(3)} nats`);
    if (this.isBase && this.text) tell({}, "the base itself");
    if (this.unmeasured) tell({ class: "foreign", dir: "auto" }, "KL not measured: " + this.unmeasured);
    if (this.part !== null) parts.push(make("span", { class: "bar", "aria-hidden": "true" }, make("i", { "--part": this.part })));
    if (this.loop.loops) tell({ class: "badge loops" }, `loops from word ${this.loop.word}`);
    if (!this.text && this.reason !== "failed") tell({}, "The reply is empty.");
    if (this.reason === "length") tell({}, `cut at ${this.longest} tokens`);
    if (this.reason === "stopped") tell({}, "stopped");
    return parts;
  }

  shadeButton() {
    const press = () => { this.shade(!this.shaded); this.buttons.querySelector("[aria-pressed]").focus(); };
    return make("button", { type: "button", class: "small", "aria-pressed": this.shaded, onclick: press }, "Shade");
  }

  plainParts() {
    if (!this.loop?.loops) return [this.text];
    const rest = make("span", { class: "looping", title: "From here on words stand that stood before." }, this.text.slice(this.loop.at));
    return [this.text.slice(0, this.loop.at), rest];
  }

  shadedParts() {
    let at = 0, marked = !this.loop.loops;
    return this.tokens.map(({ text, kl }) => {
      at += text.length;
      const begins = !marked && at > this.loop.at;
      marked ||= begins;
      const heat = Math.sqrt(clamp(kl, 0, HOTTEST) / HOTTEST); // the eye sees small ones too
      return make("span", { class: begins ? "token loop-start" : "token", "--heat": heat, title: `${kl.toFixed(3)} nats` }, text);
    });
  }
}

/* A stream into a reply; what went wrong is told in the reply. Resolves to whether it ended by itself. */
async function stream(replies, work) {
  for (const reply of replies) reply.start();
  try {
    await work();
    return true;
  } catch (error) {
    for (const reply of replies.filter((one) => one.reason === null)) {
      if (error.name === "AbortError") reply.end("stopped");
      else reply.fail(inWords(error));
    }
    return false;
  }
}

/* Sampling as on our own server: vLLM would fill in the settings that the model was published with. */
const PLAIN = { top_p: 1, top_k: -1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };

function isOurs() { return served.server === "weightsteer"; }

/* A request's model. On a CPU vLLM changes rows of the base that share a batch with others, not those of a vector at 0. */
function askedName(wanted) {
  return modelName(isOurs() || !served.vectors.length ? served.base : served.vectors[0].name + "@0", wanted);
}

function settings() {
  const lengths = { max_tokens: find("longest").valueAsNumber || 200, temperature: find("temperature").valueAsNumber || 0 };
  const chosen = isOurs() ? lengths : { ...lengths, ...PLAIN };
  const seed = find("seed").valueAsNumber;
  return Number.isFinite(seed) ? { ...chosen, seed } : chosen;
}

function systemMessages() {
  const text = find("system").value;
  return text.trim() ? [{ role: "system", content: text }] : [];
}

function showSettings() {
  const { max_tokens, temperature, seed } = settings();
  const how = temperature ? `temperature ${temperature}` + (seed === undefined ? "" : `, seed ${seed}`) : "the likeliest token";
  find("settings").querySelector("summary span").textContent =
    `${how}, at most ${max_tokens} tokens, ${systemMessages().length ? "a system prompt" : "no system prompt"}`;
}
