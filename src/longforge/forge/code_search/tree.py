"""Which files belong to a Python tree, and their text: the one answer that index and tools share."""

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longforge.errors import InputError

__all__ = ["EXCLUDED", "SourceFile", "Tree", "default_tree", "load_tree", "tree_root"]

EXCLUDED: tuple[str, ...] = (
    "__pycache__",
    "dist-packages",
    "idle_test",
    "node_modules",
    "site-packages",
    "test",
    "tests",
)
"""Folders that are left out wherever they stand; folders whose name starts with a dot are left out too."""


@dataclass(frozen=True)
class SourceFile:
    """One file: its path relative to the tree with forward slashes, and its text with plain newlines."""

    path: str
    text: str

    def lines(self) -> list[str]:
        """The lines as the Python parser counts them, without line breaks."""
        lines = self.text.split("\n")
        return lines[:-1] if lines[-1] == "" and len(lines) > 1 else lines


@dataclass(frozen=True)
class Tree:
    """The text of a Python tree, files sorted by path."""

    root: Path
    files: tuple[SourceFile, ...]
    unreadable: tuple[str, ...]
    """Files that could not be opened or are not UTF-8, and folders that could not be listed."""


def default_tree() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def tree_root(path: str | Path) -> Path:
    """The real path of a tree that a user named.

    Raises:
        InputError: there is no such folder.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(
            f"tree: expected a folder of Python files, got {str(path)!r}; name an existing folder"
        )
    return root.resolve()


def load_tree(path: str | Path, excluded: Sequence[str] = EXCLUDED) -> Tree:
    """Every .py file below `path`. Links that lead out of the tree are left out.

    Raises:
        InputError: no such folder, or no Python file in it.
    """
    root = tree_root(path)
    files: list[SourceFile] = []
    unreadable: list[str] = []
    for file in _python_files(root, root, frozenset(excluded), unreadable):
        name = file.relative_to(root).as_posix()
        try:
            files.append(SourceFile(name, file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            unreadable.append(name)
    if not files:
        raise InputError(f"tree: expected Python files below {str(path)!r}, found none; name another folder")
    files.sort(key=lambda file: file.path)
    return Tree(root, tuple(files), tuple(sorted(unreadable)))


def _python_files(
    folder: Path, root: Path, excluded: frozenset[str], unreadable: list[str]
) -> Iterator[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        unreadable.append(folder.relative_to(root).as_posix())
        return
    for entry in entries:
        if entry.name.startswith(".") or (entry.is_symlink() and not _stays_inside(entry, root)):
            continue
        if entry.is_dir():
            if entry.name not in excluded and not entry.is_symlink():
                yield from _python_files(entry, root, excluded, unreadable)
        elif entry.suffix == ".py" and entry.is_file():
            yield entry


def _stays_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):
        return False
