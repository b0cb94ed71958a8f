"""The agent's two tools over the text of a tree: `grep` and `read`.

Both are pure functions of the tree, and refuse with `ToolError` (one line). They run inside the tool server's
child processes (`sandbox.py`); nothing here reaches the file system after the tree is loaded.

`grep` means `re.search(pattern, line)` on every line. To be fast it first looks for a text that every match
must contain (`required_literal`) with the string search of the interpreter, and tries the expression on those
lines only; `plain_grep_lines` is the twin that tries it on all lines.
"""

import importlib
import posixpath
import re
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from longforge.errors import ToolError
from longforge.forge.code_search.tree import SourceFile, Tree

__all__ = ["CodeTools", "ToolLimits", "plain_grep_lines", "required_literal"]

MAX_PATTERN = 200


@dataclass(frozen=True)
class ToolLimits:
    """How much one tool result may show. A small model reads every character of it."""

    max_hits: int = 5
    hit_width: int = 56
    """Characters of a matching line that `grep` shows, leading spaces dropped."""
    default_lines: int = 12
    """Lines that a `read` without an end shows."""
    max_lines: int = 24
    """Lines that one `read` shows at most."""
    line_width: int = 40


class CodeTools:
    """`grep` and `read` over a loaded tree."""

    def __init__(self, tree: Tree, limits: ToolLimits | None = None) -> None:
        self.limits = limits or ToolLimits()
        # One block of bytes and no object per line: the sandbox forks this process for every call, and what a
        # fork costs is its memory.
        encoded = [file.text.encode() + b"\n" for file in tree.files]
        self._paths = [file.path for file in tree.files]
        self._number = {path: number for number, path in enumerate(self._paths)}
        self._text = b"".join(encoded)
        self._file_starts = array("q", accumulate((len(text) for text in encoded), initial=0))
        self._table: dict[str, Callable[..., str]] = {"grep": self.grep, "read": self.read}

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run the tool that the agent named.

        Raises:
            ToolError: unknown tool, wrong arguments, or what the tool itself refuses.
        """
        tool = self._table.get(name)
        if tool is None:
            raise ToolError(f"error: no tool {name!r}; there are {', '.join(sorted(self._table))}")
        try:
            return tool(**arguments)
        except TypeError:
            raise ToolError(
                f"error: wrong arguments for {name}: {', '.join(sorted(arguments)) or 'none'}"
            ) from None

    def grep(self, pattern: str, path: str | None = None) -> str:
        """Lines that match a regular expression, as `path:line: text`, sorted by path and line.

        Raises:
            ToolError: bad expression, or a path outside the tree or not in it.
        """
        expression = compile_pattern(pattern)
        path = self._known(path) if path else None
        shown: list[str] = []
        more = 0
        for where, number, line in self.matches(pattern, expression, path):
            if len(shown) < self.limits.max_hits:
                shown.append(f"{where}:{number}: {_cut(line.strip(), self.limits.hit_width)}")
            else:
                more += 1
        if not shown:
            return "no match"
        return "\n".join([*shown, f"{more} more"] if more else shown)

    def read(self, path: str, start: int = 1, end: int | None = None) -> str:
        """Lines `start` to `end` of a file: `default_lines` where no end is given, else at most `max_lines`.

        They come without numbers: the agent named the first, and to a small model digits are a third of a
        result.

        Raises:
            ToolError: a path outside the tree or not in it, or a range that holds no line.
        """
        lines = self._lines(self._known(path))
        first = _line_number("start", start)
        last = first + self.limits.default_lines - 1 if end is None else _line_number("end", end)
        if first < 1 or last < first or first > len(lines):
            raise ToolError(f"error: no lines {first} to {last}; {path} has {len(lines)}")
        last = min(last, first + self.limits.max_lines - 1, len(lines))
        width = self.limits.line_width
        return "\n".join(_cut(line.rstrip(), width) for line in lines[first - 1 : last])

    def matches(
        self, pattern: str, expression: re.Pattern[str], path: str | None = None
    ) -> Iterator[tuple[str, int, str]]:
        """Every matching line as (path, line number, text)."""
        literal = required_literal(pattern)
        if path is None and literal:
            candidates = self._lines_holding(literal.encode("utf-8", "surrogatepass"))
        else:
            candidates = self._all_lines(self._paths if path is None else [path])
        return (found for found in candidates if expression.search(found[2]))

    def _all_lines(self, paths: Iterable[str]) -> Iterator[tuple[str, int, str]]:
        for path in paths:
            for number, line in enumerate(self._lines(path), 1):
                yield path, number, line

    def _lines_holding(self, literal: bytes) -> Iterator[tuple[str, int, str]]:
        """Each line with `literal` in it, in order, once."""
        text = self._text
        file, number, counted_to = -1, 1, 0
        at = text.find(literal)
        while at >= 0:
            if at >= self._file_starts[file + 1]:
                file = bisect_right(self._file_starts, at) - 1
                number, counted_to = 1, self._file_starts[file]
            number += text.count(b"\n", counted_to, at)
            counted_to = at
            end = text.find(b"\n", at)
            yield self._paths[file], number, text[text.rfind(b"\n", 0, at) + 1 : end].decode()
            at = text.find(literal, end)

    def _lines(self, path: str) -> list[str]:
        number = self._number[path]
        text = self._text[self._file_starts[number] : self._file_starts[number + 1] - 1].decode()
        return SourceFile(path, text).lines()

    def _known(self, path: str) -> str:
        """The path in the form the tree uses."""
        if not isinstance(path, str) or "\x00" in path:
            raise ToolError("error: path must be text")
        plain = posixpath.normpath(path.strip())
        if plain.startswith(("/", "..", "~")):
            raise ToolError(f"error: path {_cut(path, 80)!r} is outside the tree; paths are relative to it")
        if plain not in self._number:
            raise ToolError(f"error: no file {_cut(path, 80)!r} in the tree")
        return plain


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile an agent's regular expression.

    Raises:
        ToolError: empty, too long, not text or not an expression.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ToolError("error: pattern must be text that is not empty")
    if len(pattern) > MAX_PATTERN:
        raise ToolError(f"error: pattern has {len(pattern)} characters, at most {MAX_PATTERN} are allowed")
    try:
        with _no_warnings():
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as problem:
        raise ToolError(f"error: bad pattern: {str(problem).splitlines()[0]}") from None


def required_literal(pattern: str) -> str:
    """The longest run of plain characters that stands in every match of a pattern; "" where none is sure.

    Only the top level of the parsed expression counts, so that branches and repeats never mislead. A run with
    a line break in it is of no use, because a line has none.
    """
    parser = importlib.import_module("re._parser")
    with _no_warnings():
        parsed = parser.parse(pattern)
    if parsed.state.flags & (re.IGNORECASE | re.LOCALE):
        return ""
    runs = [""]
    for operation, argument in parsed:
        name = str(operation)
        if name == "LITERAL":
            runs[-1] += chr(argument)
        elif name != "AT":
            runs.append("")
    best = max(runs, key=len)
    return "" if "\n" in best else best


def plain_grep_lines(tree: Tree, pattern: str) -> list[tuple[str, int, str]]:
    """The obvious twin of `CodeTools.matches`: the expression tried on every line of every file."""
    expression = compile_pattern(pattern)
    return [
        (file.path, number, line)
        for file in tree.files
        for number, line in enumerate(file.lines(), 1)
        if expression.search(line)
    ]


@contextmanager
def _no_warnings() -> Iterator[None]:
    """A model's odd expressions are not news to the person at the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line_number(name: str, value: Any) -> int:
    """A model writes numbers as text now and then; both are taken."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ToolError(f"error: {name} must be a line number, got {_cut(repr(value), 40)}")
    return value


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width] + "..."
