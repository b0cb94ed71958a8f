"""Both tiers behind one door: what the engine asks when a prompt begins, and tells when a page is full."""

import time
from collections.abc import Callable, Sequence

from longforge.engine.tiers.files import FileTier
from longforge.engine.tiers.gate import Gate
from longforge.engine.tiers.host import HostTier
from longforge.engine.tiers.keys import PageName
from longforge.engine.tiers.record import RecordFormat
from longforge.engine.tiers.stats import TiersStats, TierStats

__all__ = ["FILES", "HOST", "Tiers"]

HOST, FILES = "host", "files"


class Tiers:
    """Second and third tier of one pool. For the engine's thread; files are written on a thread of their own.

    format: of the pool's tensors, all of them.
    namespace: digest for the folder and the records' headers; keys bring the tenants' own (`root_key`).
    block_size: tokens of a page. Either tier may be None.
    clock: seconds, for the costs that the gate compares.
    """

    def __init__(
        self,
        format: RecordFormat,
        namespace: bytes,
        block_size: int,
        *,
        host: HostTier | None = None,
        files: FileTier | None = None,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.gate = gate or Gate()
        """The engine tells it what prefill costs: `gate.saw_prefill`."""
        self._format = format
        self._namespace = namespace
        self._block_size = block_size
        self._host = host
        self._files = files
        self._clock = clock
        self._hits = {HOST: 0, FILES: 0}
        self._misses = {HOST: 0, FILES: 0}
        self._stored_in_host = 0
        self._damaged_in_host = 0

    def enter(self, namespace: bytes) -> None:
        """Other weights from now on. Records of the old namespace leave memory; files stay until they age."""
        if namespace != self._namespace and self._host is not None:
            self._host.clear()
        self._namespace = namespace

    def longest_run(self, keys: Sequence[bytes]) -> int:
        """How many of the leading keys are in some tier. Looks only: damage and the gate show in `load`."""
        for i, key in enumerate(keys):
            if not self._find(key, count=True):
                return i
        return len(keys)

    def load(self, keys: Sequence[bytes], pages: Sequence[int]) -> int:
        """Restores leading pages into pages of the pool, one for each key; how many were.

        Stops at the first that is missing, damaged or not worth its cost; pages behind it are untouched.
        """
        assert len(keys) == len(pages), "each key has its page"
        keys = keys[: self._worth(keys)]
        self._use(keys)
        spent: dict[str, list[float]] = {HOST: [], FILES: []}
        from_files: list[bytes] = []
        for key, page in zip(keys, pages[: len(keys)], strict=True):
            started = self._clock()
            tier = self._restore(PageName(self._namespace, key), page)
            if tier is None:
                break
            spent[tier].append(self._clock() - started)
            if tier == FILES:
                from_files.append(key)
        for tier, seconds in spent.items():
            self._hits[tier] += len(seconds)
            self.gate.saw_load(tier, len(seconds) * self._format.record_bytes, sum(seconds))
        restored = sum(map(len, spent.values()))
        self._use(keys[:restored], from_files)
        return restored

    def store(self, key: bytes, page: int) -> bool:
        """Copies a full page of the pool to memory now and to a file later; False if no tier took it anew.

        Pages of one path are best stored last first: then the tail of the path ages before its head, without
        which it is of no use.
        """
        name = PageName(self._namespace, key)
        to_host = self._host if self._host is not None and not self._host.has(key) else None
        to_files = self._files if self._files is not None and not self._files.holds(name) else None
        if to_host is None and to_files is None:
            return False
        record = self._host.get(key) if self._host is not None else None
        if record is None:
            record = self._format.pack(page, name)
        taken = to_host is not None and to_host.put(key, record)
        self._stored_in_host += taken
        return (to_files is not None and to_files.put(name, record)) or taken

    def stats(self) -> TiersStats:
        """Counts since the start, and what is held now."""
        return TiersStats(self._host_stats(), self._file_stats())

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all that was stored is in its files; False if `timeout` seconds were not enough."""
        return self._files is None or self._files.flush(timeout)

    def close(self, timeout: float = 30.0) -> None:
        """Writes what waits, for at most `timeout` seconds, and forgets the rest."""
        if self._files is not None:
            self._files.close(timeout)
        if self._host is not None:
            self._host.clear()

    def _find(self, key: bytes, count: bool = False) -> str | None:
        if self._host is not None:
            if self._host.has(key):
                return HOST
            self._misses[HOST] += count
        if self._files is not None:
            if self._files.has(PageName(self._namespace, key)):
                return FILES
            self._misses[FILES] += count
        return None

    def _worth(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are there and pay.

        One question per tier: all its pages of the run, against all tokens from the first of them on, since
        without it those behind are of no use either.
        """
        run: list[str] = []
        for key in keys:
            tier = self._find(key)
            if tier is None:
                break
            run.append(tier)
        for first, tier in sorted((run.index(tier), tier) for tier in set(run)):
            size = run.count(tier) * self._format.record_bytes
            if not self.gate.allows(tier, size, (len(run) - first) * self._block_size):
                return first
        return len(run)

    def _use(self, keys: Sequence[bytes], files: Sequence[bytes] = ()) -> None:
        # Last first: the head of a path must not be the first of it to leave.
        if self._host is not None:
            for key in reversed(keys):
                self._host.get(key)
        if self._files is not None:
            for key in reversed(files):
                self._files.touch(PageName(self._namespace, key))

    def _restore(self, name: PageName, page: int) -> str | None:
        """Brings one page back; from which tier, or None."""
        record = self._host.get(name.key) if self._host is not None else None
        if record is not None and self._host is not None:
            if self._format.unpack(record, page, name):
                return HOST
            self._host.discard(name.key)
            self._damaged_in_host += 1
        record = self._files.get(name) if self._files is not None else None
        if record is None or self._files is None or not self._format.unpack(record, page, name):
            return None
        if self._host is not None:
            self._host.put(name.key, record)
        return FILES

    def _host_stats(self) -> TierStats | None:
        tier = self._host
        if tier is None:
            return None
        return TierStats(
            hits=self._hits[HOST],
            misses=self._misses[HOST],
            bytes_loaded=self._hits[HOST] * self._format.record_bytes,
            stored=self._stored_in_host,
            pages=len(tier),
            bytes=tier.bytes,
            evicted=tier.evicted,
            dropped=tier.dropped,
            refused=self.gate.refused(HOST),
            damaged=self._damaged_in_host,
            failures=0,
            reason=None,
        )

    def _file_stats(self) -> TierStats | None:
        tier = self._files
        if tier is None:
            return None
        return TierStats(
            hits=self._hits[FILES],
            misses=self._misses[FILES],
            bytes_loaded=self._hits[FILES] * self._format.record_bytes,
            stored=tier.stored,
            pages=tier.pages,
            bytes=tier.bytes,
            evicted=tier.evicted,
            dropped=tier.dropped,
            refused=self.gate.refused(FILES),
            damaged=tier.damaged,
            failures=tier.failures,
            reason=tier.reason,
        )
