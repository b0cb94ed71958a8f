"""Servers to be treated badly, and what must be true of them when nobody asks for anything."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longforge.engine import Engine
from longforge.engine.grammar import Grammars
from longforge.model import CausalLM
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.event_stream import Patience
from longforge.server.front_door import Door
from longforge.server.keys import ApiKeys
from longforge.server.running import BackgroundServer
from small_model import small_model, small_tokenizer

TENANTS = ("ann", "bob", "eve")


def key_of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{tenant}-1234"}


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@contextmanager
def serving(
    model: CausalLM | None = None,
    *,
    tenants: tuple[str, ...] = (),
    limits: dict[str, int] | None = None,
    engine_class: type[Engine] = Engine,
    patience: Patience = Patience(),
    **sizes: Any,
) -> Iterator[tuple[EngineLoop, str]]:
    """A running server: its loop and base URL. tenants: who has a key; without any none is asked for."""
    model = small_model(max_positions=1024) if model is None else model
    grammars = Grammars(small_tokenizer(), model.config.vocab_size)
    engine = engine_class(model, **{"pages": 300, "max_running": 4, "grammars": grammars, **sizes})
    loop = EngineLoop(engine, threads=1, **(limits or {}))
    door = Door(ApiKeys.of({name: f"key-of-{name}-1234" for name in tenants}))
    app = create_app(loop, small_tokenizer(), "small", door=door, patience=patience)
    with BackgroundServer(app, on_stop=loop.stop) as server:
        yield loop, server.url
    engine.close()


def idle(loop: EngineLoop) -> bool:
    """Nothing is open, every page is free or cached."""
    stats = loop.stats()
    at_rest = stats.running == stats.waiting == loop.open_requests == 0
    return at_rest and stats.free_pages + stats.cached_pages == stats.pages


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def python_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
