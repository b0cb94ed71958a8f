"""An event loop in a thread of the conductor: gateway and rollouts run there while the main thread trains."""

import asyncio
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI

__all__ = ["BackgroundLoop", "HttpServer"]

T = TypeVar("T")


class BackgroundLoop:
    """A running event loop in a daemon thread. Use it as a context manager."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="forge-io", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Runs a coroutine on the loop; from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T], *, seconds: float | None = None) -> T:
        """Runs a coroutine on the loop and waits for it."""
        return self.start(work).result(seconds)

    def close(self) -> None:
        """Cancels what still runs and ends the thread."""
        if self.loop.is_closed():
            return
        self.run(_cancel_everything(), seconds=10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def __enter__(self) -> "BackgroundLoop":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HttpServer:
    """An ASGI application on a free port of the loopback interface."""

    def __init__(self, app: FastAPI, loop: BackgroundLoop) -> None:
        self._loop = loop
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        # Clients keep an idle connection for 5 s; a server that ended it just then would fail a request.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=60
        )
        self._server = uvicorn.Server(config)
        self._done = loop.start(self._server.serve(sockets=[self._socket]))

    def close(self) -> None:
        """Stops listening; requests in flight are cut off."""
        self._server.should_exit = True
        self._server.force_exit = True
        self._done.result(10)
        self._socket.close()


async def _cancel_everything() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
