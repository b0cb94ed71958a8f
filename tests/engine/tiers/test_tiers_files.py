"""The tier of files: a hit is the page, everything else is a miss that costs nothing more."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from longforge.engine.tiers import FileTier
from longforge.engine.tiers.folder import ABANDONED_SECONDS, MARKER
from longforge.errors import InputError
from small_tiers import digest, name_of, small_format

FORMAT = small_format()
SIZE = FORMAT.record_bytes


def open_tier(folder: Path, records: int = 100, queue: int = 100) -> FileTier:
    return FileTier(folder, records * SIZE, SIZE, queue * SIZE)


def fill(tier: FileTier, names: range | list[str]) -> None:
    """Stores pages one after the other, each in its file before the next."""
    for i, n in enumerate(names):
        assert tier.put(name_of(n), FORMAT.pack(i % FORMAT.pages, name_of(n)))
        assert tier.flush(30)


def path_of(folder: Path, n: int | str) -> Path:
    name = name_of(n)
    return folder / name.namespace.hex()[:16] / name.key.hex()[:2] / name.key.hex()


def age(folder: Path, n: int | str, seconds: int) -> None:
    path = path_of(folder, n)
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def records_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a" / "pages"


@pytest.fixture
def tier(folder: Path) -> Iterator[FileTier]:
    tier = open_tier(folder)
    yield tier
    tier.close()


def test_a_record_comes_back_sealed_and_only_under_its_name(tier: FileTier):
    fill(tier, range(2))
    record = tier.get(name_of(1))
    assert record is not None
    assert FORMAT.unpack(record, 0, name_of(1)) and not FORMAT.unpack(record, 0, name_of(0))
    assert record[128:].tobytes() == FORMAT.pack(1, name_of(1))[128:].tobytes()
    assert tier.get(name_of(2)) is None and not tier.has(name_of(2))
    assert tier.get(name_of(1, digest("another namespace"))) is None
    assert (tier.stored, tier.pages, tier.bytes, tier.damaged, tier.failures) == (2, 2, 2 * SIZE, 0, 0)


def test_what_is_there_is_not_written_again(tier: FileTier, folder: Path):
    fill(tier, range(1))
    inode = path_of(folder, 0).stat().st_ino
    fill(tier, range(1))
    assert path_of(folder, 0).stat().st_ino == inode
    assert tier.stored == 1


def test_a_later_process_finds_the_pages(tier: FileTier, folder: Path):
    fill(tier, range(3))
    tier.close()
    later = open_tier(folder)
    assert [later.has(name_of(i)) for i in range(4)] == [True, True, True, False]
    assert later.flush(30) and later.pages == 3
    later.close()


def test_only_the_user_may_look(tier: FileTier, folder: Path):
    fill(tier, range(1))
    record = path_of(folder, 0)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, record.parent.parent, record.parent)]
    assert modes == [0o700] * 3
    assert stat.S_IMODE(record.stat().st_mode) == stat.S_IMODE((folder / MARKER).stat().st_mode) == 0o600


@pytest.mark.parametrize("position", [0, 20, 24, 32, 64, 96, 127, 128, SIZE - 1])
def test_a_flipped_bit_is_a_miss_and_the_file_goes(tier: FileTier, folder: Path, position: int):
    fill(tier, range(2))
    damaged = bytearray(path_of(folder, 0).read_bytes())
    damaged[position] ^= 16
    path_of(folder, 0).write_bytes(damaged)
    assert tier.get(name_of(0)) is None
    assert not path_of(folder, 0).exists()
    assert (tier.damaged, tier.pages, tier.reason) == (1, 1, None)
    assert tier.get(name_of(1)) is not None


@pytest.mark.parametrize("length", [0, 1, 95, 96, 127, 128, 129, SIZE - 1, SIZE + 1])
def test_a_file_of_another_length_is_a_miss_and_goes(tier: FileTier, folder: Path, length: int):
    fill(tier, range(1))
    whole = path_of(folder, 0).read_bytes()
    path_of(folder, 0).write_bytes((whole + b"\0")[:length])
    assert not tier.has(name_of(0))
    assert tier.get(name_of(0)) is None
    assert not path_of(folder, 0).exists()
    assert tier.damaged == 1


def test_a_record_of_another_page_or_namespace_in_its_place_is_a_miss(tier: FileTier, folder: Path):
    fill(tier, range(2))
    other = name_of(0, digest("another namespace"))
    tier.put(other, FORMAT.pack(0, other))
    assert tier.flush(30)
    strange = [path_of(folder, 1).read_bytes(), (folder / other.namespace.hex()[:16])]
    path_of(folder, 0).write_bytes(strange[0])
    assert tier.get(name_of(0)) is None
    path = next(path for path in strange[1].rglob(other.key.hex()))
    fill(tier, range(1))
    path_of(folder, 0).write_bytes(path.read_bytes())
    assert tier.get(name_of(0)) is None
    assert tier.damaged == 2


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_not_a_file_is_a_miss(tier: FileTier, folder: Path, kind: str, tmp_path: Path):
    fill(tier, range(1))
    path = path_of(folder, 0)
    whole = path.rename(tmp_path / "elsewhere")
    match kind:
        case "link":
            path.symlink_to(whole)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    assert not tier.has(name_of(0))
    assert tier.get(name_of(0)) is None
    assert tier.damaged == 1
    assert whole.exists()


def test_the_least_recently_used_files_leave_before_the_capacity_is_passed(folder: Path):
    tier = open_tier(folder, records=10)
    fill(tier, range(10))
    for i in range(10):
        age(folder, i, 100 - i)
    tier.touch(name_of(0))
    fill(tier, [*"ab"])
    assert len(records_in(folder)) <= 10
    assert tier.bytes == len(records_in(folder)) * SIZE
    assert tier.has(name_of(0)) and tier.has(name_of("b")) and not tier.has(name_of(1))
    assert tier.evicted == 12 - len(records_in(folder))
    tier.close()


def test_the_capacity_holds_at_every_moment(folder: Path):
    tier = open_tier(folder, records=7)
    for i in range(40):
        fill(tier, [str(i)])
        assert len(records_in(folder)) <= 7
        assert tier.has(name_of(str(i)))
    tier.close()


def test_pages_of_others_count_and_leave_too(folder: Path):
    first, second = open_tier(folder, records=16), open_tier(folder, records=16)
    for i in range(40):
        fill((first, second)[i % 2], [str(i)])
        assert len(records_in(folder)) <= 16 + 2 + 1
    first.close()
    second.close()


def test_eviction_leaves_what_is_not_a_record(folder: Path):
    tier = open_tier(folder, records=2)
    (folder / "notes.txt").write_bytes(bytes(5 * SIZE))
    (folder / ("0" * 16)).write_text("a file with the name of a namespace")
    fill(tier, range(5))
    assert (folder / "notes.txt").exists() and (folder / ("0" * 16)).exists()
    assert tier.pages == 2
    tier.close()


def test_leftovers_of_dead_writers_go_when_they_are_old(folder: Path):
    tier = open_tier(folder)
    fill(tier, range(1))
    tier.close()
    shelf = path_of(folder, 0).parent
    old, young = (shelf / f".{name_of(n).key.hex()}.0f.tmp" for n in (1, 2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (old.stat().st_mtime - ABANDONED_SECONDS - 60,) * 2)
    later = open_tier(folder)
    assert later.flush(30)
    assert not old.exists() and young.exists()
    assert later.pages == 1
    later.close()


def test_a_full_queue_drops_and_counts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    tier = open_tier(folder, queue=3)
    assert tier.flush(30)
    may_replace, plain = threading.Event(), os.replace

    def slow(source: str, target: str) -> None:
        assert may_replace.wait(30)
        plain(source, target)

    monkeypatch.setattr(os, "replace", slow)
    taken = [tier.put(name_of(i), FORMAT.pack(0, name_of(i))) for i in (0, 1, 2, 2, 3, 4)]
    assert taken == [True, True, True, True, False, False]
    assert tier.holds(name_of(2)) and not tier.holds(name_of(3))
    assert not tier.flush(0.01)
    may_replace.set()
    assert tier.flush(30)
    assert (tier.stored, tier.dropped) == (3, 2)
    assert tier.put(name_of(3), FORMAT.pack(0, name_of(3)))
    tier.close()
    assert tier.has(name_of(3))


def test_closing_writes_what_waits_and_drops_what_comes_later(folder: Path):
    tier = open_tier(folder)
    for i in range(20):
        tier.put(name_of(i), FORMAT.pack(0, name_of(i)))
    tier.close()
    assert len(records_in(folder)) == 20
    assert not tier.put(name_of(20), FORMAT.pack(0, name_of(20)))
    tier.close()
    assert tier.dropped == 1


def test_writing_that_fails_again_and_again_stops_and_reading_goes_on(folder: Path):
    tier = open_tier(folder)
    fill(tier, range(1))
    wall = folder / digest("wall").hex()[:16]
    wall.write_text("where the folder of a namespace should be")
    for i in range(8):
        name = name_of(i, digest("wall"))
        tier.put(name, FORMAT.pack(0, name))
        assert tier.flush(30)
        assert tier.get(name) is None and not tier.has(name)
    assert tier.failures == 5 and tier.dropped == 3
    assert tier.reason == "page folder: writing stopped after 5 failures: Not a directory"
    assert tier.get(name_of(0)) is not None
    tier.close()


def test_reading_that_fails_again_and_again_stops(folder: Path, monkeypatch: pytest.MonkeyPatch):
    tier = open_tier(folder)
    fill(tier, range(1))

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", broken)
        assert [tier.get(name_of(0)) for _ in range(5)] == [None] * 5
    assert tier.reason == "page folder: reading stopped after 5 failures: Input/output error"
    assert not tier.has(name_of(0)) and tier.get(name_of(0)) is None
    assert tier.failures == 5 and path_of(folder, 0).exists()
    tier.close()


def test_one_failure_is_forgiven(folder: Path):
    tier = open_tier(folder)
    wall = folder / digest("wall").hex()[:16]
    wall.write_text("")
    name = name_of(0, digest("wall"))
    for i in range(8):
        tier.put(name, FORMAT.pack(0, name))
        fill(tier, [f"between {i}"])
    assert (tier.failures, tier.stored, tier.reason) == (8, 8, None)
    tier.close()


def test_a_folder_that_vanishes_is_made_again(folder: Path):
    tier = open_tier(folder)
    fill(tier, range(1))
    path = path_of(folder, 0)
    path.unlink()
    path.parent.rmdir()
    path.parent.parent.rmdir()
    fill(tier, range(1))
    assert path.exists()
    tier.close()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=rf"an empty folder or one with {MARKER} is needed, got other files"):
        open_tier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "pages").write_text("a file")
    with pytest.raises(InputError, match="a folder to write to is needed, got File exists"):
        open_tier(tmp_path / "pages")


def test_an_unfinished_marker_of_another_process_does_not_refuse_the_folder(tmp_path: Path):
    (tmp_path / f"{MARKER}.00ff").write_text("")
    open_tier(tmp_path).close()
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize(("records", "queue", "told"), [(0, 5, "capacity"), (5, 0, "queue")])
def test_room_for_less_than_a_record_is_refused(folder: Path, records: int, queue: int, told: str):
    with pytest.raises(InputError, match=f"file tier: {told}: at least one record of {SIZE} bytes"):
        open_tier(folder, records, queue)
