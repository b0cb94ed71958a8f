"""What a name means at module level: imports, aliases, dotted names, assignments, followed by reading.

Nothing is imported or run. A name with several bindings resolves only if all that resolve agree.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Bindings", "ModuleTable", "module_bindings", "module_name"]

ClassKey = tuple[str, str]
"""(path, class name)"""


@dataclass(frozen=True)
class _FromImport:
    """`from module import name`; `level` counts the leading dots."""

    module: str
    name: str
    level: int


@dataclass(frozen=True)
class _Import:
    """`import module` (binds the first part) or `import module as x` (binds the whole)."""

    module: str


_Binding = str | _FromImport | _Import | ast.expr
"""What a name is bound to; a plain string is the name of a class defined here."""


@dataclass
class Bindings:
    """The module-level names of one file."""

    names: dict[str, list[_Binding]] = field(default_factory=dict)
    stars: list[_FromImport] = field(default_factory=list)

    def bind(self, name: str, value: _Binding) -> None:
        self.names.setdefault(name, []).append(value)


def module_name(path: str) -> str:
    """Dotted module name of a file: `a/b.py` is `a.b`, `a/__init__.py` is `a`."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_bindings(module: ast.Module) -> Bindings:
    """Collect what each module-level name is bound to, in order of appearance."""
    bindings = Bindings()
    for node in _statements(module.body):
        if isinstance(node, ast.ClassDef):
            bindings.bind(node.name, node.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                bindings.bind(alias.asname or whole, _Import(whole))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = _FromImport(node.module or "", alias.name, node.level)
                if alias.name == "*":
                    bindings.stars.append(source)
                else:
                    bindings.bind(alias.asname or alias.name, source)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    bindings.bind(target.id, node.value)
    return bindings


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at module level, those inside `if`, `try` and `with` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


class ModuleTable:
    """Resolves expressions of one tree to classes of the same tree."""

    def __init__(self, files: Mapping[str, Bindings]) -> None:
        self._files = files
        self._modules = {module_name(path): path for path in sorted(files)}

    def resolve(self, path: str, expression: ast.expr) -> ClassKey | None:
        """The one class that `expression` means in file `path`; None where unknown, outside or ambiguous."""
        if isinstance(expression, ast.Subscript):
            expression = expression.value
        found = self._expression(path, expression, frozenset())
        return found if isinstance(found, tuple) else None

    def _expression(self, path: str, expression: ast.expr, seen: frozenset) -> ClassKey | str | None:
        """A class as (path, name), or a module as its dotted name."""
        if isinstance(expression, ast.Name):
            return self._name(path, expression.id, seen)
        if isinstance(expression, ast.Attribute):
            owner = self._expression(path, expression.value, seen)
            if isinstance(owner, str):
                return self._member(owner, expression.attr, seen)
        return None

    def _name(self, path: str, name: str, seen: frozenset) -> ClassKey | str | None:
        if (path, name) in seen:
            return None
        seen = seen | {(path, name)}
        file = self._files[path]
        bindings: list[_Binding] = list(file.names.get(name, ()))
        if not bindings and not name.startswith("_"):
            bindings = [_FromImport(star.module, name, star.level) for star in file.stars]
        found = {self._binding(path, binding, seen) for binding in bindings} - {None}
        return found.pop() if len(found) == 1 else None

    def _binding(self, path: str, binding: _Binding, seen: frozenset) -> ClassKey | str | None:
        if isinstance(binding, str):
            return (path, binding)
        if isinstance(binding, _Import):
            return binding.module
        if isinstance(binding, _FromImport):
            module = self._absolute(path, binding)
            return None if module is None else self._member(module, binding.name, seen)
        return self._expression(path, binding, seen)

    def _member(self, module: str, name: str, seen: frozenset) -> ClassKey | str | None:
        """Attribute `name` of a module: what the module binds, else its submodule."""
        path = self._modules.get(module)
        if path is not None:
            found = self._name(path, name, seen)
            if found is not None:
                return found
        submodule = f"{module}.{name}"
        return submodule if self._is_package_or_module(submodule) else None

    def _is_package_or_module(self, module: str) -> bool:
        return module in self._modules or any(name.startswith(module + ".") for name in self._modules)

    def _absolute(self, path: str, source: _FromImport) -> str | None:
        if source.level == 0:
            return source.module
        package = module_name(path).split(".")
        if not path.endswith("__init__.py"):
            package = package[:-1]
        if source.level - 1 > len(package):
            return None
        package = package[: len(package) - (source.level - 1)]
        return ".".join([*package, source.module] if source.module else package)
