"""What the tiers did, as plain numbers."""

from dataclasses import dataclass

__all__ = ["TierStats", "TiersStats"]


@dataclass(frozen=True)
class TierStats:
    """One tier. Counts are since the start and of pages unless they say bytes."""

    hits: int
    """Restored from here."""
    misses: int
    """Looked for by `Tiers.longest_run` and not here."""
    bytes_loaded: int
    stored: int
    """Written here: put into memory, or a file of ours in its place."""
    pages: int
    """Held now. For files, of all processes, as of the last look into the folder."""
    bytes: int
    """Held now, as `pages`."""
    evicted: int
    dropped: int
    """Not stored: too large, the queue was full, or the tier has stopped storing."""
    refused: int
    """Loads, of one or more pages, that the gate refused."""
    damaged: int
    """Found incomplete, altered or foreign, and deleted."""
    failures: int
    """Errors of the file system."""
    reason: str | None
    """Why the tier stopped reading or storing; None while it works."""


@dataclass(frozen=True)
class TiersStats:
    """Both tiers; None for one that there is not."""

    host: TierStats | None
    files: TierStats | None
