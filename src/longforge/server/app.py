"""The HTTP app: endpoints over one engine loop, every error in OpenAI's form."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from longforge import __version__
from longforge.chat import Tokenizer
from longforge.errors import LongforgeError
from longforge.server.admin import admin_router
from longforge.server.anthropic.routes import messages_router
from longforge.server.chat import chat_router
from longforge.server.completions import completions_router
from longforge.server.engine_loop import EngineLoop
from longforge.server.invalid import describe_invalid
from longforge.server.responses.routes import responses_router
from longforge.server.service import ClientGone, Service, error_reply, failed, model_check

__all__ = ["create_app"]

CLIENT_CLOSED_REQUEST = 499


def create_app(engine_loop: EngineLoop, tokenizer: Tokenizer, model_name: str) -> FastAPI:
    """The app of one model. It starts the loop when it starts and stops it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine_loop.start()
        yield
        engine_loop.stop()

    service = Service(engine_loop, tokenizer, model_name)
    app = FastAPI(title="Longforge", version=__version__, lifespan=lifespan)
    app.include_router(chat_router(service))
    app.include_router(completions_router(service))
    app.include_router(messages_router(service))
    app.include_router(responses_router(service))
    app.include_router(admin_router(service))
    _add_information(app, service)
    _add_errors(app)
    return app


def _add_information(app: FastAPI, service: Service) -> None:
    card = {
        "id": service.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "longforge",
        "max_model_len": service.loop.engine.context,
    }

    @app.get("/health", response_model=None)
    async def health() -> Response:
        failure = service.loop.failure
        status = {"status": "ok" if failure is None else str(failure), "model": service.model_name}
        return JSONResponse({**status, **asdict(service.loop.stats())}, 200 if failure is None else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model}", response_model=None)
    async def model(model: str) -> Response:
        return model_check(service, model) or JSONResponse(card)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LongforgeError)
    async def on_purpose(request: Request, error: LongforgeError) -> Response:
        status, body = failed(error)
        return JSONResponse(body, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, field = describe_invalid(error.errors())
        return error_reply(400, message, "invalid_request_error", param=field)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = "not_found_error" if error.status_code == HTTPStatus.NOT_FOUND else "invalid_request_error"
        return error_reply(error.status_code, f"{request.method} {request.url.path}: {error.detail}", kind)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return error_reply(500, "server: an internal error, see its log", "server_error")
