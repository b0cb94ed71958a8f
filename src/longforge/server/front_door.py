"""What is checked before any endpoint sees a request: host, origin, API key, size of the body."""

from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longforge.server.dialects import dialect_error
from longforge.server.keys import ApiKeys
from longforge.server.service import Caller

__all__ = ["LOOPBACK_HOSTS", "Door", "FrontDoor"]

LOOPBACK = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
MAX_HEADERS = 100
PAGE = "/page/"
"""What the web page is made of."""


@dataclass(frozen=True)
class Door:
    """Who may come in, and with how much.

    allowed_hosts: names that the Host header may have (None: any). A server on a loopback address names them,
    so that no web page can reach it under a name of its own. open_paths and what is below PAGE need no key:
    they hold nothing of anybody's.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    allowed_hosts: frozenset[str] | None = None
    max_body_bytes: int = 64 * 2**20
    open_paths: frozenset[str] = frozenset({"/", "/health", "/ready", "/version"})


class FrontDoor:
    """ASGI middleware. What it lets in has a `Caller` in its state."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(headers)
            caller = self._caller(scope, headers)
        except HTTPException as refused:
            reply = dialect_error(
                scope["path"], refused.status_code, refused.detail, headers=refused.headers or {}
            )
            await reply(scope, receive, send)
            return
        scope["state"] = {**scope.get("state", {}), "caller": caller}
        await self._app(scope, _limited(receive, self._door.max_body_bytes), send)

    def _check(self, headers: Headers) -> None:
        if len(headers.raw) > MAX_HEADERS:
            raise HTTPException(400, f"headers: expected at most {MAX_HEADERS}, got {len(headers.raw)}")
        host = headers.get("host", "")
        if self._door.allowed_hosts is not None:
            if _name(host) not in self._door.allowed_hosts:
                raise HTTPException(
                    403, f"host: {host[:100]!r} is not a name of this server; allow it with --allowed-host"
                )
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                raise HTTPException(403, f"origin: this server answers no pages of {origin[:100]!r}")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._door.max_body_bytes:
            raise _too_large(self._door.max_body_bytes)

    def _caller(self, scope: Scope, headers: Headers) -> Caller:
        if not self._door.keys:
            client = scope.get("client")
            local = client is not None and client[0] in LOOPBACK
            # Where no names are demanded, a web page in a browser on this machine could be anybody's.
            foreign = self._door.allowed_hosts is None and "origin" in headers
            return Caller(admin=local and not foreign)
        caller = self._door.keys.caller(_key(headers))
        if caller is not None:
            return caller
        if scope["path"] in self._door.open_paths or scope["path"].startswith(PAGE):
            return Caller(known=False)
        raise HTTPException(
            401,
            "api key: expected one this server knows, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            {"WWW-Authenticate": "Bearer"},
        )


def _limited(receive: Receive, most: int) -> Receive:
    """`receive`, refusing a body as soon as more than `most` bytes of it have come."""
    got = 0

    async def limited() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise _too_large(most)
        return message

    return limited


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"body: expected at most {most} bytes, got more", {"Connection": "close"})


def _name(host: str) -> str:
    """A Host header without its port, in lower case."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key", "").strip()
