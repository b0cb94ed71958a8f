"""What the serving benchmark is asked, and what it has loaded for that."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longforge.bench.serve_rates import Deadline
from longforge.bench.serve_rival import Rival
from longforge.bench.serve_rows import About
from longforge.chat import Tokenizer
from longforge.model import CausalLM

__all__ = ["MEASURES", "ServeOptions", "Setting", "say"]

MEASURES = ("decode", "http", "speculation", "prefill", "first-token")


@dataclass(frozen=True)
class ServeOptions:
    """What to measure. Lengths in tokens."""

    folder: Path
    measures: Sequence[str] = MEASURES
    dtypes: Sequence[str] = ("fp32", "bf16")
    """The first is also that of the rows that compare us with ourselves."""
    batches: Sequence[int] = (1, 16)
    prompt: int = 96
    tokens: int = 128
    """New tokens of each answer."""
    prefill: Sequence[int] = (512, 2048)
    first_token: Sequence[int] = (2048, 102_400)
    talks: int = 3
    """Conversations of the speculation rows."""
    rounds: int = 5
    minutes: float | None = None
    """No new point is begun after this long."""
    compiled: bool = True
    """Whether transformers may compile its step, which takes half a minute for each dtype and batch size."""


@dataclass
class Setting:
    """The models of both sides by dtype. `missing` says why transformers' are not there."""

    options: ServeOptions
    deadline: Deadline
    about: About
    models: dict[str, CausalLM]
    rivals: dict[str, Rival] = field(default_factory=dict)
    missing: str = ""
    tokenizer: Tokenizer | None = None

    def out_of_time(self, what: str) -> bool:
        """Whether the deadline has passed; says on stderr what is left out."""
        if self.deadline.passed:
            say(f"{what}: left out, the time is up")
        return self.deadline.passed


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)
