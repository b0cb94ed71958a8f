"""Pages that left the pool and came back: the same as if they had stayed."""

import tempfile
from pathlib import Path

from longforge.engine.page_mover import TierSettings
from longforge.engine.tiers.stats import TierStats
from longforge.verify.check import Check
from longforge.verify.compare import Answers, Comparison
from longforge.verify.drive import Asked, greedy, request, run, sampled
from longforge.verify.subject import Subject

__all__ = ["tiers_equal_memory"]

ANSWER = 5
"""Tokens of an answer."""
BLOCKS = 3
"""Pages that the prompts share."""
POOL = BLOCKS + 4
"""Pages of an engine with a tier."""


def tiers_equal_memory(subject: Subject) -> Check:
    """Pages that one engine wrote to files, restored by a second; a third finds one of them damaged."""
    block = subject.block
    base = subject.tokens(BLOCKS * block, 41)
    asked = [
        request("greedy", base + subject.tokens(2, 42), greedy(ANSWER)),
        request("sampled", base + subject.tokens(2, 43), sampled(ANSWER, 41)),
    ]
    found = Comparison(subject)
    with subject.engine(pages=2 * (BLOCKS + 2)) as memory:
        expected = run(memory, asked)
    with tempfile.TemporaryDirectory(prefix="longforge-verify-") as name:
        folder = Path(name) / "pages"
        _write(subject, folder, base)
        records = sorted(path for path in folder.rglob("*") if path.is_file() and len(path.name) == 64)
        found.expect(len(records) == BLOCKS, f"{len(records)} pages were written, not {BLOCKS}")
        for one in asked:
            stats = _read(subject, found, folder, [one], expected, BLOCKS * block)
            found.expect(stats.hits == BLOCKS, f"{one.id}: {stats.hits} of {BLOCKS} pages were restored")
        if records:
            _damage(records[0])
            stats = _read(subject, found, folder, asked[:1], expected, None)
            found.expect(stats.damaged == 1 and stats.hits < BLOCKS, "a damaged page was not noticed")
    return found.verdict("tiers_equal_memory", f"{BLOCKS} pages through files, one of them damaged then")


def _write(subject: Subject, folder: Path, base: tuple[int, ...]) -> None:
    """Lets an engine compute the pages of `base` and lose them from its pool."""
    settings = TierSettings(folder=folder)
    with subject.engine(pages=POOL, prefix_cache=True, tiers=settings) as engine:
        run(engine, [request("first", base, greedy(1))])
        other = subject.tokens((POOL - 1) * subject.block, 44)
        run(engine, [request("pushes out", other, greedy(1), cache=False)])


def _read(
    subject: Subject, found: Comparison, folder: Path, asked: Asked, expected: Answers, tokens: int | None
) -> TierStats:
    """Lets a fresh engine answer from the files. tokens: how many it should find there, if that is known."""
    settings = TierSettings(folder=folder)
    with subject.engine(pages=POOL, prefix_cache=True, tiers=settings) as engine:
        answers = run(engine, asked)
        found.same(asked, answers, expected)
        told = answers[asked[0].id][0].cached_tokens
        stats = engine.tier_stats()
    if tokens is not None:
        found.expect(told == tokens, f"{asked[0].id}: {told} tokens came from files, not {tokens}")
    assert stats is not None and stats.files is not None, "it has a folder"
    return stats.files


def _damage(record: Path) -> None:
    data = bytearray(record.read_bytes())
    data[len(data) // 2] ^= 1
    record.write_bytes(data)
