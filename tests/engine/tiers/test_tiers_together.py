"""Both tiers through their one door: what comes back is the page, as far as it is whole and pays."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from longforge.engine.tiers import (
    FileTier,
    Gate,
    HostTier,
    Namespace,
    PageName,
    RecordFormat,
    Tiers,
    page_key,
    root_key,
)
from small_model import small_config
from small_tiers import NAMESPACE, PAGES, digest, empty_like, page_bytes, small_pool

KEYS = [digest(f"key {i}") for i in range(PAGES)]
BLOCK = 4
SIZE = RecordFormat(small_pool()).record_bytes


def open_tiers(
    pool: list[torch.Tensor],
    folder: Path | None = None,
    host: int | None = None,
    *,
    namespace: bytes = NAMESPACE,
    gate: Gate | None = None,
    clock: Callable[[], float] = itertools.count().__next__,
) -> Tiers:
    """host: records that fit; the clock counts the times it is read."""
    return Tiers(
        RecordFormat(pool),
        namespace,
        BLOCK,
        host=None if host is None else HostTier(host * SIZE),
        files=None if folder is None else FileTier(folder, 100 * SIZE, SIZE),
        gate=gate,
        clock=clock,
    )


def store_all(tiers: Tiers, keys: list[bytes]) -> None:
    for page, key in enumerate(keys):
        assert tiers.store(key, page)
    assert tiers.flush(30)


def file_of(folder: Path, key: bytes) -> Path:
    return next(folder.rglob(key.hex()))


@pytest.mark.parametrize(("with_files", "host"), [(False, 100), (True, None), (True, 100), (True, 2)])
def test_stored_pages_come_back_into_other_pages(with_files: bool, host: int | None, tmp_path: Path):
    pool, target = small_pool(), empty_like(small_pool())
    source = open_tiers(pool, tmp_path if with_files else None, host)
    store_all(source, KEYS)
    # Without files the pool itself is wiped and refilled, with them another process would be.
    tiers = source
    before = [page_bytes(pool, page) for page in range(PAGES)]
    if with_files:
        source.close()
        tiers = open_tiers(target, tmp_path, host)
    else:
        target = pool
        for tensor in pool:
            tensor.zero_()
    assert tiers.longest_run(KEYS) == PAGES
    assert tiers.load(KEYS, list(reversed(range(PAGES)))) == PAGES
    assert [page_bytes(target, page) for page in reversed(range(PAGES))] == before
    tiers.close()


def test_a_run_ends_at_the_first_page_that_is_nowhere(tmp_path: Path):
    tiers = open_tiers(small_pool(), tmp_path, 100)
    for page in (0, 1, 3):
        tiers.store(KEYS[page], page)
    assert tiers.longest_run(KEYS) == 2
    assert tiers.longest_run(KEYS[2:]) == 0
    assert tiers.longest_run([]) == tiers.load([], []) == 0
    assert tiers.load(KEYS, list(range(PAGES))) == 2
    tiers.close()


def test_a_damaged_page_ends_the_load_and_pages_behind_it_stay_as_they_were(tmp_path: Path):
    store = open_tiers(small_pool(), tmp_path)
    store_all(store, KEYS)
    store.close()
    path = file_of(tmp_path, KEYS[3])
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    target = empty_like(small_pool())
    tiers = open_tiers(target, tmp_path, 100)
    assert tiers.longest_run(KEYS) == PAGES
    assert tiers.load(KEYS, list(range(PAGES))) == 3
    for page in range(3, PAGES):
        assert page_bytes(target, page) == page_bytes(empty_like(target), page)
    assert tiers.longest_run(KEYS) == 3
    files = tiers.stats().files
    assert files is not None and (files.damaged, files.hits) == (1, 3)
    assert tiers.store(KEYS[3], 0)
    tiers.close()


def test_a_page_from_a_file_is_in_memory_afterwards(tmp_path: Path):
    store = open_tiers(small_pool(), tmp_path)
    store_all(store, KEYS)
    store.close()
    tiers = open_tiers(empty_like(small_pool()), tmp_path, 100)
    assert tiers.load(KEYS, list(range(PAGES))) == PAGES
    shutil.rmtree(tmp_path / NAMESPACE.hex()[:16])
    assert tiers.load(KEYS, list(range(PAGES))) == PAGES
    stats = tiers.stats()
    assert stats.host is not None and stats.files is not None
    assert stats.host.hits == stats.files.hits == PAGES
    assert stats.host.bytes_loaded == PAGES * SIZE
    tiers.close()


def test_the_head_of_a_path_leaves_memory_after_its_tail():
    tiers = open_tiers(small_pool(), host=4)
    store_all(tiers, KEYS[:4])
    assert tiers.load(KEYS[:4], [0, 1, 2, 3]) == 4
    tiers.store(KEYS[4], 4)
    tiers.store(KEYS[5], 5)
    assert tiers.longest_run(KEYS[:4]) == 2


def test_files_that_were_loaded_are_young_again_the_head_of_the_path_most(tmp_path: Path):
    tiers = open_tiers(small_pool(), tmp_path)
    store_all(tiers, KEYS)
    paths = [file_of(tmp_path, key) for key in KEYS]
    for path in paths:
        os.utime(path, (1_000, 1_000))
    assert tiers.load(KEYS[:4], [0, 1, 2, 3]) == 4
    times = [path.stat().st_mtime_ns for path in paths]
    assert times[:4] == sorted(times[:4], reverse=True)
    assert min(times[:4]) > 2_000 * 10**9 > max(times[4:])
    tiers.close()


def test_a_page_that_is_held_is_not_stored_again(tmp_path: Path):
    tiers = open_tiers(small_pool(), tmp_path, 100)
    store_all(tiers, KEYS)
    assert not any(tiers.store(key, page) for page, key in enumerate(KEYS))
    stats = tiers.stats()
    assert stats.host is not None and stats.files is not None
    assert (stats.host.stored, stats.files.stored, stats.host.pages, stats.files.pages) == (PAGES,) * 4
    tiers.close()


def test_a_file_that_is_gone_is_written_again_from_memory(tmp_path: Path):
    pool = small_pool()
    tiers = open_tiers(pool, tmp_path, 100)
    store_all(tiers, KEYS)
    content = file_of(tmp_path, KEYS[2]).read_bytes()
    file_of(tmp_path, KEYS[2]).unlink()
    assert tiers.store(KEYS[2], 2) and tiers.flush(30)
    assert file_of(tmp_path, KEYS[2]).read_bytes() == content
    tiers.close()


def test_loads_that_cost_more_than_prefill_are_refused_and_counted(tmp_path: Path):
    gate = Gate()
    tiers = open_tiers(small_pool(), tmp_path, 100, gate=gate)
    store_all(tiers, KEYS)
    # The clock makes a page of any tier cost one second.
    assert tiers.load(KEYS[:1], [0]) == 1
    gate.saw_prefill(BLOCK, 0.9)
    assert tiers.load(KEYS, list(range(PAGES))) == 0
    gate.saw_prefill(BLOCK, 10.0)
    assert tiers.load(KEYS, list(range(PAGES))) == PAGES
    host = tiers.stats().host
    assert host is not None and (host.refused, host.hits) == (1, 1 + PAGES)
    tiers.close()


def test_a_slow_folder_does_not_keep_what_memory_has_from_being_loaded(tmp_path: Path):
    gate = Gate()
    tiers = open_tiers(small_pool(), tmp_path, 2, gate=gate)
    store_all(tiers, KEYS[::-1])  # memory keeps the last two stored: the head of the path
    gate.saw_load("files", SIZE, 100.0)
    gate.saw_prefill(BLOCK, 2.0)
    assert tiers.longest_run(KEYS) == PAGES
    assert tiers.load(KEYS, list(range(PAGES))) == 2
    stats = tiers.stats()
    assert stats.host is not None and stats.files is not None
    assert (stats.host.refused, stats.files.refused, stats.host.hits, stats.files.hits) == (0, 1, 2, 0)
    tiers.close()


def test_namespaces_do_not_see_each_other(tmp_path: Path):
    first = open_tiers(small_pool(), tmp_path, 100)
    store_all(first, KEYS)
    other = open_tiers(small_pool(1), tmp_path, 100, namespace=digest("another namespace"))
    assert other.longest_run(KEYS) == 0
    other.enter(NAMESPACE)
    assert other.longest_run(KEYS) == PAGES
    first.enter(digest("another namespace"))
    assert first.longest_run(KEYS) == 0
    first.enter(NAMESPACE)
    assert first.load(KEYS, list(range(PAGES))) == PAGES
    first.close()
    other.close()


def test_tenants_share_nothing_in_one_engine(tmp_path: Path):
    tiers = open_tiers(small_pool(), tmp_path, 100)
    shared = Namespace(
        small_config().as_dict(), "00" * 32, 1, "float32", RecordFormat(small_pool()).layout, BLOCK
    )
    keys = [
        page_key(root_key(replace(shared, tenant=tenant).digest()), [1, 2, 3, 4]) for tenant in ("", "a", "b")
    ]
    tiers.store(keys[1], 0)
    assert [tiers.longest_run([key]) for key in keys] == [0, 1, 0]
    tiers.close()


def test_misses_are_counted_where_they_happen(tmp_path: Path):
    tiers = open_tiers(small_pool(), tmp_path, 100)
    store_all(tiers, KEYS[:2])
    tiers.longest_run(KEYS)
    stats = tiers.stats()
    assert stats.host is not None and stats.files is not None
    assert (stats.host.misses, stats.files.misses) == (1, 1)
    assert stats.files.reason is None and stats.files.failures == stats.files.dropped == 0
    tiers.close()


def test_no_tier_at_all_is_a_miss():
    tiers = open_tiers(small_pool())
    assert not tiers.store(KEYS[0], 0)
    assert tiers.longest_run(KEYS) == tiers.load(KEYS, list(range(PAGES))) == 0
    assert tiers.stats().host is None and tiers.stats().files is None
    assert tiers.flush()
    tiers.close()


class TiersAgainstAMemory(RuleBasedStateMachine):
    """Whatever is stored, damaged or lost: a key brings back the bytes stored under it, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.pool = small_pool()
        # A key stands for its content, so each has the one page that it ever names.
        self.contents = dict(zip(KEYS, range(PAGES), strict=True))
        self.content = small_pool(1)
        self.changed: set[str] = set()
        """Files that others wrote to: one that was cut takes less room, so that more may stand there."""
        self.tiers = self.open()

    def open(self) -> Tiers:
        host, files = HostTier(3 * SIZE), FileTier(self.folder, 5 * SIZE, SIZE)
        return Tiers(RecordFormat(self.pool), NAMESPACE, BLOCK, host=host, files=files)

    def teardown(self) -> None:
        self.tiers.close()
        shutil.rmtree(self.folder)

    def change(self, key: bytes, change: Callable[[bytes], bytes]) -> None:
        path = self.folder / NAMESPACE.hex()[:16] / key.hex()[:2] / key.hex()
        if path.exists():
            path.write_bytes(change(path.read_bytes()))
            self.changed.add(path.name)

    @rule(key=st.sampled_from(KEYS), page=st.integers(0, PAGES - 1))
    def store(self, key: bytes, page: int):
        for tensor, new in zip(self.pool, self.content, strict=True):
            tensor[page].copy_(new[self.contents[key]])
        self.tiers.store(key, page)

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def load(self, first: int, count: int):
        keys = KEYS[first : first + count]
        pages = list(range(PAGES))[-len(keys) :]
        before = [page_bytes(self.pool, page) for page in range(PAGES)]
        run = self.tiers.longest_run(keys)
        restored = self.tiers.load(keys, pages)
        assert restored <= run
        expected = dict(enumerate(before))
        for key, page in zip(keys[:restored], pages, strict=False):
            expected[page] = page_bytes(self.content, self.contents[key])
        assert [page_bytes(self.pool, page) for page in range(PAGES)] == list(expected.values())

    @rule(key=st.sampled_from(KEYS), position=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
    def damage(self, key: bytes, position: int, bit: int):
        def flip(content: bytes) -> bytes:
            number = int.from_bytes(content, "little") ^ 1 << (8 * (position % len(content)) + bit)
            return number.to_bytes(len(content), "little")

        self.change(key, flip)

    @rule(key=st.sampled_from(KEYS), length=st.integers(1, SIZE - 1))
    def cut(self, key: bytes, length: int):
        self.change(key, lambda content: content[:length])

    @rule(key=st.sampled_from(KEYS), other=st.sampled_from(KEYS))
    def swap(self, key: bytes, other: bytes):
        taken: list[bytes] = []
        self.change(other, lambda content: taken.append(content) or content)
        if taken:
            self.change(key, lambda _: taken[0])

    @rule()
    def restart(self):
        self.tiers.close()
        self.tiers = self.open()

    @rule()
    def forget_memory(self):
        """Other weights come and go."""
        self.tiers.enter(digest("other weights"))
        assert self.tiers.longest_run(KEYS) == 0
        self.tiers.enter(NAMESPACE)

    @invariant()
    def room(self):
        assert self.tiers.flush(30)
        files = [path for path in self.folder.rglob("*") if path.is_file() and len(path.name) == 64]
        assert len({path.name for path in files} - self.changed) <= 5
        stats = self.tiers.stats()
        assert stats.host is not None and stats.host.bytes <= 3 * SIZE
        assert stats.files is not None and stats.files.reason is None


TestTiersAgainstAMemory = TiersAgainstAMemory.TestCase
TestTiersAgainstAMemory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_name_is_namespace_and_key():
    assert PageName(NAMESPACE, KEYS[0]) == (NAMESPACE, KEYS[0])
