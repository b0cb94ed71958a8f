"""Clients of a server under load: four dialects, polite and not, all drawn from one seed."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
TEXTS = ("Which file?", "def read(path): return lines", "naïve café ☕ 字", "the class " * 12)
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
CONTEXT = 1024


@dataclass
class Client:
    """One request and how it is made."""

    path: str
    body: bytes
    tenant: str
    manner: str
    """polite, slow (stops reading for a while), leaves (in the midst), bad (must be refused)."""
    patience: float = 0.0
    """Seconds until it leaves, or for which it does not read."""
    status: int = 0
    reply: bytes = field(default=b"", repr=False)

    async def ask(self, port: int) -> None:
        """Asks as its manner is. Afterwards `status` and `reply` are set, unless it has left."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer key-of-{self.tenant}-1234\r\nConnection: close\r\n"
        try:
            writer.write(f"{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body)
            if self.manner == "leaves":
                await asyncio.sleep(self.patience)
                return
            first = await reader.read(2**10)
            if self.manner == "slow":
                await asyncio.sleep(self.patience)
            whole = first + await reader.read()
        finally:
            writer.close()
        head_bytes, _, rest = whole.partition(b"\r\n\r\n")
        self.status = int(head_bytes.split()[1])
        self.reply = unchunked(rest) if b"chunked" in head_bytes.lower() else rest


def unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        if not int(size, 16):
            return b"".join(parts)
        body = rest[int(size, 16) + 2 :]
    raise AssertionError("a stream was cut off")


def events(reply: bytes) -> list[Any]:
    """The data of a stream's events, without the OpenAI end mark."""
    lines = [line[6:] for line in reply.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def said(path: str, reply: bytes) -> tuple[str, str]:
    """The text of an answer, thinking before it, and how it ended; the same streamed or not."""
    if not reply.startswith(b"{"):
        return STREAMED[path](events(reply))
    body = json.loads(reply)
    if path in (CHAT, COMPLETIONS):
        (choice,) = body["choices"]
        message = choice.get("message") or {"content": choice["text"]}
        text = (message.get("reasoning_content") or "") + "|" + (message["content"] or "")
        return text, choice["finish_reason"]
    if path == RESPONSES:
        return _of_response(body)
    kinds = {"thinking": "", "text": ""}
    for block in body["content"]:
        kinds[block["type"]] += block[block["type"]]
    return f"{kinds['thinking']}|{kinds['text']}", body["stop_reason"]


def _of_response(body: dict[str, Any]) -> tuple[str, str]:
    texts = {"reasoning": "", "message": ""}
    for item in body["output"]:
        texts[item["type"]] += "".join(part["text"] for part in item.get("content") or [])
    return f"{texts['reasoning']}|{texts['message']}", body["status"]


def _of_chunks(parts: list[Any]) -> tuple[str, str]:
    thinking = content = end = ""
    for part in parts:
        for choice in part["choices"]:
            delta = choice.get("delta") or {"content": choice.get("text")}
            thinking += delta.get("reasoning_content") or ""
            content += delta.get("content") or ""
            end = choice["finish_reason"] or end
    return f"{thinking}|{content}", end


def _of_blocks(parts: list[Any]) -> tuple[str, str]:
    kinds, end = {"thinking": "", "text": ""}, ""
    for part in parts:
        delta = part.get("delta") or {}
        for kind in kinds:
            kinds[kind] += delta.get(kind, "")
        end = delta.get("stop_reason") or end
    assert parts[-1]["type"] == "message_stop", parts[-1]
    return f"{kinds['thinking']}|{kinds['text']}", end


STREAMED = {
    CHAT: _of_chunks,
    COMPLETIONS: _of_chunks,
    RESPONSES: lambda parts: _of_response(parts[-1]["response"]),
    MESSAGES: _of_blocks,
}


def question(draws: random.Random, path: str) -> dict[str, Any]:
    """A greedy request; few enough different ones that many share their beginning."""
    text = draws.choice(TEXTS)
    most = draws.randrange(3, 14)
    talk = [{"role": "user", "content": text * draws.randrange(1, 4)}]
    body: dict[str, Any] = {"model": "small", "temperature": 0, "top_p": 1}
    if path == COMPLETIONS:
        start = [7 + i % 200 for i in range(draws.choice((3, 40, 150)))]
        return body | {"prompt": [*start, draws.randrange(5)], "max_tokens": most, "ignore_eos": True}
    if path == RESPONSES:
        return body | {"input": talk, "max_output_tokens": 16 + most}
    body |= {"messages": talk, "max_tokens": most}
    if path == CHAT and draws.random() < 0.3:
        schema = {"name": "a", "schema": SCHEMA, "strict": True}
        return body | {
            "response_format": {"type": "json_schema", "json_schema": schema},
            "thinking": {"type": "disabled"},
            "max_tokens": 60,
        }
    return body


def nonsense(draws: random.Random) -> tuple[str, bytes]:
    """A path and a body that must be refused."""
    path = draws.choice((CHAT, COMPLETIONS, RESPONSES, MESSAGES))
    good = question(draws, path)
    prompt = {COMPLETIONS: "prompt", RESPONSES: "input"}.get(path, "messages")
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    wrong: list[Any] = [
        good | {prompt: {"a": 1}},
        good | {limit: "many"},
        good | {"temperature": "hot"},
        good | {"temperature": 10**400},
        good | {limit: -(10**30)},
        {"model": "small"},
        [good],
        None,
    ]
    raw = [b"", b"{", b"\xff\xfe", b"[" * 20_000, b'{"model": ' + b"9" * 10_000 + b"}"]
    too_long = good | {prompt: [{"role": "user", "content": "long " * 2 * CONTEXT}]}
    if path == COMPLETIONS:
        too_long[prompt] = [1] * (CONTEXT + 1)
        wrong += [good | {prompt: [10**9]}, good | {prompt: [-1]}]
    return path, draws.choice([*raw, *(json.dumps(body).encode() for body in [*wrong, too_long])])


def crowd(seed: int, count: int, tenants: tuple[str, ...]) -> list[Client]:
    """So many clients of every kind."""
    draws = random.Random(seed)
    clients = []
    for number in range(count):
        manner = draws.choices(("polite", "slow", "leaves", "bad"), (6, 1, 2, 1))[0]
        path = draws.choice((CHAT, COMPLETIONS, RESPONSES, MESSAGES))
        tenant = draws.choice(tenants)
        if manner == "bad":
            path, body = nonsense(draws)
        else:
            asked = question(draws, path) | {"stream": draws.random() < 0.6}
            if path in (CHAT, COMPLETIONS):
                asked["priority"] = max(0, draws.randrange(-3, 4))
            if manner == "slow":
                path, asked = COMPLETIONS, {"model": "small", "prompt": [1, number % 280], "temperature": 0}
                asked |= {"max_tokens": 60, "ignore_eos": True, "logprobs": 20, "stream": True}
            if manner == "leaves" and path == COMPLETIONS:
                asked["max_tokens"] = 700
            body = json.dumps(asked).encode()
        clients.append(Client(path, body, tenant, manner, draws.random() * 1.5))
    return clients
