"""Clients of the four dialects, as small as they can be: they ask greedily and read what was said."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from longforge.errors import EngineError
from longforge.verify.dialect_bodies import chat_body, completion_body, messages_body, response_body
from longforge.verify.subject import Talk

__all__ = [
    "Said",
    "chat",
    "chat_streamed",
    "completion",
    "completion_streamed",
    "message",
    "message_streamed",
    "response",
    "response_streamed",
]

Calls = tuple[tuple[str, dict[str, Any]], ...]
Json = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """What one dialect told of an answer; None for what it does not tell."""

    prompt: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    thinking: str | None = None
    text: str | None = None
    calls: Calls | None = None
    raw: str | None = None
    """The answer's text with its markup."""


def chat(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """POST /v1/chat/completions."""
    reply = _post(client, "/v1/chat/completions", chat_body(talk, answer))
    choice, usage = reply["choices"][0], reply["usage"]
    said = choice["message"]
    calls = [call["function"] for call in said.get("tool_calls") or ()]
    return Said(
        prompt=tuple(choice["prompt_token_ids"]),
        tokens=tuple(choice["token_ids"]),
        prompt_tokens=usage["prompt_tokens"],
        answer_tokens=usage["completion_tokens"],
        thinking=said.get("reasoning_content") or "",
        text=said["content"] or "",
        calls=tuple((call["name"], json.loads(call["arguments"])) for call in calls),
    )


def chat_streamed(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """The same as a stream."""
    body = {**chat_body(talk, answer), "stream_options": {"include_usage": True}}
    prompt: list[int] = []
    tokens: list[int] = []
    thinking = text = ""
    calls: list[list[str]] = []
    usage: Json = {}
    for chunk in _events(client, "/v1/chat/completions", body):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            prompt += choice.get("prompt_token_ids") or []
            tokens += choice.get("token_ids") or []
            thinking += delta.get("reasoning_content") or ""
            text += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if "name" in call["function"]:
                    calls.append([call["function"]["name"], ""])
                calls[call["index"]][1] += call["function"]["arguments"]
    return Said(
        prompt=tuple(prompt),
        tokens=tuple(tokens),
        prompt_tokens=usage.get("prompt_tokens", -1),
        answer_tokens=usage.get("completion_tokens", -1),
        thinking=thinking,
        text=text,
        calls=tuple((name, json.loads(arguments)) for name, arguments in calls),
    )


def completion(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """POST /v1/completions with the rendered ids."""
    reply = _post(client, "/v1/completions", completion_body(talk, answer))
    choice, usage = reply["choices"][0], reply["usage"]
    return Said(
        tokens=tuple(choice["token_ids"]),
        prompt_tokens=usage["prompt_tokens"],
        answer_tokens=usage["completion_tokens"],
        raw=choice["text"],
    )


def completion_streamed(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """The same as a stream."""
    tokens: list[int] = []
    text = ""
    for chunk in _events(client, "/v1/completions", completion_body(talk, answer)):
        for choice in chunk["choices"]:
            tokens += choice.get("token_ids") or []
            text += choice["text"]
    return Said(tokens=tuple(tokens), raw=text)


def response(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """POST /v1/responses."""
    return _of_response(_post(client, "/v1/responses", response_body(talk, answer)))


def response_streamed(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """The same as a stream: what its deltas add up to."""
    thinking = text = ""
    calls: list[list[str]] = []
    last: Json = {}
    for event in _events(client, "/v1/responses", response_body(talk, answer)):
        match event["type"]:
            case "response.reasoning_text.delta":
                thinking += event["delta"]
            case "response.output_text.delta":
                text += event["delta"]
            case "response.output_item.added" if event["item"]["type"] == "function_call":
                calls.append([event["item"]["name"], ""])
            case "response.function_call_arguments.delta":
                calls[-1][1] += event["delta"]
        last = event.get("response", last)
    usage = last.get("usage") or {}
    return Said(
        prompt_tokens=usage.get("input_tokens", -1),
        answer_tokens=usage.get("output_tokens", -1),
        thinking=thinking,
        text=text,
        calls=tuple((name, json.loads(arguments)) for name, arguments in calls),
    )


def message(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """POST /v1/messages."""
    reply = _post(client, "/v1/messages", messages_body(talk, answer))
    blocks, usage = reply["content"], reply["usage"]
    return Said(
        prompt_tokens=usage["input_tokens"] + usage["cache_read_input_tokens"],
        answer_tokens=usage["output_tokens"],
        thinking="".join(block.get("thinking", "") for block in blocks),
        text="".join(block.get("text", "") for block in blocks),
        calls=tuple((block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"),
    )


def message_streamed(client: httpx.Client, talk: Talk, answer: int) -> Said:
    """The same as a stream."""
    thinking = text = ""
    calls: list[list[str]] = []
    tokens = -1
    for event in _events(client, "/v1/messages", messages_body(talk, answer)):
        match event["type"]:
            case "content_block_start" if event["content_block"]["type"] == "tool_use":
                calls.append([event["content_block"]["name"], ""])
            case "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "input_json_delta":
                    calls[-1][1] += delta["partial_json"]
                thinking += delta.get("thinking", "")
                text += delta.get("text", "")
            case "message_delta":
                tokens = event["usage"]["output_tokens"]
    return Said(
        answer_tokens=tokens,
        thinking=thinking,
        text=text,
        calls=tuple((name, json.loads(arguments or "{}")) for name, arguments in calls),
    )


def _of_response(reply: Json) -> Said:
    output, usage = reply["output"], reply["usage"]
    calls = [item for item in output if item["type"] == "function_call"]

    def texts(kind: str) -> str:
        return "".join(part["text"] for item in output if item["type"] == kind for part in item["content"])

    return Said(
        prompt_tokens=usage["input_tokens"],
        answer_tokens=usage["output_tokens"],
        thinking=texts("reasoning"),
        text=texts("message"),
        calls=tuple((call["name"], json.loads(call["arguments"])) for call in calls),
    )


def _post(client: httpx.Client, path: str, body: Json) -> Json:
    reply = client.post(path, json=body)
    _check(path, reply)
    return reply.json()


def _events(client: httpx.Client, path: str, body: Json) -> Iterator[Json]:
    """The events of a stream. EngineError for one that is an error."""
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        if reply.status_code != 200:
            reply.read()
        _check(path, reply)
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("error"):
                raise EngineError(f"{path}: {event['error']}")
            yield event


def _check(path: str, reply: httpx.Response) -> None:
    if reply.status_code != 200:
        raise EngineError(f"{path}: status {reply.status_code}, {reply.text[:300]}")
