// The fields beside the conversation: what each request asks for besides its messages.

import { Failure } from "/page/events.js";

const field = (id) => document.getElementById(id);

/** Tools in OpenAI's form from the text of the field; bare functions are wrapped. Throws Failure. */
export function readTools(text) {
  if (!text.trim()) return [];
  let listed;
  try {
    listed = JSON.parse(text);
  } catch (error) {
    throw new Failure(`Tools: this is no JSON (${error.message}).`);
  }
  if (!Array.isArray(listed)) listed = [listed];
  return listed.map((tool, place) => {
    const whole = tool?.function ? { type: "function", ...tool } : { type: "function", function: tool };
    if (typeof whole.function?.name !== "string") {
      throw new Failure(`Tools: entry ${place + 1} has no name.`);
    }
    return whole;
  });
}

/** What a request carries besides model and messages. Throws Failure for tools that cannot be read. */
export function requestSettings() {
  const settings = { thinking: { type: field("thinking").value } };
  const temperature = number("temperature", "Temperature");
  const limit = number("max-tokens", "Max tokens");
  if (temperature !== null) settings.temperature = temperature;
  if (limit !== null) settings.max_tokens = limit;
  const tools = readTools(field("tools").value);
  if (tools.length) settings.tools = tools;
  return settings;
}

/** The system message as a list of none or one message. */
export function systemMessages() {
  const content = field("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}

/** Tells below the field what the tools in it are. */
export function showToolsState() {
  const state = field("tools-state");
  let wrong = false;
  try {
    const names = readTools(field("tools").value).map((tool) => tool.function.name);
    state.textContent = names.length
      ? `Offered: ${names.join(", ")}. What a tool returns, you type.`
      : "None. What a tool returns, you type.";
  } catch (error) {
    state.textContent = error.message;
    wrong = true;
  }
  state.classList.toggle("wrong", wrong);
  field("tools").setAttribute("aria-invalid", String(wrong));
}

function number(id, name) {
  const input = field(id);
  if (!input.checkValidity()) throw new Failure(`${name}: ${input.validationMessage}`);
  return input.value === "" ? null : input.valueAsNumber;
}
