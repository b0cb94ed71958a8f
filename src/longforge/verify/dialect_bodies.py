"""What the four dialects are sent to answer a conversation greedily. answer: most tokens."""

import json
from collections.abc import Iterator
from typing import Any

from longforge.protocol import Message
from longforge.server.wire import message_body, tool_body
from longforge.verify.subject import Talk

__all__ = ["chat_body", "completion_body", "messages_body", "response_body"]

Json = dict[str, Any]


def chat_body(talk: Talk, answer: int) -> Json:
    """POST /v1/chat/completions."""
    return {
        **_common(talk),
        "messages": [message_body(one) for one in talk.messages],
        "tools": [tool_body(tool) for tool in talk.tools],
        "thinking": {"type": "adaptive"},
        "max_tokens": answer,
        "return_token_ids": True,
    }


def completion_body(talk: Talk, answer: int) -> Json:
    """POST /v1/completions, with the rendered ids."""
    return {
        **_common(talk),
        "prompt": list(talk.prompt),
        "max_tokens": answer,
        "return_token_ids": True,
    }


def response_body(talk: Talk, answer: int) -> Json:
    """POST /v1/responses."""
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        }
        for tool in talk.tools
    ]
    items = [item for one in talk.messages for item in _items(one)]
    effort = {"effort": "medium"}
    limits = {"max_output_tokens": answer, "store": False}
    return {**_common(talk), "input": items, "tools": tools, "reasoning": effort, **limits}


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


def messages_body(talk: Talk, answer: int) -> Json:
    """POST /v1/messages."""
    tools = [
        {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
        for tool in talk.tools
    ]
    system = "".join(one.content for one in talk.messages if one.role == "system")
    turns = [_blocks(one) for one in talk.messages if one.role != "system"]
    thinking = {"type": "adaptive"}
    body = {"system": system, "messages": turns, "tools": tools, "thinking": thinking, "max_tokens": answer}
    return {**_common(talk), **body}


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


def _common(talk: Talk) -> Json:
    return {"model": talk.model, "temperature": 0.0}
