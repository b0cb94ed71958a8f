// The page: reads a message, streams the answer, asks for the results of tool calls, goes on.

import { Answer } from "/page/conversation.js";
import { Failure, events, request } from "/page/events.js";
import { requestSettings, showToolsState, systemMessages } from "/page/settings.js";
import { showBlocks } from "/page/strip.js";
import { AnswerView, announce, clearLog, showFailure, showRetry, showUser } from "/page/view.js";

const KEY = "longforge-api-key";
const part = (id) => document.getElementById(id);
const welcome = part("welcome");

const state = {
  model: null,
  messages: [],
  running: null, // the AbortController of the answer that is under way
  waiting: false, // for the results of calls
  reportsBlocks: true, // until the server says that it does not know the field
  generation: 0, // counts chats, so that what belongs to an old one is dropped
};

// --- the server ---------------------------------------------------------------------------------------------

async function connect() {
  try {
    const reply = await request("/v1/models", sessionStorage.getItem(KEY));
    const card = (await reply.json()).data[0];
    state.model = card.id;
    const context = card.max_model_len ? `, ${card.max_model_len.toLocaleString("en")} tokens of context` : "";
    part("model").textContent = card.id;
    part("context").textContent = context;
    part("key-form").hidden = true;
    return true;
  } catch (error) {
    tell(error);
    return false;
  }
}

/** Streams one answer. A server that does not report blocks is asked again without. */
async function open(body, signal) {
  const options = (sent) => ({
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(sent),
    signal,
  });
  const path = "/v1/chat/completions";
  const key = sessionStorage.getItem(KEY);
  if (!state.reportsBlocks) return request(path, key, options(body));
  try {
    return await request(path, key, options({ ...body, report_blocks: true }));
  } catch (error) {
    if (error.param !== "report_blocks") throw error;
    state.reportsBlocks = false;
    return request(path, key, options(body));
  }
}

function tell(error) {
  if (error.status === 401) {
    part("key-form").hidden = false;
    part("key").focus();
    if (sessionStorage.getItem(KEY)) showFailure(error.message);
    sessionStorage.removeItem(KEY);
    announce("This server asks for an API key.");
  } else if (error instanceof Failure) {
    showFailure(error.message);
  } else {
    showFailure(`The page has a fault: ${error.message}`);
    throw error;
  }
}

// --- one answer ---------------------------------------------------------------------------------------------

/** Answers what `state.messages` ends with. False if nothing could be asked. */
async function run() {
  const generation = state.generation;
  if (state.model === null && !(await connect())) return false;
  const answer = new Answer();
  const controller = new AbortController();
  let view = null;
  let outcome = "";
  let failure = null;
  setRunning(controller);
  showBlocks(null);
  try {
    const body = {
      model: state.model,
      messages: [...systemMessages(), ...state.messages],
      stream: true,
      stream_options: { include_usage: true },
      ...requestSettings(),
    };
    view = new AnswerView();
    announce("The model answers.");
    for await (const chunk of events(await open(body, controller.signal))) {
      if (chunk.longforge) showBlocks(chunk.longforge);
      view.update(answer, answer.add(chunk));
    }
    if (answer.finish === "length") outcome = "Cut off: the limit of tokens was reached.";
  } catch (error) {
    if (error.name === "AbortError") outcome = "Stopped.";
    else failure = error;
  }
  if (generation !== state.generation) return true;
  setRunning(null);
  if (failure && !answer.content && answer.thinking === null && !answer.calls.length) {
    view?.article.remove();
    tell(failure);
    return false;
  }
  finish(answer, view, outcome, failure);
  return true;
}

function finish(answer, view, outcome, failure) {
  view.end(answer, outcome);
  if (failure) tell(failure);
  if (outcome === "Stopped." || failure) answer.calls = [];
  state.messages.push(answer.message());
  const calls = answer.wholeCalls;
  if (calls.length) {
    state.waiting = true;
    setRunning(null);
    announce(`The model calls ${calls.map((call) => call.name).join(", ")}. Type what it returns.`);
    view.askResults(calls, (results) => goOn(calls, results));
  } else {
    announce(`${outcome} ${answer.content}`.trim());
    part("question").focus();
  }
}

function goOn(calls, results) {
  state.waiting = false;
  for (const [place, call] of calls.entries()) {
    state.messages.push({ role: "tool", tool_call_id: call.id, content: results[place] });
  }
  retry();
}

/** Asks for the next answer, and offers to ask again where nothing came. */
async function retry() {
  const generation = state.generation;
  if (!(await run()) && generation === state.generation) showRetry(retry);
}

async function ask(text) {
  welcome.remove();
  const said = showUser(text);
  state.messages.push({ role: "user", content: text });
  if (await run()) return;
  // Nothing was answered: the question goes back to where it can be changed.
  state.messages.pop();
  said.remove();
  const question = part("question");
  if (!question.value) question.value = text;
  fit(question);
}

// --- the controls -------------------------------------------------------------------------------------------

function setRunning(controller) {
  state.running = controller;
  part("send").hidden = controller !== null;
  part("stop").hidden = controller === null;
  part("send").disabled = state.waiting;
  part("question").placeholder = state.waiting ? "Waiting for the result above" : "Your message";
}

function stop() {
  state.running?.abort();
}

function newChat() {
  stop();
  state.generation += 1;
  state.messages = [];
  state.waiting = false;
  setRunning(null);
  showBlocks(null);
  clearLog();
  part("log").append(welcome);
  announce("A new chat.");
  part("question").focus();
}

function send() {
  const question = part("question");
  const text = question.value;
  if (!text.trim() || state.running || state.waiting) return;
  question.value = "";
  fit(question);
  ask(text);
}

async function example() {
  try {
    const { system, question, tools } = await (await request("/page/examples.json", null)).json();
    part("system").value = system;
    part("tools").value = JSON.stringify(tools, null, 2);
    part("question").value = question;
    showToolsState();
    fit(part("question"));
    part("question").focus();
  } catch (error) {
    tell(error);
  }
}

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, window.innerHeight / 3)}px`;
}

part("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
part("question").addEventListener("input", () => fit(part("question")));
part("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
part("stop").addEventListener("click", stop);
part("new-chat").addEventListener("click", newChat);
part("example").addEventListener("click", example);
part("tools").addEventListener("input", showToolsState);
part("show-settings").addEventListener("click", () => {
  const shown = part("settings").classList.toggle("shown");
  part("show-settings").setAttribute("aria-expanded", String(shown));
});
part("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, part("key").value);
  part("key").value = "";
  if (await connect()) part("question").focus();
});

connect();
part("question").focus();
