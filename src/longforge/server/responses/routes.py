"""POST /v1/responses, and GET, DELETE, cancel and input_items of the responses it stored."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter

from longforge.errors import EngineError, InputError, LongforgeError
from longforge.protocol import Message
from longforge.server.encoding import encoded_conversation
from longforge.server.event_stream import EventStream
from longforge.server.responses.answering import Answering
from longforge.server.responses.events import new_id
from longforge.server.responses.items import Item, MessageItem, read_items
from longforge.server.responses.reply import Reply
from longforge.server.responses.store import ResponseStore, Stored
from longforge.server.responses.wire import ResponsesRequest
from longforge.server.seal import Seal, echo_headers
from longforge.server.service import (
    Caller,
    Service,
    caller_of,
    error_reply,
    model_check,
    unless_gone,
)
from longforge.server.turn import Turn
from longforge.server.wire_bytes import json_bytes, named_sse

__all__ = ["responses_router"]

_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])


def responses_router(service: Service, *, store: ResponseStore | None = None) -> APIRouter:
    """The endpoints. store: where responses are kept."""
    router = APIRouter()
    kept = ResponseStore() if store is None else store
    _add_create(router, service, kept)
    _add_stored(router, kept)
    return router


def _add_create(router: APIRouter, service: Service, store: ResponseStore) -> None:
    seal = Seal(service.model_name)
    running: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks only weakly

    @router.post("/v1/responses", response_model=None)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        if wrong := model_check(service, body.model):
            return wrong
        caller = caller_of(request)
        before: tuple[dict[str, Any], ...] = ()
        if body.previous_response_id is not None:
            previous = store.get(caller.tenant, body.previous_response_id)
            if previous is None:
                return _unknown(body.previous_response_id, "previous_response_id")
            before = _conversation(previous)
        own = _own_items(body)
        messages, echoes = read_items(_ITEMS.validate_python([*before, *own]), seal)
        answering = Answering(await _open_turn(service, caller, body, messages), Reply(body), seal)
        stored = Stored(answering.reply, (*before, *own), len(own))

        def keep() -> None:
            if body.stored:
                store.put(caller.tenant, stored)

        headers = echo_headers(echoes)
        if body.background:
            task = asyncio.ensure_future(_in_background(answering, lambda: store.grew(caller.tenant, stored)))
            running.add(task)
            task.add_done_callback(running.discard)
            stored.cancel = partial(_cancel, task, answering.turn)
            keep()
        elif body.stream:
            stream = EventStream(_stream(answering, keep), answering.turn.close, service.patience)
            stream.headers.update(headers)
            return stream
        else:
            try:
                await unless_gone(request, _whole(answering))
            finally:
                answering.turn.close()
            keep()
        return _reply(answering.reply.body, headers)


def _add_stored(router: APIRouter, store: ResponseStore) -> None:
    path = "/v1/responses/{name}"

    @router.get(path, response_model=None)
    async def retrieve(name: str, request: Request, stream: bool = False) -> Response:
        if stream:
            raise InputError("stream: a response is streamed while it is made, not afterwards; leave it out")
        stored = store.get(caller_of(request).tenant, name)
        return _unknown(name) if stored is None else _reply(stored.reply.body)

    @router.delete(path, response_model=None)
    async def delete(name: str, request: Request) -> Response:
        if not store.delete(caller_of(request).tenant, name):
            return _unknown(name)
        return _reply({"id": name, "object": "response", "deleted": True})

    @router.post(f"{path}/cancel", response_model=None)
    async def cancel(name: str, request: Request) -> Response:
        stored = store.get(caller_of(request).tenant, name)
        if stored is None:
            return _unknown(name)
        if not stored.reply.request.background:
            raise InputError("response: expected one that was made in the background, got another one")
        if stored.reply.status == "in_progress":
            stored.reply.status = "cancelled"
            stored.cancel()
        return _reply(stored.reply.body)

    @router.get(f"{path}/input_items", response_model=None)
    async def input_items(
        name: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        stored = store.get(caller_of(request).tenant, name)
        if stored is None:
            return _unknown(name)
        items = list(stored.input_items if order == "asc" else stored.input_items[::-1])
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise InputError(f"after: expected the id of an item of this response, got {after!r}")
            items = items[places[0] + 1 :]
        page = items[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return _reply({"object": "list", "data": page, "has_more": len(items) > limit, **ends})


def _conversation(previous: Stored) -> tuple[dict[str, Any], ...]:
    """What a response continues. InputError unless the one before it ended with an answer."""
    if previous.reply.status not in ("completed", "incomplete"):
        raise InputError(
            f"previous_response_id: expected a response with an answer, got one that is "
            f"{previous.reply.status}"
        )
    return previous.conversation


async def _open_turn(
    service: Service, caller: Caller, body: ResponsesRequest, messages: list[Message]
) -> Turn:
    if body.instructions:
        messages = [Message("system", body.instructions), *messages]
    context = service.loop.engine.context
    prompt = await encoded_conversation(
        service, messages, body.offered_tools, body.thinking_mode, context=context
    )
    return Turn(
        service,
        caller,
        prompt,
        body.params,
        tools=body.offered_tools,
        thinking=body.thinking_mode,
        constraint=body.constraint,
        eager=bool(body.stream),
    )


def _own_items(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The request's input as items with ids, as they are stored and listed."""
    given = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    items: list[dict[str, Any]] = []
    for item in given:
        fields = item.model_dump(exclude_none=True)
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            fields["content"] = [{"type": kind, "text": item.content}]
        items.append({"id": new_id("item"), "status": "completed", **fields})
    return items


async def _whole(answering: Answering) -> None:
    async for part in answering.turn.parts():
        for _ in answering.take(part):
            pass


async def _in_background(answering: Answering, keep: Callable[[], None]) -> None:
    try:
        await _whole(answering)
    except LongforgeError as error:
        answering.fail(error)
    finally:
        answering.turn.close()
        if answering.reply.status == "in_progress":  # a bug, which the event loop logs
            answering.fail(EngineError("server: an internal error, see its log"))
        keep()


def _cancel(task: asyncio.Task[None], turn: Turn) -> None:
    task.cancel()
    turn.close()  # a task that never began would not


async def _stream(answering: Answering, keep: Callable[[], None]) -> AsyncIterator[bytes]:
    yield b"".join(map(named_sse, answering.begin()))
    try:
        async for part in answering.turn.parts():
            events = b"".join(map(named_sse, answering.take(part)))
            if part.reason is not None:
                keep()
            yield events  # one write
    except LongforgeError as error:
        event = answering.fail(error)
        keep()
        yield named_sse(event)


def _reply(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(body), media_type="application/json", headers=headers)


def _unknown(name: str, param: str | None = None) -> Response:
    message = f"response {name!r}: there is none of this id, or it was forgotten"
    code = "previous_response_not_found" if param else "response_not_found"
    return error_reply(404, message, "not_found_error", param=param, code=code)
