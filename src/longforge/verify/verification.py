"""All checks in the order in which they are made."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import torch

from longforge.errors import LongforgeError
from longforge.observe import passport
from longforge.verify.batches import (
    batched_equals_alone,
    chunked_equals_one_shot,
    preemption_equals_uninterrupted,
)
from longforge.verify.cached import cache_on_equals_cache_off
from longforge.verify.check import Check
from longforge.verify.dialects import dialects_agree
from longforge.verify.restored import tiers_equal_memory
from longforge.verify.selection import selection_is_exact
from longforge.verify.speculation import speculation_equals_plain, verify_equals_decode
from longforge.verify.subject import Subject
from longforge.verify.weights import weights_have_versions

__all__ = ["CHECKS", "about", "checks"]


def pages_add_up(subject: Subject) -> Check:
    """Every engine of the other checks, at rest: its pages were free or cached, and none was lost."""
    if subject.leaks:
        return Check("pages_add_up", False, "; ".join(subject.leaks[:3]))
    told = f"{subject.engines} engines, {subject.pages} pages: free + cached = all"
    return Check("pages_add_up", subject.engines > 0, told)


CHECKS: tuple[Callable[[Subject], Check], ...] = (
    cache_on_equals_cache_off,
    chunked_equals_one_shot,
    batched_equals_alone,
    speculation_equals_plain,
    preemption_equals_uninterrupted,
    tiers_equal_memory,
    verify_equals_decode,
    selection_is_exact,
    dialects_agree,
    weights_have_versions,
    pages_add_up,
)
"""A check's name is its function's. The last one looks at what the others left."""

FAILURES = (LongforgeError, AssertionError, httpx.HTTPError, RuntimeError, ValueError, LookupError)
"""What broken code ends with: our own errors, those of the client, torch's, and what wrong values lead to."""


def checks(subject: Subject) -> Iterator[Check]:
    """Makes each check and tells it when it is done. One that ends with an error has failed."""
    for check in CHECKS:
        try:
            yield check(subject)
        except FAILURES as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            yield Check(check.__name__, False, told)


def about(subject: Subject) -> dict[str, Any]:
    """What the outcome is about: plain values, ready for JSON."""
    device = subject.model.device
    machine = passport(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    return {
        "model": subject.name,
        "device": f"{device.type}: {machine['device']}",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        **{key: machine[key] for key in ("versions", "commit", "dirty")},
    }
