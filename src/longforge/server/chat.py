"""POST /v1/chat/completions: a conversation in, a message with thinking and tool calls out."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from longforge.chat.parser import Delta
from longforge.errors import LongforgeError
from longforge.server.replies import (
    DONE,
    ReplyHead,
    chat_body,
    chat_chunk,
    finish_reason,
    sse,
    usage_body,
)
from longforge.server.service import EventStream, Service, caller_of, failed, model_check, unless_gone
from longforge.server.turn import Turn
from longforge.server.wire import ChatRequest, to_messages

__all__ = ["chat_router"]


def chat_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if wrong := model_check(service, body.model):
            return wrong
        turn = Turn(
            service,
            caller_of(request),
            to_messages(body.messages),
            body.params(body.limit, ()),
            tools=body.offered_tools,
            thinking=body.thinking_mode,
            stops=body.stops,
            eager=bool(body.stream),
        )
        head = ReplyHead(service.model_name, "chatcmpl")
        if body.stream:
            return EventStream(_events(turn, body, head), turn.close)
        try:
            message, reason = await unless_gone(request, turn.whole())
        finally:
            turn.close()
        usage = usage_body(len(turn.prompt_ids), turn.completion_tokens)
        return JSONResponse(chat_body(head, message, reason, usage))

    return router


async def _events(turn: Turn, body: ChatRequest, head: ReplyHead) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        whole = chat_chunk(head, delta, finish)
        return sse({**whole, "usage": None} if body.wants_usage_chunk else whole)

    place = -1
    yield chunk({"role": "assistant", "content": ""})
    try:
        async for part in turn.parts():
            for delta in part.deltas:
                place += delta.kind == "call_start"
                if fields := _delta_body(delta, place):
                    yield chunk(fields)
            if part.reason is not None:
                yield chunk({}, finish_reason(part.reason, tool_calls=turn.calls > 0))
    except LongforgeError as error:
        yield sse(failed(error)[1])
        return
    if body.wants_usage_chunk:
        usage = usage_body(len(turn.prompt_ids), turn.completion_tokens)
        yield sse(head.body("chat.completion.chunk", choices=[], usage=usage))
    yield DONE


def _delta_body(delta: Delta, place: int) -> dict[str, Any]:
    """The fields of one chunk's delta; none for the end of a call, which says nothing new."""
    match delta.kind:
        case "thinking":
            return {"reasoning_content": delta.text}
        case "content":
            return {"content": delta.text}
        case "call_start":
            assert delta.call is not None, "a call starts with its name"
            function = {"name": delta.call.name, "arguments": ""}
            return {
                "tool_calls": [
                    {"index": place, "id": delta.call.id, "type": "function", "function": function}
                ]
            }
        case "call_arguments":
            return {"tool_calls": [{"index": place, "function": {"arguments": delta.text}}]}
        case _:
            return {}
