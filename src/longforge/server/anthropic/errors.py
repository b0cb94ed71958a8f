"""Everything that goes wrong inside a route of the Messages dialect, in the dialect's own form."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from longforge.errors import EngineError, LongforgeError, Overloaded
from longforge.server.anthropic.events import error_body
from longforge.server.invalid import describe_invalid
from longforge.server.service import ClientGone

__all__ = ["AnthropicRoute", "told"]

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
RETRY_SECONDS = "1"
"""What an overloaded server says about when to come back: requests end all the time."""

logger = logging.getLogger(__name__)


class AnthropicRoute(APIRoute):
    """A route whose errors are written as the dialect writes them, unreadable bodies and bugs included."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler with its errors caught."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers: dict[str, str] = {}
            try:
                return await handler(request)
            except ClientGone:
                raise
            except LongforgeError as error:
                status, body = told(error)
            except RequestValidationError as error:
                status, body = 400, error_body(describe_invalid(error.errors(), error.body)[0], KINDS[400])
            except HTTPException as error:
                status = error.status_code
                body = error_body(str(error.detail), KINDS.get(status, KINDS[400]))
                headers |= error.headers or {}
            except Exception:  # the border: a bug is logged and told in this dialect's form, as app.py does
                logger.exception("%s %s failed", request.method, request.url.path)
                status, body = 500, error_body("server: an internal error, see its log", KINDS[500])
            if status in (429, 529):
                headers.setdefault("retry-after", RETRY_SECONDS)
            return JSONResponse(body, status, headers)

        return handle


def told(error: LongforgeError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error raised on purpose."""
    if isinstance(error, Overloaded):
        status = 529
    else:
        status = 500 if isinstance(error, EngineError) else 400
    return status, error_body(str(error), KINDS[status])
