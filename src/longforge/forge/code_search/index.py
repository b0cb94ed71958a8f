"""AST index of a Python tree: the judge of every answer.

For each class: where it is defined, what it inherits from (through imports, aliases, dotted names and simple
assignments) and its first method other than `__init__`. The index sees more than the agent's tools do, and
never guesses: a base that could mean two classes is left unresolved.
"""

import ast
import gc
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longforge.forge.code_search.resolve import Bindings, ModuleTable, module_bindings
from longforge.forge.code_search.tree import EXCLUDED, Tree, default_tree, load_tree

__all__ = ["ClassDef", "CodeIndex", "FirstMethod", "build_index", "index_tree"]


@dataclass(frozen=True)
class FirstMethod:
    """The first `def` in a class body that is not `__init__`, decorators not counted."""

    name: str
    line: int


@dataclass(frozen=True)
class ClassDef:
    """One class statement at module level (inside `if` or `try` at module level too)."""

    name: str
    path: str
    line: int
    """Line of the word `class`, from 1."""
    bases: tuple[str, ...]
    """Base expressions as written, keyword arguments such as `metaclass=` left out."""
    base: tuple[str, str] | None
    """(path, name) of the only base where it resolves to one class of the tree."""
    first_method: FirstMethod | None
    """`__init__` is passed over: it comes first in two classes of three, so an agent could guess it.

    None where there is no other method, or where a nested `def` or `class` comes before it in the text.
    """


@dataclass(frozen=True)
class CodeIndex:
    """Every class of a tree, sorted by (path, line)."""

    tree: Tree
    classes: tuple[ClassDef, ...]
    skipped: tuple[str, ...]
    """Files that do not parse or cannot be read."""
    occurrences: dict[str, int]
    """How many class statements, nested ones included, carry a name."""

    def unique(self, name: str) -> bool:
        """Whether exactly one class statement of the tree carries this name."""
        return self.occurrences.get(name, 0) == 1

    def find(self, path: str, name: str) -> ClassDef | None:
        """The class of that name in that file; None where there is none or more than one."""
        found = [c for c in self.classes if c.path == path and c.name == name]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _ClassStatement:
    """What is kept of a class statement while its file's syntax tree is dropped."""

    name: str
    line: int
    bases: tuple[ast.expr, ...]
    first_method: FirstMethod | None


def build_index(path: str | Path | None = None, excluded: Sequence[str] = EXCLUDED) -> CodeIndex:
    """Index the tree at `path` (default: the standard library of the running interpreter).

    Raises:
        InputError: no such folder, or no Python file in it.
    """
    return index_tree(load_tree(default_tree() if path is None else path, excluded))


def index_tree(tree: Tree) -> CodeIndex:
    """Index a tree that is already loaded."""
    skipped = list(tree.unreadable)
    bindings: dict[str, Bindings] = {}
    statements: list[tuple[str, _ClassStatement]] = []
    occurrences: Counter[str] = Counter()
    with _collector_paused():
        for file in tree.files:
            module = _parse(file.text)
            if module is None:
                skipped.append(file.path)
                continue
            bindings[file.path] = module_bindings(module)
            occurrences.update(node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef))
            statements += [(file.path, _read_class(node)) for node in _module_level_classes(module.body)]
    table = ModuleTable(bindings)
    classes = [
        ClassDef(
            name=statement.name,
            path=path,
            line=statement.line,
            bases=tuple(ast.unparse(base) for base in statement.bases),
            base=table.resolve(path, statement.bases[0]) if len(statement.bases) == 1 else None,
            first_method=statement.first_method,
        )
        for path, statement in statements
    ]
    classes.sort(key=lambda c: (c.path, c.line))
    return CodeIndex(tree, tuple(classes), tuple(sorted(skipped)), dict(occurrences))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Syntax trees hold no cycles, and the collector's visits cost five times the parsing itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _module_level_classes(body: Sequence[ast.stmt]) -> list[ast.ClassDef]:
    found: list[ast.ClassDef] = []
    for node in body:
        if isinstance(node, ast.ClassDef):
            found.append(node)
        elif isinstance(node, ast.If):
            found += _module_level_classes(node.body) + _module_level_classes(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)):
                found += _module_level_classes(part)
    return found


def _read_class(node: ast.ClassDef) -> _ClassStatement:
    return _ClassStatement(node.name, node.lineno, tuple(node.bases), _first_method(node))


def _first_method(node: ast.ClassDef) -> FirstMethod | None:
    """The method that a person who reads on from the class line meets as the first `def` but `__init__`."""
    definitions = sorted(
        (
            inner
            for inner in ast.walk(node)
            if inner is not node and isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ),
        key=lambda inner: inner.lineno,
    )
    if definitions and definitions[0].name == "__init__":
        del definitions[0]
    if not definitions or isinstance(definitions[0], ast.ClassDef) or definitions[0] not in node.body:
        return None
    return FirstMethod(definitions[0].name, definitions[0].lineno)
