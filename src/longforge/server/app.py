"""The HTTP app: endpoints over one engine loop, every error in the form of its dialect."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from longforge import __version__
from longforge.chat import Tokenizer
from longforge.errors import LongforgeError
from longforge.server.admin import admin_router
from longforge.server.anthropic.routes import messages_router
from longforge.server.chat import chat_router
from longforge.server.completions import completions_router
from longforge.server.dialects import dialect_error, dialect_failure
from longforge.server.engine_loop import EngineLoop
from longforge.server.event_stream import Patience
from longforge.server.front_door import Door, FrontDoor
from longforge.server.information import information_router
from longforge.server.invalid import describe_invalid
from longforge.server.metrics import Metrics
from longforge.server.page import page_router
from longforge.server.responses.routes import responses_router
from longforge.server.service import ClientGone, Service
from longforge.server.tokenize import tokenize_router

__all__ = ["create_app"]

CLIENT_CLOSED_REQUEST = 499


class ErrorDetail(BaseModel):
    """What went wrong, in one line."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "An error"}}


def create_app(
    engine_loop: EngineLoop,
    tokenizer: Tokenizer,
    model_name: str,
    *,
    door: Door = Door(),
    patience: Patience = Patience(),
) -> FastAPI:
    """The app of one model. It starts the loop when it starts and stops it when it ends.

    door: who may come in; by default everyone. patience: with those who read a stream.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine_loop.start()
        yield
        engine_loop.stop()

    metrics = Metrics(engine_loop, model_name)
    service = Service(engine_loop, tokenizer, model_name, metrics.observe, patience)
    app = FastAPI(title="Longforge", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(chat_router(service), responses=ERRORS)
    app.include_router(completions_router(service), responses=ERRORS)
    app.include_router(messages_router(service))
    app.include_router(responses_router(service), responses=ERRORS)
    app.include_router(tokenize_router(service), responses=ERRORS)
    app.include_router(admin_router(service), responses=ERRORS)
    app.include_router(information_router(service, metrics), responses=ERRORS)
    app.include_router(page_router())
    _add_errors(app, engine_loop)
    app.add_middleware(FrontDoor, door=door)
    return app


def _add_errors(app: FastAPI, loop: EngineLoop) -> None:
    @app.exception_handler(LongforgeError)
    async def on_purpose(request: Request, error: LongforgeError) -> Response:
        return dialect_failure(request.url.path, error, draining=loop.draining)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, field = describe_invalid(error.errors(), error.body)
        return dialect_error(request.url.path, 400, message, param=field)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {_detail(error)}"
        return dialect_error(request.url.path, error.status_code, message, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return dialect_error(request.url.path, 500, "server: an internal error, see its log")


def _detail(error: HTTPException) -> str:
    """What an HTTP error says; of a body that could not be read, why."""
    match error.__cause__:
        case RecursionError():
            return "body: expected JSON of few levels, got one nested too deeply"
        case UnicodeDecodeError():
            return "body: expected UTF-8, got other bytes"
        case ValueError():
            return "body: expected JSON with numbers of a reasonable length, got something else"
    return error.detail
