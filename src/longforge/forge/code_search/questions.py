"""Questions about a tree that have exactly one right answer, split by symbol into train and held-out.

| kind          | question                                                    | least calls      |
|---------------|-------------------------------------------------------------|------------------|
| `defines`     | which file defines class X?                                 | grep             |
| `base`        | which file defines the class that X inherits from?          | grep grep        |
| `method`      | the first method of X besides `__init__`?                   | grep read        |
| `base_method` | the same of the class that X inherits from?                 | grep grep read   |

An aliased base costs one more `grep`. `base` asks only about a base in another file, because otherwise
stopping halfway would be right. X is a name that one class statement of the whole tree carries. The split
looks at X alone: a held-out X is never the subject of a train question, but two subjects may share a base.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from longforge.errors import InputError
from longforge.forge.code_search.index import ClassDef, CodeIndex
from longforge.forge.code_search.tools import ToolLimits

__all__ = ["DEFAULT_MIX", "KINDS", "Kind", "Question", "QuestionSet", "Split", "split_of"]

Kind = Literal["defines", "base", "method", "base_method"]
Split = Literal["train", "held_out"]

KINDS: dict[Kind, str] = {
    "defines": "Which file defines class {symbol}?",
    "base": "Which file defines the class that {symbol} inherits from?",
    "method": "What is the first method of class {symbol} besides __init__?",
    "base_method": "What is the first method besides __init__ of the class that {symbol} inherits from?",
}
"""The wording of each kind."""

DEFAULT_MIX: dict[Kind, float] = {"defines": 0.2, "base": 0.25, "method": 0.3, "base_method": 0.25}


@dataclass(frozen=True)
class Question:
    """One question with its only right answer: a path relative to the tree, or a method's name."""

    kind: Kind
    symbol: str
    text: str
    answer: str


def split_of(symbol: str, held_out_share: float = 0.3) -> Split:
    """The side a symbol falls on: a hash of its name, the same on every machine and in every process."""
    digest = hashlib.blake2b(symbol.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") < held_out_share * 2**64 else "train"


class QuestionSet:
    """Every question that a tree supports, by split and kind."""

    def __init__(
        self,
        index: CodeIndex,
        *,
        held_out_share: float = 0.3,
        reach: int = 12,
        limits: ToolLimits | None = None,
    ) -> None:
        """`reach`: a method question is asked where the answer stands within so many lines of `class`."""
        if not 0 < held_out_share < 1:
            raise InputError(f"held_out_share: expected a share between 0 and 1, got {held_out_share}")
        self.held_out_share = held_out_share
        self.reach = reach
        self._index = index
        self._hit_width = (limits or ToolLimits()).hit_width
        self._lines = {file.path: file.lines() for file in index.tree.files}
        self.questions: dict[Split, dict[Kind, list[Question]]] = {
            split: {kind: [] for kind in KINDS} for split in ("train", "held_out")
        }
        for entry in index.classes:
            if index.unique(entry.name):
                by_kind = self.questions[split_of(entry.name, held_out_share)]
                for kind, answer in self._answers(entry):
                    text = KINDS[kind].format(symbol=entry.name)
                    by_kind[kind].append(Question(kind, entry.name, text, answer))

    def sample(
        self, split: Split, seed: int, n: int, mix: Mapping[Kind, float] | None = None
    ) -> list[Question]:
        """`n` different questions in random order, kinds in the shares of `mix`.

        A kind with too few questions gives all it has and the other kinds fill its place.

        Raises:
            InputError: unknown kind, or the split holds fewer than `n` questions of the kinds in the mix.
        """
        shares = self._shares(mix)
        available: dict[Kind, int] = {kind: len(self.questions[split][kind]) for kind in shares}
        if sum(available.values()) < n:
            raise InputError(
                f"questions: expected {n} {split} questions, the tree supports {sum(available.values())}; "
                "ask for fewer or name a larger tree"
            )
        counts = _apportion(shares, available, n)
        rng = random.Random(f"sample {split} {seed}")
        drawn = [q for kind in shares for q in rng.sample(self.questions[split][kind], counts[kind])]
        rng.shuffle(drawn)
        return drawn

    def stream(self, split: Split, seed: int, mix: Mapping[Kind, float] | None = None) -> Iterator[Question]:
        """Questions without end: the kind drawn by `mix`, each kind's questions dealt like shuffled cards.

        Raises:
            InputError: unknown kind, or the split holds no question of the kinds in the mix.
        """
        shares: dict[Kind, float] = {
            kind: share for kind, share in self._shares(mix).items() if self.questions[split][kind]
        }
        if not shares:
            raise InputError(f"questions: the tree supports no {split} question; name a larger tree")
        return self._deal(split, seed, shares)

    def _deal(self, split: Split, seed: int, shares: dict[Kind, float]) -> Iterator[Question]:
        rng = random.Random(f"stream {split} {seed}")
        decks: dict[Kind, list[Question]] = {kind: [] for kind in shares}
        while True:
            (kind,) = rng.choices(list(shares), list(shares.values()))
            if not decks[kind]:
                decks[kind] = rng.sample(self.questions[split][kind], len(self.questions[split][kind]))
            yield decks[kind].pop()

    def _shares(self, mix: Mapping[Kind, float] | None) -> dict[Kind, float]:
        mix = DEFAULT_MIX if mix is None else mix
        unknown = sorted(set(mix) - set(KINDS))
        if unknown or any(share < 0 for share in mix.values()) or sum(mix.values()) <= 0:
            raise InputError(
                f"mix: expected shares of {', '.join(KINDS)} with a positive sum, got {dict(mix)}"
            )
        return {kind: mix[kind] for kind in KINDS if mix.get(kind, 0) > 0}

    def _answers(self, entry: ClassDef) -> Iterator[tuple[Kind, str]]:
        yield "defines", entry.path
        if self._near(entry) and entry.first_method:
            yield "method", entry.first_method.name
        base = self._index.find(*entry.base) if entry.base else None
        if base is None or not self._base_is_plain(entry, base):
            return
        if base.path != entry.path:
            yield "base", base.path
        if self._near(base) and base.first_method:
            yield "base_method", base.first_method.name

    def _near(self, entry: ClassDef) -> bool:
        return entry.first_method is not None and entry.first_method.line - entry.line < self.reach

    def _base_is_plain(self, entry: ClassDef, base: ClassDef) -> bool:
        """Whether an agent that sees the class line can tell which class is meant.

        The line must show the whole base, and the base's name must be unique, of the same file, or qualified
        by the module that defines it.
        """
        shown = self._lines[entry.path][entry.line - 1].strip()[: self._hit_width]
        if f"class {entry.name}({entry.bases[0]}" not in shown.replace("( ", "("):
            return False
        if self._index.unique(base.name) or base.path == entry.path:
            return True
        qualifier = entry.bases[0].split(".")[-2:-1]
        return qualifier == [base.path.removesuffix("/__init__.py").removesuffix(".py").split("/")[-1]]


def _apportion(shares: Mapping[Kind, float], available: Mapping[Kind, int], n: int) -> dict[Kind, int]:
    """Counts that sum to `n`, near the shares, none above what is available; deterministic."""
    counts: dict[Kind, int] = {kind: 0 for kind in shares}  # noqa: C420 (fromkeys loses the key's type)
    for _ in range(n):
        open_kinds: list[Kind] = [kind for kind in shares if counts[kind] < available[kind]]
        counts[min(open_kinds, key=lambda kind: (counts[kind] + 1) / shares[kind])] += 1
    return counts
