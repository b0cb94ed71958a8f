// What the conversation looks like. Whatever people or models wrote becomes a text node, never HTML.

import { indented } from "/page/conversation.js";

const log = document.getElementById("log");
const status = document.getElementById("status");

/** An element with properties and children; strings among them become text. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Tells screen readers what happens; the log itself is quiet while it grows. */
export function announce(text) {
  status.textContent = text;
}

/** Empties the log. */
export function clearLog() {
  log.replaceChildren();
}

/** Adds what the user said. Returns its element. */
export function showUser(text) {
  return add(element("article", { className: "user", ariaLabel: "You" }, element("p", { className: "text" }, text)));
}

/** Adds a failure in words. */
export function showFailure(text) {
  announce(text);
  return add(element("p", { className: "failure" }, text));
}

/** Adds a button that asks again what could not be answered. */
export function showRetry(action) {
  const button = element("button", { type: "button" }, "Try again");
  button.addEventListener("click", () => {
    button.remove();
    action();
  });
  add(button);
}

function add(child) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  log.append(child);
  if (follows || child.className === "user") log.scrollTop = log.scrollHeight;
  return child;
}

/** One answer on the screen; `update` follows an Answer as it grows, `end` finishes it. */
export class AnswerView {
  #thought = null;
  #text = null;
  #cards = [];
  #started = performance.now();
  #first = null;

  constructor() {
    this.facts = element("p", { className: "facts", hidden: true });
    this.body = element("div", {}, element("p", { className: "waiting" }, "…"));
    this.article = add(element("article", { className: "model", ariaLabel: "Model" }, this.body, this.facts));
    this.article.setAttribute("aria-busy", "true");
  }

  /** Shows what the answer has by now. kind: what the last chunk added. */
  update(answer, kind) {
    if (!kind) return;
    this.#first ??= performance.now();
    this.body.querySelector(".waiting")?.remove();
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    if (kind === "thinking") this.#showThinking(answer);
    else this.#endThinking();
    if (kind === "content") this.#showContent(answer);
    if (kind === "call") this.#showCalls(answer);
    if (follows) log.scrollTop = log.scrollHeight;
  }

  /** The answer is over. outcome: words about an end that is no normal one, or "". */
  end(answer, outcome) {
    this.#endThinking();
    this.body.querySelector(".waiting")?.remove();
    this.article.setAttribute("aria-busy", "false");
    const whole = new Set(answer.wholeCalls);
    for (const [place, call] of answer.calls.entries()) {
      if (call && !whole.has(call)) {
        this.#cards[place].append(element("p", { className: "quiet" }, "Cut off: its arguments are not whole."));
      }
    }
    if (outcome) this.body.append(element("p", { className: "quiet outcome" }, outcome));
    this.#showFacts(answer);
  }

  /** Fields for the results of the calls; `done` gets them, in the order of the calls. */
  askResults(calls, done) {
    const form = element("form", { className: "results" });
    const fields = calls.map((call) => {
      const input = element("textarea", { rows: 1, spellcheck: false, className: "code result" });
      input.setAttribute("aria-label", `Result of ${call.name}`);
      input.placeholder = "Type what the tool returns";
      this.#cards.find((card) => card.call === call).append(input);
      input.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          const next = fields[fields.indexOf(input) + 1];
          if (next) next.focus();
          else form.requestSubmit();
        }
      });
      return input;
    });
    form.append(element("button", { type: "submit", className: "main-action" }, "Send result" + (calls.length > 1 ? "s" : "")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      for (const input of fields) input.readOnly = true;
      form.remove();
      done(fields.map((input) => input.value));
    });
    this.body.append(form);
    log.scrollTop = log.scrollHeight;
    fields[0].focus();
  }

  #showThinking(answer) {
    if (!this.#thought) {
      const title = element("span", { className: "title" });
      const preview = element("span", { className: "preview" });
      preview.ariaHidden = "true";
      const text = element("p", { className: "text" });
      const fold = element("details", { className: "thinking running" }, element("summary", {}, title, preview), text);
      this.#thought = { fold, title, preview, text, started: performance.now(), over: false };
      this.body.append(fold);
    }
    this.#thought.over = false; // a model may think again after it has said something
    const { title, preview, text, started } = this.#thought;
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    const words = answer.thinking.trim().split(/\s+/).length;
    title.textContent = `Thinking… ${words} ${words === 1 ? "word" : "words"}, ${seconds} s`;
    preview.textContent = answer.thinking.slice(-120).replace(/\s+/g, " ");
    text.textContent = answer.thinking;
  }

  #endThinking() {
    if (!this.#thought || this.#thought.over) return;
    const { fold, title, preview, started } = this.#thought;
    this.#thought.over = true;
    fold.classList.remove("running");
    preview.remove();
    title.textContent = `Thought for ${((performance.now() - started) / 1000).toFixed(1)} s`;
  }

  #showContent(answer) {
    if (!this.#text) {
      this.#text = element("p", { className: "text" });
      this.body.append(this.#text);
    }
    this.#text.textContent = answer.content;
  }

  #showCalls(answer) {
    for (const [place, call] of answer.calls.entries()) {
      if (!call) continue;
      let card = this.#cards[place];
      if (!card) {
        card = element("section", { className: "call", ariaLabel: `Call of ${call.name}` });
        card.append(
          element("h3", {}, element("span", { className: "quiet" }, "calls "), call.name),
          element("pre", { className: "arguments" }),
        );
        card.call = call;
        this.#cards[place] = card;
        this.body.append(card);
      }
      card.querySelector(".arguments").textContent = indented(call.arguments);
    }
  }

  #showFacts(answer) {
    const { usage } = answer;
    if (!usage) return;
    const now = performance.now();
    const badges = [];
    const count = usage.completion_tokens;
    badges.push([`${count} ${count === 1 ? "token" : "tokens"}`, "Tokens of the answer, thinking included"]);
    if (this.#first !== null && count > 1) {
      const rate = ((count - 1) * 1000) / Math.max(now - this.#first, 1);
      badges.push([`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`, "After the first token"]);
    }
    if (this.#first !== null) {
      badges.push([`first after ${((this.#first - this.#started) / 1000).toFixed(2)} s`, "Time to the first token"]);
    }
    badges.push([`prompt ${usage.prompt_tokens}`, "Tokens of the prompt"]);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined && cached !== null) {
      badges.push([`${cached} cached`, "Tokens of the prompt that were found in the cache", "cached"]);
    }
    this.facts.replaceChildren(
      ...badges.map(([text, title, kind = ""]) => element("span", { className: `badge ${kind}`, title }, text)),
    );
    this.facts.hidden = false;
  }
}
