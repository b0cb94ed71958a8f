// Requests to the server: JSON, streams of events, and what went wrong in words.

/** A failure that can be shown as it is. `status` is the HTTP status, 0 where there was no reply. */
export class Failure extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** Fetches with the API key. Throws Failure for anything but success, AbortError when it was aborted. */
export async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Does it still run?");
  }
  if (!response.ok) throw await refused(response);
  return response;
}

/** The parsed `data:` of each server-sent event until [DONE]. Throws Failure for an error or a cut stream. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new Failure("The connection ended before the answer did.");
      waiting += value;
      const lines = waiting.split("\n");
      waiting = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6).trimEnd();
        if (data === "[DONE]") return;
        const body = JSON.parse(data);
        if (body.error) throw new Failure(body.error.message);
        yield body;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already aborted: there is nothing left to cancel
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The connection broke before the answer ended.");
  }
}

async function refused(response) {
  const { status } = response;
  let said = null;
  try {
    said = (await response.json()).error;
  } catch {
    said = null; // a body that is no JSON: the status has to do
  }
  let message = said?.message ?? `The server answered with status ${status} ${response.statusText}.`;
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (Try again in ${wait} s.)`;
  return new Failure(message, { status, param: said?.param ?? null });
}
