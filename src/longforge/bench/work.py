"""What is measured: the layer's shape, the queries of a phase, and the bytes and FLOPs that they need.

Counts follow the MSA paper (arXiv 2606.13392, eq. 12) for the forward pass and the formulas of the official
training benchmark for the backward pass and the index loss; a fused multiply-add is two FLOPs.
"""

from dataclasses import dataclass
from typing import Literal

from longforge.errors import InputError

__all__ = ["PHASES", "Phase", "Shape", "Work", "parse_length", "parse_phases"]

Phase = Literal["decode", "prefill", "train"]
PHASES: tuple[Phase, ...] = ("decode", "prefill", "train")


@dataclass(frozen=True)
class Shape:
    """One attention layer; the defaults are M3's."""

    heads: int = 64
    groups: int = 4
    dim: int = 128
    index_dim: int = 128
    block_size: int = 128
    top_k: int = 16

    def __post_init__(self) -> None:
        for name in ("heads", "groups", "dim", "index_dim", "block_size", "top_k"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: at least 1 expected, got {getattr(self, name)}")
        if self.heads % self.groups:
            raise InputError(f"heads: a multiple of the {self.groups} groups expected, got {self.heads}")


@dataclass(frozen=True)
class Work:
    """`queries` tokens of one sequence from position `first` on, and all keys up to the last of them.

    decode   the last token of the context
    prefill  one chunk in the middle of the context. What a chunk costs grows linearly with its depth, for
             dense attention and for MSA, so this one costs what the chunks of a whole prefill cost on average
    train    all tokens: forward, backward, and the index loss on our side
    """

    phase: Phase
    length: int
    queries: int
    first: int

    @staticmethod
    def of(phase: Phase, length: int, chunk: int) -> "Work":
        """The work of a phase at a context of this length, in tokens."""
        queries = {"decode": 1, "prefill": min(chunk, length), "train": length}[phase]
        first = {"decode": length - 1, "prefill": (length - queries) // 2, "train": 0}[phase]
        return Work(phase, length, queries, first)

    @property
    def keys(self) -> int:
        """Tokens with keys and values."""
        return self.first + self.queries

    @property
    def seen(self) -> int:
        """(query, key) pairs of causal attention."""
        return self.queries * self.first + self.queries * (self.queries + 1) // 2

    def selected(self, shape: Shape) -> int:
        """(query, key) pairs inside the selected blocks, for one group."""
        size, total = shape.block_size, 0
        for block in range(self.first // size, (self.keys - 1) // size + 1):
            low, high = max(self.first, block * size), min(self.keys, (block + 1) * size)
            offsets = range(low - block * size + 1, high - block * size + 1)
            total += sum(offsets) + (high - low) * min(shape.top_k - 1, block) * size
        return total

    def dense_flops(self, shape: Shape) -> int:
        """Of dense attention; a training step is forward (4 Hq D) and backward (10 Hq D) for each pair."""
        return (14 if self.phase == "train" else 4) * shape.heads * shape.dim * self.seen

    def flops(self, shape: Shape) -> int:
        """Of MSA: index scores over all pairs, attention over the selected ones; in training also both
        backward passes and the index loss."""
        index = 2 * shape.groups * shape.index_dim * self.seen
        pairs = self.selected(shape)
        if self.phase != "train":
            return index + 4 * shape.heads * shape.dim * pairs
        loss = 2 * (shape.heads * shape.dim + 3 * shape.groups * shape.index_dim)
        return index + (14 * shape.heads * shape.dim + loss) * pairs

    def dense_bytes(self, shape: Shape, width: int) -> int:
        """Read and written by a forward pass at least: keys and values once, queries and outputs. `width`:
        bytes of a number."""
        return 2 * width * shape.dim * (shape.groups * self.keys + shape.heads * self.queries)

    def bytes(self, shape: Shape, width: int, index_width: float) -> int:
        """The same for MSA: index keys once, selected keys and values (each at most once), queries,
        outputs."""
        index = shape.index_dim * (index_width * self.keys + width * shape.groups * self.queries)
        pairs = min(self.selected(shape), self.keys)
        return int(index) + 2 * width * shape.dim * (shape.groups * pairs + shape.heads * self.queries)

    def limit(self, shape: Shape, width: int, index_width: float) -> float:
        """The speed-up that remains where both sides run at the hardware's limit: the ratio of bytes in
        decode, of FLOPs elsewhere."""
        if self.phase == "decode":
            return self.dense_bytes(shape, width) / self.bytes(shape, width, index_width)
        return self.dense_flops(shape) / self.flops(shape)


def parse_length(text: str) -> int:
    """Tokens: "4096", "32k" (1024 each), "1m". Raises InputError."""
    number, unit = text.strip().lower(), 1
    if number and number[-1] in "km":
        unit = {"k": 1 << 10, "m": 1 << 20}[number[-1]]
        number = number[:-1]
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"length: tokens like 4096, 32k or 1m expected, got {text!r}")
    return int(number) * unit


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Names with commas between. Raises InputError."""
    given = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in given if name not in PHASES]
    if unknown or not given:
        raise InputError(f"phase: some of {', '.join(PHASES)} expected, got {text!r}")
    return tuple(phase for phase in PHASES if phase in given)
