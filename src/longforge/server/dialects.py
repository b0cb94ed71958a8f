"""Errors in the form of the dialect that a path belongs to."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from longforge.errors import LongforgeError
from longforge.server.json_reply import JsonReply
from longforge.server.replies import error_body
from longforge.server.service import failed

__all__ = ["dialect_error", "dialect_failure"]

ANTHROPIC = ("/v1/messages", "/anthropic/v1/messages")
ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    503: "service_unavailable_error",
}
RETRY_SECONDS = 1


def dialect_error(
    path: str,
    status: int,
    message: str,
    kind: str | None = None,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as the clients of `path` expect it. kind: OpenAI's type (None: that of the status)."""
    if _is_anthropic(path):
        error = {"type": ANTHROPIC_KINDS.get(status, "api_error"), "message": message}
        body: dict[str, Any] = {"type": "error", "error": error}
    else:
        body = error_body(message, kind or KINDS.get(status, "invalid_request_error"), param=param, code=code)
    return JsonReply(body, status, headers=dict(headers or {}))


def dialect_failure(path: str, error: LongforgeError, *, draining: bool) -> JSONResponse:
    """The reply to a request that failed on purpose.

    Overload is 429, or 503 while the server is draining, with a Retry-After header; Anthropic's clients know
    both as an overloaded_error.
    """
    status, body = failed(error, draining=draining)
    told = body["error"]
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    if status == 429 and _is_anthropic(path):
        overloaded = {"type": "overloaded_error", "message": told["message"]}
        return JsonReply({"type": "error", "error": overloaded}, status, headers=headers)
    return dialect_error(
        path, status, told["message"], told["type"], param=told["param"], code=told["code"], headers=headers
    )


def _is_anthropic(path: str) -> bool:
    return path in ANTHROPIC or path.startswith(tuple(f"{known}/" for known in ANTHROPIC))
