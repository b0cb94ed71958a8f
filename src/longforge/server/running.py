"""Running an app: a port of its own, a quiet end on Ctrl-C, and a server in a thread for programs."""

import contextlib
import errno
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from longforge.errors import InputError

__all__ = ["BackgroundServer", "Drain", "bind", "run_server"]

MAX_HEADER_BYTES = 65_536
"""Most bytes of a request's line and headers."""

GRACE_SECONDS = 5
"""Time that open connections get to end after the answers they carry were ended."""

UNTAKEN_SECONDS = 120
"""How long a connection may hold bytes that its other end takes none of; then the kernel ends it."""

SWITCH_SECONDS = 0.0005
"""How long Python lets one thread keep the interpreter while another waits. At the default, 5 ms, the HTTP
thread could delay every operation of the engine's step by as much."""


@dataclass(frozen=True)
class Drain:
    """An end that waits for open answers, `seconds` at most."""

    begin: Callable[[], None]
    """Refuse new requests from now on; called in a signal handler."""
    idle: Callable[[], bool]
    """Whether no answer is open."""
    seconds: float
    tell: Callable[[], None] = lambda: None
    """Called once where there is something to wait for."""


def bind(host: str, port: int) -> socket.socket:
    """A listening-to-be socket; port 0 picks a free one. InputError where there is none to have."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; the connections take it over
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNTAKEN_SECONDS)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (
        OSError,
        OverflowError,
        UnicodeError,
        TypeError,
    ) as error:  # the last two: a name that is no host's
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port}: it is in use on {host}; name another one with --port") from None
        raise InputError(f"cannot listen on {host} port {port}: {error}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn, telling when it is ready, and ending on a signal quietly and with its work done.

    The first signal begins to drain: the server still listens, so that it can say that it is not ready, and
    ends when it is idle or its time is up. The second ends what is open, the third waits for nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_ready: Callable[[], None],
        on_stop: Callable[[], None],
        drain: Drain | None = None,
        failed: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._drain = drain
        self._failed = failed
        self._drained_at: float | None = None
        """When waiting for open answers ends, in seconds of `time.monotonic`; None until a signal came."""
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._drain is None or self._drained_at is not None or self.should_exit:
            super().handle_exit(sig, frame)
            self.force_exit = len(self._captured_signals) > 2
            return
        self._captured_signals.append(sig)
        self._drained_at = time.monotonic() + self._drain.seconds
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now."""
        ended = await super().on_tick(counter) or self._failed()
        if self._drain is None or self._drained_at is None:
            return ended
        ended = ended or self._drain.idle() or time.monotonic() >= self._drained_at
        if not ended and not self._told:
            self._told = True
            self._drain.tell()
        return ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()  # before uvicorn waits for open answers: they end now
        await super().shutdown(sockets=sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            # Asked to stop and stopping is what should happen; uvicorn would raise the signal again here.
            self._captured_signals.clear()


def run_server(
    app: ASGIApp,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
    drain: Drain | None = None,
    failed: Callable[[], bool] = lambda: False,
) -> None:
    """Serves until SIGINT or SIGTERM, or until `failed`, asked ten times a second.

    on_stop is called first when it ends, to end open answers. drain: how long the first signal lets open
    answers go on (None: not at all).
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    _Server(app, on_ready, on_stop, drain, failed).run(sockets=[listener])


class BackgroundServer:
    """An app served by a thread of this process, for as long as the `with` block lasts.

    `url` is its base URL. on_stop as in `run_server`. Errors: InputError for a port in use.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._listener = bind(host, port)
        self.url = url_of(self._listener)
        self._server = _Server(app, lambda: None, on_stop)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def __enter__(self) -> "BackgroundServer":
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise InputError(f"{self.url}: the server did not start, see its log")
            time.sleep(0.005)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])
