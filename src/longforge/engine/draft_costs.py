"""What steps and draft passes cost on this machine: measured once, on an idle engine."""

import math
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from longforge.engine.draft_length import DraftCosts
from longforge.engine.request import GenerationRequest
from longforge.engine.runner import Runner, Stretch
from longforge.engine.sequence import Sequence

__all__ = ["GUESSED_COSTS", "PLAIN", "measured_costs"]

GUESSED_COSTS = DraftCosts()
"""Until they are measured."""

PLAIN = DraftCosts(rows=(1,), step=(1.0,), draft=(math.inf,))
"""Under these nothing is guessed."""

ROWS = (1, 2, 3, 4, 8, 16, 32, 64)
REPEATS = 5


def measured_costs(runner: Runner, alone: float, pages: int, max_running: int) -> DraftCosts:
    """Costs in seconds by rows.

    alone: seconds of a whole step of one row; what of them is not the model's is added to every step, and a
    third of it to every draft pass. The pages must hold nothing that is still wanted: they are written to.
    """
    sizes = [rows for rows in ROWS if rows <= min(max_running, pages)]
    place = runner.block_size - 1
    sequences = []
    for row in range(sizes[-1]):
        sequence = Sequence(GenerationRequest("costs", (0,)), limit=2, seed=0, arrival=0)
        sequence.row, sequence.pages = row, [row]
        runner.show_pages(sequence, 0)
        sequences.append(sequence)
    step, draft = [], []
    for rows in sizes:
        stretches = [Stretch(s, place, [0]) for s in sequences[:rows]]
        step.append(_seconds(lambda s=stretches: _step(runner, s)))
        draft.append(_seconds(lambda s=stretches: _draft(runner, s)))
    beside = max(0.0, alone - step[0])
    return DraftCosts(tuple(sizes), tuple(s + beside for s in step), tuple(d + beside / 3 for d in draft))


def _step(runner: Runner, stretches: Seq[Stretch]) -> None:
    places = range(len(stretches))
    _wait_for(runner.logits_at(runner.run(stretches, places), places))


def _draft(runner: Runner, stretches: Seq[Stretch]) -> None:
    rows = len(stretches)
    before = torch.zeros(rows, runner.model.config.hidden_size, device=runner.device)
    if runner.guess(stretches, [before], [1] * rows) is None:
        _wait_for(runner.logits(runner.run_drafts(stretches, before)))


def _wait_for(result: torch.Tensor) -> None:
    result.sum().item()


def _seconds(work: Callable[[], None]) -> float:
    """Median over a few runs after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
