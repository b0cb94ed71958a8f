"""Windowed FIFO: which finished groups the trainer may take, and when a new one may start.

Forge's rule (M2 report, arXiv 2605.26494, section 6.2, and the Forge post of 2026-02), in the anchored form:

- Every submitted group charges one of B slots until it is pulled by the trainer or retired without training.
- With the oldest group that still holds a slot at sequence h (the head), only *completed* groups in
  [h, h + W - 1] may be pulled, W = max(1, floor(fraction * B)): inside the window any of them, outside none.
- The window is anchored to the head: pulling a group behind the head opens no new place at the far end.

Two promises follow, and the tests hold them:

- at most W - 1 younger groups are pulled before the head is;
- a group is pulled at most floor((B + W - 2) / P) pulls of P groups after it was submitted: when it is
  submitted, at most B - 1 older groups hold slots, and at most W - 1 younger ones can pass it.

`WindowedFifo` looks at no more than the window per group; `PlainWindow` says the same in the obvious way.
"""

import math
from collections.abc import Iterable, Mapping

from longforge.errors import InputError

__all__ = ["PlainWindow", "WindowedFifo", "age_bound", "window_size"]


def window_size(buffer: int, fraction: float) -> int:
    """W = max(1, floor(fraction * B)). A fraction of 0 is strict FIFO."""
    return max(1, math.floor(fraction * buffer))


def age_bound(buffer: int, window: int, per_pull: int) -> int:
    """Most pulls of `per_pull` groups between the submission of a group and its own pull."""
    return (buffer + window - 2) // per_pull


def _check(buffer: int, window: int) -> None:
    if buffer < 1 or not 1 <= window <= buffer:
        raise InputError(f"scheduler: 1 <= window <= buffer expected, got window {window}, buffer {buffer}")


class WindowedFifo:
    """The scheduler. Pure bookkeeping over submission sequences 0, 1, 2, ...; no clock, no thread."""

    def __init__(self, buffer: int, window: int) -> None:
        _check(buffer, window)
        self.buffer, self.window = buffer, window
        self._next = 0
        self._head = 0
        self._held: dict[int, bool] = {}  # sequence -> completed, for every group that holds a slot

    @property
    def head(self) -> int:
        """Sequence of the oldest group that still holds a slot; the next sequence if none does."""
        return self._head

    @property
    def free_slots(self) -> int:
        """Groups that may be submitted now."""
        return self.buffer - len(self._held)

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Sequences that hold a slot, oldest first."""
        return tuple(sorted(self._held))

    @property
    def ready(self) -> int:
        """Completed groups that the window lets through now, if every place were asked for one by one."""
        window = range(self._head, self._head + self.window)
        return sum(self._held.get(sequence, False) for sequence in window)

    def submit(self) -> int:
        """Charges a slot and gives the new group's sequence."""
        if not self.free_slots:
            raise InputError(f"scheduler: all {self.buffer} slots are charged; pull or retire a group first")
        sequence = self._next
        self._next += 1
        self._held[sequence] = False
        return sequence

    def complete(self, sequence: int) -> None:
        """The group's last episode has ended."""
        self._require(sequence)
        self._held[sequence] = True

    def retire(self, sequence: int) -> None:
        """Releases a group that will not be trained on (no variance, given up), wherever it stands."""
        self._require(sequence)
        del self._held[sequence]
        self._advance()

    def pull(self, count: int) -> tuple[int, ...]:
        """Takes `count` groups, the oldest that the window allows one after the other, or none at all.

        All or nothing: slots stay charged until a whole batch can be taken, so that no group is sampled under
        older weights than the buffer demands.
        """
        taken: list[int] = []
        head = self._head
        gone: set[int] = set()
        while len(taken) < count:
            while head < self._next and (head not in self._held or head in gone):
                head += 1
            end = min(head + self.window, self._next)
            ready = (s for s in range(head, end) if s not in gone and self._held.get(s, False))
            sequence = next(ready, None)
            if sequence is None:
                return ()
            taken.append(sequence)
            gone.add(sequence)
        for sequence in taken:
            del self._held[sequence]
        self._advance()
        return tuple(taken)

    def restore(self, next_sequence: int, held: Mapping[int, bool]) -> None:
        """Puts back the state after a restart: which sequences hold slots, and whether they are complete."""
        if len(held) > self.buffer:
            raise InputError(f"scheduler: at most {self.buffer} groups hold slots, got {len(held)}")
        self._next = next_sequence
        self._held = dict(held)
        self._head = 0
        self._advance()

    def _require(self, sequence: int) -> None:
        if sequence not in self._held:
            raise InputError(
                f"scheduler: group {sequence} holds no slot (never submitted, pulled or retired)"
            )

    def _advance(self) -> None:
        while self._head < self._next and self._head not in self._held:
            self._head += 1


class PlainWindow:
    """The dull twin: every group ever submitted in one list, everything found by looking through it."""

    def __init__(self, buffer: int, window: int) -> None:
        _check(buffer, window)
        self.buffer, self.window = buffer, window
        self.states: list[str] = []  # running, completed, gone

    @property
    def head(self) -> int:
        return next((s for s, state in enumerate(self.states) if state != "gone"), len(self.states))

    @property
    def outstanding(self) -> tuple[int, ...]:
        return tuple(s for s, state in enumerate(self.states) if state != "gone")

    @property
    def free_slots(self) -> int:
        return self.buffer - len(self.outstanding)

    def submit(self) -> int:
        self.states.append("running")
        return len(self.states) - 1

    def complete(self, sequence: int) -> None:
        self.states[sequence] = "completed"

    def retire(self, sequence: int) -> None:
        self.states[sequence] = "gone"

    def pull(self, count: int) -> tuple[int, ...]:
        before = list(self.states)
        taken: list[int] = []
        for _ in range(count):
            allowed = range(self.head, self.head + self.window)
            choice = [s for s in allowed if s < len(self.states) and self.states[s] == "completed"]
            if not choice:
                self.states = before
                return ()
            self.states[choice[0]] = "gone"
            taken.append(choice[0])
        return tuple(taken)

    def restore(self, next_sequence: int, held: Mapping[int, bool]) -> None:
        self.states = ["gone"] * next_sequence
        self._mark(held.items())

    def _mark(self, held: Iterable[tuple[int, bool]]) -> None:
        for sequence, completed in held:
            self.states[sequence] = "completed" if completed else "running"
