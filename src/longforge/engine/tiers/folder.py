"""The folder of the third tier: whose it is, what lies where, what leaves when it is full.

    <folder>/.longforge-pages                                  marks the folder as ours
    <folder>/<namespace, 16 hex>/<2 hex>/<key, 64 hex>         a record
    <folder>/<namespace, 16 hex>/<2 hex>/.<key>.<random>.tmp   a record that is being written

Any number of processes of one user may use a folder at once. There are no locks: records appear by rename,
and whoever finds one gone treats it as a miss.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longforge.engine.tiers.keys import PageName
from longforge.errors import InputError

__all__ = ["Entry", "PageFolder"]

MARKER = ".longforge-pages"
ABANDONED_SECONDS = 600
"""A temporary file of this age has no writer any more."""

_NAMESPACE = re.compile(r"[0-9a-f]{16}")
_SHELF = re.compile(r"[0-9a-f]{2}")
_RECORD = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp")


class Entry(NamedTuple):
    """A record on disk; ordered by the time of its last use."""

    used_ns: int
    size: int
    path: str


class PageFolder:
    """A folder that is ours. Creates it if it is missing, takes it if it is empty.

    InputError for a folder with other things in it, or one that cannot be made or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            inside = {entry.name for entry in path.iterdir()}
            if MARKER not in inside:
                # Two processes may claim the folder at once: each sees at most the other's unfinished marker.
                if any(not name.startswith(MARKER) for name in inside):
                    raise InputError(
                        f"page folder {path}: an empty folder or one with {MARKER} is needed, "
                        "got other files; name another folder"
                    )
                self._mark()
        except OSError as error:
            raise InputError(
                f"page folder {path}: a folder to write to is needed, got {error.strerror}"
            ) from None

    def _mark(self) -> None:
        temporary = self.path / f"{MARKER}.{secrets.token_hex(8)}"
        temporary.touch(0o600)
        temporary.write_text("Pages of Longforge. May be deleted while nothing uses it.\n")
        temporary.replace(self.path / MARKER)

    def path_of(self, name: PageName) -> str:
        """Where the record of a page is."""
        key = name.key.hex()
        return f"{self.path}/{name.namespace.hex()[:16]}/{key[:2]}/{key}"

    def write(self, name: PageName, header: bytes, payload: memoryview) -> None:
        """Puts a record in its place, whole or not at all. OSError if that fails; nothing is left then.

        Not synced: after a power cut a record may be torn, which its checksum shows.
        """
        final = self.path_of(name)
        shelf, key = final.rsplit("/", 1)
        temporary = f"{shelf}/.{key}.{secrets.token_hex(8)}.tmp"
        descriptor = _create(temporary)
        try:
            try:
                _write_all(descriptor, memoryview(header))
                _write_all(descriptor, payload)
            finally:
                os.close(descriptor)
            os.replace(temporary, final)  # noqa: PTH105 - plain strings on the path of every page
        except OSError:
            remove(temporary)
            raise

    def records(self) -> list[Entry]:
        """All records of all namespaces. Removes what dead writers left. OSError if unreadable."""
        found: list[Entry] = []
        oldest = time.time() - ABANDONED_SECONDS
        for shelf in self._shelves():
            for entry in _listed(shelf):
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if _RECORD.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append(Entry(stat.st_mtime_ns, stat.st_size, entry.path))
                elif _TEMPORARY.fullmatch(entry.name) and stat.st_mtime < oldest:
                    remove(entry.path)
        return found

    def _shelves(self) -> Iterator[str]:
        with os.scandir(self.path) as entries:
            namespaces = [entry.path for entry in entries if _is_folder(entry, _NAMESPACE)]
        for namespace in namespaces:
            yield from [entry.path for entry in _listed(namespace) if _is_folder(entry, _SHELF)]


def remove(path: str) -> bool:
    """Deletes a file, and the folders that this empties. False if it is still there."""
    try:
        os.unlink(path)  # noqa: PTH108 - plain strings, as above
    except FileNotFoundError:
        return True  # another process was quicker
    except OSError:
        return False
    shelf = path.rsplit("/", 1)[0]
    with contextlib.suppress(OSError):  # not empty: the usual case
        os.rmdir(shelf)  # noqa: PTH106 - plain strings, as above
        os.rmdir(shelf.rsplit("/", 1)[0])  # noqa: PTH106 - plain strings, as above
    return True


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    shelf = path.rsplit("/", 1)[0]
    for _ in range(3):
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            # The first of its shelf, or another process has just removed the empty shelf.
            for folder in (shelf.rsplit("/", 1)[0], shelf):
                # Made by another process, or its parent removed: opening the file decides.
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.mkdir(folder, 0o700)  # noqa: PTH102 - plain strings, as above
    return os.open(path, flags, 0o600)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _listed(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _is_folder(entry: os.DirEntry[str], pattern: re.Pattern[str]) -> bool:
    return bool(pattern.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)
