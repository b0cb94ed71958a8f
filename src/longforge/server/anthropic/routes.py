"""POST /v1/messages and /v1/messages/count_tokens; the same under /anthropic, as MiniMax serves them."""

from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from longforge.errors import LongforgeError
from longforge.server.anthropic.conversation import read_conversation
from longforge.server.anthropic.errors import AnthropicRoute, told
from longforge.server.anthropic.events import (
    BlockEvents,
    Event,
    Usage,
    Writer,
    error_body,
    message_of_events,
    start,
    stop_reason,
)
from longforge.server.anthropic.wire import CountRequest, MessagesRequest
from longforge.server.encoding import encoded_conversation
from longforge.server.event_stream import WAITING, EventStream
from longforge.server.seal import Seal, echo_headers
from longforge.server.service import Service, caller_of, unless_gone
from longforge.server.turn import Turn, TurnPart
from longforge.server.wire_bytes import json_bytes, named_sse

__all__ = ["messages_router"]

PING: Event = {"type": "ping"}


def messages_router(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(route_class=AnthropicRoute)
    seal = Seal(service.model_name)

    async def messages(body: MessagesRequest, request: Request) -> Response:
        if wrong := _wrong_model(service, body):
            return wrong
        conversation = read_conversation(body, seal)
        headers = echo_headers(conversation.echoes)
        prompt = await encoded_conversation(
            service,
            conversation.messages,
            body.offered_tools,
            body.thinking_mode,
            context=service.loop.engine.context,
        )
        turn = Turn(
            service,
            caller_of(request),
            prompt,
            body.params,
            tools=body.offered_tools,
            thinking=body.thinking_mode,
            constraint=body.constraint,
            stops=body.stop_sequences or (),
            eager=bool(body.stream),
            thinking_budget=body.thinking.budget_tokens if body.thinking else None,
        )
        answer = _Answering(service.model_name, turn, body, seal)
        if body.stream:
            stream = EventStream(_stream(answer), turn.close, service.patience, answer.sign)
            stream.headers.update(headers)
            return stream
        try:
            message = await unless_gone(request, _whole(answer))
        finally:
            turn.close()
        return Response(json_bytes(message), media_type="application/json", headers=headers)

    async def count_tokens(body: CountRequest, request: Request) -> Response:
        if wrong := _wrong_model(service, body):
            return wrong
        messages = read_conversation(body, seal).messages
        prompt = await encoded_conversation(  # as long as it likes
            service, messages, body.offered_tools, body.thinking_mode, context=None
        )
        return JSONResponse({"input_tokens": len(prompt)})

    for prefix in ("", "/anthropic"):
        router.add_api_route(f"{prefix}/v1/messages", messages, methods=["POST"], response_model=None)
        path = f"{prefix}/v1/messages/count_tokens"
        router.add_api_route(path, count_tokens, methods=["POST"], response_model=None)
    return router


class _Answering:
    """One turn as events, from its parts."""

    def __init__(self, model: str, turn: Turn, body: MessagesRequest, seal: Seal) -> None:
        self.turn = turn
        self.started = False
        self._model = model
        self._limit = body.max_tokens
        disabled = body.thinking_mode == "disabled"
        self._blocks = BlockEvents(Writer(seal, hidden=body.hides_thinking, drops_empty=disabled))

    def sign(self) -> bytes:
        """A sign of life: a ping, which the dialect has only after message_start."""
        return named_sse(PING) if self.started else WAITING

    def events(self, part: TurnPart) -> Iterator[Event]:
        """What one part adds."""
        turn = self.turn
        if not self.started:
            self.started = True
            yield start(self._model, Usage(len(turn.prompt_ids), turn.cached_tokens, len(part.events)))
            yield PING
        self._blocks.version = part.events[-1].version
        yield from self._blocks.push(part.deltas)
        if part.reason is not None:
            yield from self._blocks.finish()
            usage = Usage(len(turn.prompt_ids), turn.cached_tokens, turn.completion_tokens)
            yield stop_reason(part.reason, usage, self._limit, turn.stop_string, turn.calls)


async def _whole(answer: _Answering) -> dict[str, object]:
    events: list[Event] = []
    async for part in answer.turn.parts():
        events += answer.events(part)
    return message_of_events(events)


async def _stream(answer: _Answering) -> AsyncIterator[bytes]:
    try:
        async for part in answer.turn.parts():
            yield b"".join(named_sse(event) for event in answer.events(part))  # one write
    except LongforgeError as error:
        yield named_sse(told(error)[1])
        return
    yield named_sse({"type": "message_stop"})


def _wrong_model(service: Service, body: CountRequest) -> JSONResponse | None:
    if body.model == service.model_name:
        return None
    message = f"model: this server serves {service.model_name!r}, got {body.model!r}"
    return JSONResponse(error_body(message, "not_found_error"), 404)
