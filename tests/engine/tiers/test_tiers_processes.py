"""Real processes over one folder: they share, they collide, they are killed, their disk is full."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longforge.engine.tiers import FileTier, RecordFormat
from longforge.engine.tiers.folder import MARKER, PageFolder
from small_tiers import empty_like, name_of, page_bytes, small_format, small_pool
from tiers_process import CAPACITY, WIDE

PROGRAM = Path(__file__).parents[2] / "tiers_process.py"


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def check_pages(folder: Path, count: int) -> None:
    """All pages are there and are those of the small pool."""
    pool = small_pool()
    target = empty_like(pool)
    form = RecordFormat(target)
    tier = FileTier(folder, CAPACITY, form.record_bytes)
    for i in range(count):
        record = tier.get(name_of(i))
        assert record is not None
        assert form.unpack(record, 0, name_of(i))
        assert page_bytes(target, 0) == page_bytes(pool, i % form.pages)
    tier.close()
    assert tier.damaged == 0


def test_what_one_process_wrote_another_reads(tmp_path: Path):
    assert output(start("write", tmp_path, 12)) == "12 0"
    check_pages(tmp_path, 12)


def test_processes_that_write_the_same_pages_at_once_leave_one_whole_record_each(tmp_path: Path):
    assert output(start("together", tmp_path, 3, 40)) == "0"
    check_pages(tmp_path, 40)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 40 + 1  # and the marker


def test_killed_writers_leave_no_wrong_page(tmp_path: Path):
    assert output(start("killed", tmp_path, 30, 7)) == "30"
    pool = small_pool(width=WIDE)
    target = empty_like(pool)
    form = RecordFormat(target)
    tier = FileTier(tmp_path, CAPACITY, form.record_bytes)
    found = 0
    for round_number in range(30):
        for i in range(20):
            name = name_of(f"{round_number}-{i}")
            record = tier.get(name)
            if record is not None:
                found += 1
                assert form.unpack(record, 0, name)
                assert page_bytes(target, 0) == page_bytes(pool, i % form.pages)
    tier.close()
    assert found > 0 and tier.damaged == 0
    unfinished = [path for path in tmp_path.rglob("*.tmp") if path.name != MARKER]
    assert len(unfinished) >= 10, "writers were to be killed inside a record"
    for path in unfinished:
        os.utime(path, (0, 0))
    PageFolder(tmp_path).records()
    assert not any(path.exists() for path in unfinished)


def test_a_file_that_may_not_grow_stops_the_tier_and_nothing_is_left(tmp_path: Path):
    told = "page folder: writing stopped after 5 failures: File too large"
    assert output(start("limited", tmp_path, 8)) == f"0|5|3|{told}"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [MARKER]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_stops_the_tier_and_keeps_what_is_whole(small_disk: Path):
    form = RecordFormat(small_pool(width=1_000))
    tier = FileTier(small_disk / "pages", CAPACITY, form.record_bytes)
    for i in range(40):
        tier.put(name_of(i), form.pack(0, name_of(i)))
        assert tier.flush(30)
    assert tier.reason == "page folder: writing stopped after 5 failures: No space left on device"
    kept = [i for i in range(40) if tier.get(name_of(i)) is not None]
    assert len(kept) == tier.stored > 0 and tier.damaged == 0
    assert not list(small_disk.rglob("*.tmp"))
    tier.close()


def test_the_small_format_of_another_process_is_ours():
    assert small_format().layout == RecordFormat(small_pool(seed=9)).layout
