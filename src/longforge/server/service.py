"""What every endpoint needs, and how errors become replies."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from longforge.chat import Tokenizer
from longforge.errors import ContextOverflow, EngineError, LongforgeError, Overloaded
from longforge.server.engine_loop import EngineLoop
from longforge.server.event_stream import Patience
from longforge.server.json_reply import JsonReply
from longforge.server.observed import Observer, ignore
from longforge.server.replies import error_body

__all__ = [
    "Caller",
    "ClientGone",
    "Service",
    "allowed_priority",
    "error_reply",
    "failed",
    "model_check",
    "unless_gone",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One served model."""

    loop: EngineLoop
    tokenizer: Tokenizer
    model_name: str
    observer: Observer = ignore
    """Is told of each answer that is over."""
    patience: Patience = field(default_factory=Patience)
    """With those who read a stream."""


@dataclass(frozen=True)
class Caller:
    """Who asks. The tenant follows from the API key; a caller cannot name it."""

    tenant: str = ""
    admin: bool = False
    """Whether it may pause the engine, change its weights and the like."""
    known: bool = True
    """False without the API key that the server asks for."""


def caller_of(request: Request) -> Caller:
    """Who sent a request, as the server's front door found out."""
    return getattr(request.state, "caller", Caller())


def allowed_priority(caller: Caller, asked: int | None) -> int:
    """The priority of a request; 0 without a word, lower is served earlier.

    Errors: HTTPException 403 for one below 0, ahead of everybody else's, unless the caller is an operator.
    """
    if asked is not None and asked < 0 and not caller.admin:
        raise HTTPException(
            403, f"priority: below 0 it needs the key named 'admin'; expected 0 or more, got {asked}"
        )
    return asked or 0


class ClientGone(Exception):
    """The client hung up before its answer was ready; there is nobody to tell."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client hangs up first, `work` is cancelled and ClientGone raised."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientGone
    finally:
        answer.cancel()
        gone.cancel()


def model_check(service: Service, asked: str) -> JSONResponse | None:
    """A 404 reply naming both models, unless the served one is asked for."""
    if asked == service.model_name:
        return None
    message = f"model: this server serves {service.model_name!r}, got {asked!r}"
    return error_reply(404, message, "not_found_error", param="model", code="model_not_found")


def error_reply(
    status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    return JsonReply(error_body(message, kind, param=param, code=code), status)


def failed(error: LongforgeError, *, draining: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and body of an error raised on purpose: 400 for a request's fault, 503 for the engine's.

    429 where the same request may be served later, unless the server is draining.
    """
    if isinstance(error, Overloaded) and not draining:
        return 429, error_body(str(error), "overloaded_error", code="overloaded")
    if isinstance(error, EngineError):
        return 503, error_body(str(error), "service_unavailable_error")
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
    return 400, error_body(str(error), "invalid_request_error", code=code)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
