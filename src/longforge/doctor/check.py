"""One thing that was looked at, and a list of them for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Check", "Status", "as_document", "as_lines", "healthy"]

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was found. `fix` says what to do about it, "" where there is nothing to do.

    fail: Longforge does not work here. warn: something is slower or left out.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def healthy(checks: Sequence[Check]) -> bool:
    """Whether nothing fails."""
    return all(check.status != "fail" for check in checks)


def as_lines(checks: Sequence[Check]) -> str:
    """A line per check, and one for the fix below it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.found}")
        if check.fix:
            lines.append(f"      {'':{width}}  fix: {check.fix}")
    return "\n".join(lines)


def as_document(checks: Sequence[Check]) -> dict[str, Any]:
    """The same, ready for JSON: `healthy` and the list of `checks`."""
    return {"healthy": healthy(checks), "checks": [asdict(check) for check in checks]}
