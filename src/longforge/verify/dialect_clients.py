"""Clients of the four dialects, as small as they can be: they ask greedily and read what was said."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from longforge.errors import EngineError
from longforge.protocol import Message
from longforge.server.wire import message_body, tool_body
from longforge.verify.subject import Subject

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


def chat(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """POST /v1/chat/completions."""
    reply = _post(client, "/v1/chat/completions", _chat_body(subject, answer))
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


def chat_streamed(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """The same as a stream."""
    body = {**_chat_body(subject, answer), "stream_options": {"include_usage": True}}
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


def completion(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """POST /v1/completions with the rendered ids."""
    reply = _post(client, "/v1/completions", _completion_body(subject, answer))
    choice, usage = reply["choices"][0], reply["usage"]
    return Said(
        tokens=tuple(choice["token_ids"]),
        prompt_tokens=usage["prompt_tokens"],
        answer_tokens=usage["completion_tokens"],
        raw=choice["text"],
    )


def completion_streamed(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """The same as a stream."""
    tokens: list[int] = []
    text = ""
    for chunk in _events(client, "/v1/completions", _completion_body(subject, answer)):
        for choice in chunk["choices"]:
            tokens += choice.get("token_ids") or []
            text += choice["text"]
    return Said(tokens=tuple(tokens), raw=text)


def response(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """POST /v1/responses."""
    return _of_response(_post(client, "/v1/responses", _response_body(subject, answer)))


def response_streamed(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """The same as a stream: what its deltas add up to."""
    thinking = text = ""
    calls: list[list[str]] = []
    last: Json = {}
    for event in _events(client, "/v1/responses", _response_body(subject, answer)):
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


def message(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """POST /v1/messages."""
    reply = _post(client, "/v1/messages", _message_body(subject, answer))
    blocks, usage = reply["content"], reply["usage"]
    return Said(
        prompt_tokens=usage["input_tokens"] + usage["cache_read_input_tokens"],
        answer_tokens=usage["output_tokens"],
        thinking="".join(block.get("thinking", "") for block in blocks),
        text="".join(block.get("text", "") for block in blocks),
        calls=tuple((block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"),
    )


def message_streamed(client: httpx.Client, subject: Subject, answer: int) -> Said:
    """The same as a stream."""
    thinking = text = ""
    calls: list[list[str]] = []
    tokens = -1
    for event in _events(client, "/v1/messages", _message_body(subject, answer)):
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


def _chat_body(subject: Subject, answer: int) -> Json:
    return {
        **_common(subject),
        "messages": [message_body(one) for one in subject.conversation],
        "tools": [tool_body(tool) for tool in subject.tools],
        "thinking": {"type": "adaptive"},
        "max_tokens": answer,
        "return_token_ids": True,
    }


def _completion_body(subject: Subject, answer: int) -> Json:
    return {
        **_common(subject),
        "prompt": list(subject.chat()),
        "max_tokens": answer,
        "return_token_ids": True,
    }


def _response_body(subject: Subject, answer: int) -> Json:
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        }
        for tool in subject.tools
    ]
    items = [item for one in subject.conversation for item in _items(one)]
    effort = {"effort": "medium"}
    limits = {"max_output_tokens": answer, "store": False}
    return {**_common(subject), "input": items, "tools": tools, "reasoning": effort, **limits}


def _items(one: Message) -> Iterator[Json]:
    """A message as input items of the Responses dialect."""
    if one.role == "tool":
        yield {"type": "function_call_output", "call_id": one.tool_call_id, "output": one.content}
        return
    if one.thinking is not None:
        thought = [{"type": "reasoning_text", "text": one.thinking}]
        yield {"type": "reasoning", "summary": [], "content": thought}
    if one.content:
        yield {"role": one.role, "content": one.content}
    for call in one.tool_calls:
        arguments = json.dumps(call.arguments)
        yield {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": arguments}


def _message_body(subject: Subject, answer: int) -> Json:
    tools = [
        {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
        for tool in subject.tools
    ]
    system = "".join(one.content for one in subject.conversation if one.role == "system")
    turns = [_blocks(one) for one in subject.conversation if one.role != "system"]
    thinking = {"type": "adaptive"}
    body = {"system": system, "messages": turns, "tools": tools, "thinking": thinking, "max_tokens": answer}
    return {**_common(subject), **body}


def _blocks(one: Message) -> Json:
    """A message in the Messages dialect."""
    if one.role == "tool":
        result = {"type": "tool_result", "tool_use_id": one.tool_call_id, "content": one.content}
        return {"role": "user", "content": [result]}
    blocks: list[Json] = []
    if one.thinking is not None:
        blocks.append({"type": "thinking", "thinking": one.thinking})
    if one.content:
        blocks.append({"type": "text", "text": one.content})
    for call in one.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return {"role": one.role, "content": blocks}


def _common(subject: Subject) -> Json:
    return {"model": subject.name, "temperature": 0.0}


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
