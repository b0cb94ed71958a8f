"""The outcome of one check, and of all of them for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Check", "as_document", "as_line", "passed", "verdict"]


@dataclass(frozen=True)
class Check:
    """What was compared and how it came out. `name` is stable."""

    name: str
    passed: bool
    detail: str


def passed(checks: Sequence[Check]) -> bool:
    """Whether there were checks and all of them passed."""
    return bool(checks) and all(check.passed for check in checks)


def as_line(check: Check) -> str:
    """One line for people."""
    return f"{'ok' if check.passed else 'FAIL':4}  {check.name:32}  {check.detail}"


def verdict(checks: Sequence[Check]) -> str:
    """The last line for people."""
    wrong = [check.name for check in checks if not check.passed]
    if wrong or not checks:
        return f"failed: {', '.join(wrong) or 'nothing was checked'}"
    return f"passed: {len(checks)} checks, the engine's features change nothing here"


def as_document(checks: Sequence[Check], about: dict[str, Any]) -> dict[str, Any]:
    """The same, ready for JSON. about: model, device, dtype, versions, commit."""
    return {"passed": passed(checks), "checks": [asdict(check) for check in checks], **about}
