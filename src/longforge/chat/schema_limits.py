"""How large a JSON schema may be before compiling it takes longer than a request may take."""

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from longforge.chat.schema import MAX_NESTING, too_deep
from longforge.errors import InputError

__all__ = ["check_limits"]

# Compilers compare the members of one list with each other, so the limits are on the whole schema's members.
_MOST = {"patternProperties": 16, "oneOf": 40, "allOf": 40, "anyOf": 500, "properties": 1000, "enum": 10_000}
_MOST_PARTS = 20_000


def check_limits(schema: Any, where: str) -> None:
    """Refuses a schema that is too much work. Errors: InputError about `where`."""
    if too_deep(schema):
        raise InputError(f"{where}: nested deeper than {MAX_NESTING} levels")
    counts = dict.fromkeys(_MOST, 0)
    for place, node in enumerate(_nodes(schema)):
        if place >= _MOST_PARTS:
            raise InputError(f"{where}: at most {_MOST_PARTS} lists and objects, got more")
        for key in counts.keys() & node.keys():
            if isinstance(node[key], list | dict):
                counts[key] += len(node[key])
            if counts[key] > _MOST[key]:
                raise InputError(f"{where}: {key}: at most {_MOST[key]} members in all, got more")
        if "multipleOf" in node:
            _check_divisor(node["multipleOf"], where)


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _check_divisor(value: Any, where: str) -> None:
    """The automaton of a divisor has as many states as the divisor."""
    try:
        _, digits, exponent = Decimal(str(value)).normalize().as_tuple()
    except InvalidOperation:
        return  # a property of that name, or no number: the compiler says so
    if not isinstance(exponent, int) or len(digits) + max(exponent, 0) > 4 or exponent < -9:
        raise InputError(f"{where}: multipleOf: expected at most 4 digits, got {value!r:.40}")
