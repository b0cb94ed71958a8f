"""A body that does not validate, in one line that names the field."""

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["describe_invalid"]

# Pydantic adds the names of union members to the place of an error; they are no keys of the body.
_UNION_MEMBERS = {"str", "int", "float", "bool", "none", "list", "NamedTool"}


def describe_invalid(errors: Sequence[Any], body: Any = None) -> tuple[str, str | None]:
    """One line about the first thing wrong with a body, and the top-level field it is in.

    errors: pydantic's list of errors; FastAPI prefixes each place with "body". body: what was sent; with it,
    no tag of a union can be taken for a key.
    """
    first = errors[0]
    if first["type"] != "extra_forbidden" and _is_union_member(first["loc"][-1]):
        # Every member of a union complains; the one that got furthest into the value is the one that was
        # meant.
        union = first["loc"][:-1]
        first = max((e for e in errors if e["loc"][: len(union)] == union), key=lambda e: len(e["loc"]))
    place = [part for part in first["loc"] if part != "body"]
    field = str(place[0]) if place and isinstance(place[0], str) else None
    if isinstance(body, dict):
        keys = _keys_of(body, place[:-1] if first["type"] == "missing" else place)
        keys += place[-1:] if first["type"] == "missing" else []
    else:
        keys = [p for p in place if not _is_union_member(p)]
        if first["type"] == "extra_forbidden" and keys[-1:] != place[-1:]:
            keys.append(place[-1])  # an unknown field is the body's own word, whatever it looks like
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".") or "body"
    path = path if path.isprintable() else json.dumps(path)
    if first["type"] == "extra_forbidden":
        return f"{path}: this server does not support the field; leave it out", field
    if first["type"] == "missing":
        return f"{path}: expected a value, the field is missing", field
    if first["type"] == "json_invalid":
        return f"body: expected JSON, got something else ({first['ctx']['error']})", None
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "value_error" and not place:
        named = message.partition(":")[0]  # a rule about several fields names them itself
        return message, named if named.isidentifier() else None
    if first["type"] == "value_error":
        return f"{path}: {message}", field
    return f"{path}: {message}, got {_shown(first.get('input'))}", field


def _keys_of(here: Any, place: Sequence[Any]) -> list[Any]:
    """Those parts of a place that lead on inside `here`; the others are pydantic's names of union members.

    Where a name is a key as well, it is read so that the place's last part is a key, and most others.
    """
    if not place:
        return []
    part, rest = place[0], place[1:]
    skipped = _keys_of(here, rest)
    of_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
    if not of_list and not (isinstance(here, dict) and part in here):
        return skipped
    kept = [part, *_keys_of(here[part], rest)]
    return max(kept, skipped, key=lambda keys: (keys[-1:] == list(place[-1:]), len(keys)))


def _is_union_member(part: Any) -> bool:
    return isinstance(part, str) and (part in _UNION_MEMBERS or "[" in part)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:80]
    except RecursionError:
        return "a value nested too deeply to show"
