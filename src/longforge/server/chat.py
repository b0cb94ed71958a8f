"""POST /v1/chat/completions: a conversation in, a message with thinking and tool calls out."""

import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from longforge.chat import Family, encode_prompt, starts_in_thinking
from longforge.chat.format import call_text
from longforge.chat.parser import ChatParser, Delta, message_of
from longforge.errors import LongforgeError
from longforge.server.answer import Answer
from longforge.server.replies import (
    DONE,
    ReplyHead,
    chat_body,
    chat_chunk,
    chat_delta_tool_call,
    finish_reason,
    new_call_id,
    sse,
    usage_body,
)
from longforge.server.service import EventStream, Service, failed, model_check, unless_gone
from longforge.server.wire import ChatRequest, to_messages

__all__ = ["chat_router"]


def chat_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if wrong := model_check(service, body.model):
            return wrong
        family = service.loop.engine.config.family
        prompt = encode_prompt(
            service.tokenizer,
            to_messages(body.messages),
            body.offered_tools,
            family=family,
            thinking=body.thinking_mode,
        )
        params = body.params(body.limit, service.tokenizer.stop_ids)
        answer = Answer(
            service.loop, service.tokenizer, prompt, params, stops=body.stops, eager=bool(body.stream)
        )
        reader = _Reader(body, family)
        head = ReplyHead(service.model_name, "chatcmpl")
        if body.stream:
            return EventStream(_events(answer, body, head, reader), answer.close)
        try:
            part = await unless_gone(request, answer.whole())
        finally:
            answer.close()
        assert part.reason is not None, "a whole answer has ended"
        message = message_of([*reader.push(part.text), *reader.finish()])
        usage = usage_body(len(prompt), len(part.events))
        return JSONResponse(chat_body(head, message, part.reason, usage))

    return router


class _Reader:
    """Deltas of one answer: calls get ids, and a call is text where no tools were offered."""

    def __init__(self, body: ChatRequest, family: Family) -> None:
        self._tools = body.offered_tools
        self._family: Family = family
        self._parser = ChatParser(family, self._tools, starts_in_thinking(family, body.thinking_mode))
        self.calls = 0

    def push(self, text: str) -> list[Delta]:
        return [self._allowed(delta) for delta in self._parser.push(text)]

    def finish(self) -> list[Delta]:
        return [self._allowed(delta) for delta in self._parser.finish()]

    def _allowed(self, delta: Delta) -> Delta:
        if delta.call is None:
            return delta
        if not self._tools:
            return Delta("content", call_text(delta.call, self._family))
        self.calls += 1
        return replace(delta, call=replace(delta.call, id=new_call_id()))


async def _events(
    answer: Answer, body: ChatRequest, head: ReplyHead, reader: _Reader
) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        whole = chat_chunk(head, delta, finish)
        return sse({**whole, "usage": None} if body.wants_usage_chunk else whole)

    tokens, places = 0, itertools.count()
    yield chunk({"role": "assistant", "content": ""})
    try:
        async for part in answer.parts():
            tokens += len(part.events)
            deltas = reader.push(part.text)
            if part.reason is not None:
                deltas += reader.finish()
            for delta in deltas:
                yield chunk(_delta_body(delta, places))
            if part.reason is not None:
                yield chunk({}, finish_reason(part.reason, tool_calls=reader.calls > 0))
    except LongforgeError as error:
        yield sse(failed(error)[1])
        return
    if body.wants_usage_chunk:
        usage = usage_body(len(answer.prompt_ids), tokens)
        yield sse(head.body("chat.completion.chunk", choices=[], usage=usage))
    yield DONE


def _delta_body(delta: Delta, places: Iterator[int]) -> dict[str, Any]:
    if delta.call is not None:
        return chat_delta_tool_call(delta.call, next(places))
    return {"reasoning_content" if delta.kind == "thinking" else "content": delta.text}
