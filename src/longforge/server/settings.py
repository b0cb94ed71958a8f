"""The options of `longforge serve`, as plain data."""

import math
from dataclasses import dataclass
from pathlib import Path

from longforge.errors import InputError

__all__ = ["ServeSettings"]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What is served, where, and how much of it. Errors: InputError for a number that cannot be."""

    model: str | Path | None = None
    """Folder; None: the shipped demo model."""
    name: str | None = None
    """The model's name in requests; None: the folder's."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    threads: int | None = None
    """CPU threads; None: the cores that are free."""
    device: str = "auto"
    """As in `choose_placement`; so is dtype."""
    dtype: str = "auto"
    context: int | None = None
    """Most positions of a request, instead of the model's own."""
    pages: int | None = None
    """Pages in the pool; None: as in `default_pages`."""
    drafts: int | None = None
    """As in `chosen_drafts`."""
    host_cache_bytes: int = 0
    """Memory for pages that the pool has no room for."""
    file_cache: Path | None = None
    """Folder for such pages."""
    file_cache_bytes: int = 16 * 2**30
    max_running: int = 64
    """Most requests that generate at once."""
    max_requests: int = 1024
    """Most open requests; more are refused until some are done."""
    max_queued_tokens: int = 64_000_000
    """Most prompt tokens of open requests together."""
    api_key_file: Path | None = None
    """Lines name:key; a single key may also come from the environment (LONGFORGE_API_KEY)."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may give the server beside those of a loopback address."""
    max_body_bytes: int = 64 * 2**20
    drain_seconds: float = 30.0
    """How long open answers may go on after the first signal."""

    def __post_init__(self) -> None:
        if math.isnan(self.drain_seconds) or self.drain_seconds < 0:
            raise InputError(f"drain seconds: expected at least 0, got {self.drain_seconds}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads: expected at least 1, got {self.threads}")
        if self.context is not None and self.context < 2:
            raise InputError(f"context: expected at least 2 tokens, got {self.context}")
