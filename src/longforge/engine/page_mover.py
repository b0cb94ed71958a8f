"""Between the pool and the slower tiers: full pages go down, the continuation of a prefix comes up."""

from dataclasses import dataclass, replace
from pathlib import Path

from longforge.engine.prefix_cache import PrefixCache
from longforge.engine.runner import Runner
from longforge.engine.sequence import Sequence
from longforge.engine.tiers import (
    FileTier,
    HostTier,
    Namespace,
    RecordFormat,
    Tiers,
    TiersStats,
    page_key,
    root_key,
    weights_fingerprint,
)

__all__ = ["PageMover", "TierSettings"]


@dataclass(frozen=True)
class TierSettings:
    """How much the slower tiers may hold; none by default.

    host_bytes: in host memory. folder: of the files, which several processes may share; file_bytes: in it.
    """

    host_bytes: int = 0
    folder: Path | None = None
    file_bytes: int = 16 * 2**30


class PageMover:
    """Copies pages that become known, and restores those that a prompt goes on with."""

    def __init__(self, settings: TierSettings, runner: Runner, cache: PrefixCache) -> None:
        self._runner = runner
        self._cache = cache
        self._format = RecordFormat(runner.cache.tensors)
        self._roots: dict[str, bytes] = {}
        self._namespace = self._current_namespace()
        files = None
        if settings.folder is not None:
            files = FileTier(settings.folder, settings.file_bytes, self._format.record_bytes)
        self._tiers = Tiers(
            self._format,
            self._namespace.digest(),
            cache.block_size,
            host=HostTier(settings.host_bytes) if settings.host_bytes else None,
            files=files,
        )

    def restore(self, sequence: Sequence, pages: list[int], most: int) -> list[int]:
        """Pages behind `pages` on the sequence's path out of the tiers, held for it, at most `most`."""
        blocks = range(len(pages), len(pages) + min(most, self._cache.available))
        keys = self._keys(sequence, blocks)
        keys = keys[: self._tiers.longest_run(keys)]
        if not keys:
            return []
        taken = self._cache.take(len(keys))
        restored = self._tiers.load(keys, taken)
        self._cache.release(taken[restored:])
        found = list(pages)
        for block, page in zip(blocks, taken[:restored], strict=False):
            before = found[-1] if found else None
            ids = sequence.block_ids(block, self._cache.block_size)
            assert sequence.root is not None, "only who shares pages asks for some"
            found.append(self._cache.add(sequence.root, before, ids, page))
        return found[len(pages) :]

    def keep(self, sequence: Sequence, blocks: range) -> None:
        """Copies pages of a sequence that have just become known."""
        if blocks and sequence.root is not None:
            keys = self._keys(sequence, blocks)
            for block, key in zip(reversed(blocks), reversed(keys), strict=True):
                self._tiers.store(key, sequence.pages[block])

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """What computing tokens costs: what a load has to beat."""
        self._tiers.gate.saw_prefill(tokens, seconds)

    def new_weights(self) -> None:
        """The model's weights have changed: nothing stored before matches."""
        self._namespace = self._current_namespace()
        self._roots = {}
        self._tiers.enter(self._namespace.digest())

    def stats(self) -> TiersStats:
        """Counts of both tiers."""
        return self._tiers.stats()

    def close(self) -> None:
        """Writes what waits to be written."""
        self._tiers.close()

    def _keys(self, sequence: Sequence, blocks: range) -> list[bytes]:
        """Keys of some blocks of a sequence's path; those before them are remembered in the sequence."""
        tenant = sequence.request.tenant
        if tenant not in self._roots:
            self._roots[tenant] = root_key(replace(self._namespace, tenant=tenant).digest())
        keys = sequence.page_keys
        while len(keys) < blocks.stop:
            parent = keys[-1] if keys else self._roots[tenant]
            keys.append(page_key(parent, sequence.block_ids(len(keys), self._cache.block_size)))
        return keys[blocks.start : blocks.stop]

    def _current_namespace(self) -> Namespace:
        model = self._runner.model
        return Namespace(
            config=model.config.as_dict(),
            weights=weights_fingerprint(model.state_dict()),
            weights_version=int(model.version),
            dtype=str(model.dtype),
            layout=self._format.layout,
            block_size=self._cache.block_size,
        )
