// What was said so far, in the form a request needs it, and one answer as it grows.

/** An assistant's answer, built from the deltas of a stream. */
export class Answer {
  constructor() {
    this.thinking = null;
    this.content = "";
    this.calls = [];
    this.finish = null;
    this.usage = null;
  }

  /** Takes one chunk of the stream. Returns what it added: "thinking", "content", "call" or null. */
  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return null;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const delta = choice.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought) {
      this.thinking = (this.thinking ?? "") + thought;
      return "thinking";
    }
    if (delta.content) {
      this.content += delta.content;
      return "content";
    }
    for (const part of delta.tool_calls ?? []) this.#addCall(part);
    return delta.tool_calls?.length ? "call" : null;
  }

  #addCall(part) {
    const call = (this.calls[part.index] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name = part.function.name;
    call.arguments += part.function?.arguments ?? "";
  }

  /** Calls whose arguments came whole; the others were cut off and cannot be sent back. */
  get wholeCalls() {
    return this.calls.filter((call) => call && isObject(call.arguments));
  }

  /** The answer as a message of the next request. */
  message() {
    const message = { role: "assistant", content: this.content };
    if (this.thinking !== null) message.reasoning_content = this.thinking;
    if (this.wholeCalls.length) {
      message.tool_calls = this.wholeCalls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
    }
    return message;
  }
}

/** JSON text on several lines, also while it is still growing: strings stay as they are. */
export function indented(text) {
  let shown = "";
  let depth = 0;
  let inString = false;
  let escaped = false;
  const line = () => "\n" + "  ".repeat(Math.max(depth, 0));
  for (const [place, letter] of [...text].entries()) {
    if (inString) {
      shown += letter;
      if (escaped) escaped = false;
      else if (letter === "\\") escaped = true;
      else if (letter === '"') inString = false;
    } else if (letter === '"') {
      inString = true;
      shown += letter;
    } else if ("{[".includes(letter)) {
      depth += 1;
      const empty = /^\s*[}\]]/.test(text.slice(place + 1));
      shown += letter + (empty ? "" : line());
    } else if ("}]".includes(letter)) {
      depth -= 1;
      shown += (/[{[]$/.test(shown) ? "" : line()) + letter;
    } else if (letter === ",") {
      shown += letter + line();
    } else if (letter === ":") {
      shown += ": ";
    } else if (!/\s/.test(letter)) {
      shown += letter;
    }
  }
  return shown;
}

function isObject(text) {
  try {
    const value = JSON.parse(text || "{}");
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}
