"""Trains an MTP module alone for what the engine does with it: to guess several tokens ahead.

The engine (`engine.drafts`) gives the module the hidden state of position t-1 and token t, and lets it guess
token t+1; a second and a third guess feed it its own output in place of the hidden state. So it is unrolled:

    pass 1   hidden states of the model          -> output 1
    pass 2   output 1, one position further on   -> output 2
    pass 3   output 2, one position further on   -> output 3

Row t of every output should say what the model itself says after token t, because verification compares with
that: the loss is the divergence from the model's own distribution, over what the assistant writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longforge.errors import InputError
from longforge.model.causal_lm import CausalLM
from longforge.training.config import PretrainConfig
from longforge.training.data import ASSISTANT, Batch, BatchStream
from longforge.training.losses import predecessors
from longforge.training.pretrain import Evaluate, Losses, Pretrainer, StepReport
from longforge.training.schedule import Stage

__all__ = ["PASS_WEIGHTS", "DraftTrainer", "Unrolled", "draft_scores", "unrolled"]

PASS_WEIGHTS = (1.0, 0.8, 0.6)
"""How much each pass counts: a later guess is of use only where those before it were right."""


@dataclass(frozen=True)
class Unrolled:
    """What the passes over one batch give, at the R rows of an answer that a token of it follows."""

    rows: Tensor
    """int64 [R], rows of the batch."""
    wanted: Tensor
    """fp32 [R, V], the model's own log-probabilities."""
    guessed: tuple[Tensor, ...]
    """fp32 [R, V] per pass, the module's logits."""
    index_loss: Tensor | None
    """Of the first pass, summed over the module's sparse layers."""
    expert_loads: list[Tensor]
    """Of the first pass."""


def unrolled(model: CausalLM, batch: Batch, passes: int, *, index_loss: bool) -> Unrolled:
    """Runs the first MTP module `passes` times. Gradients reach nothing before it.

    Passes 2 and 3 see the module's own output only where the assistant writes. Everywhere else their keys are
    of true pairs, as they are when drafting. Inside an answer the engine has true keys as well, and here they
    are of the same pass: an approximation.
    """
    with torch.no_grad():
        hidden = model.forward_packed(batch.ids, batch.layout, expert_loads=False).hidden
    previous = predecessors(batch.layout)
    spoken = batch.weights >= ASSISTANT
    drafted = spoken & (previous >= 0) & spoken[previous]
    rows = torch.unique(previous[drafted])
    with torch.no_grad():
        wanted = F.log_softmax(model.logits(hidden[rows]), dim=-1)
    true = _one_later(hidden, previous)
    outputs, fed = [], true
    for number in range(passes):
        own = index_loss and number == 0
        outputs.append(model.mtp_packed(fed, batch.ids, batch.layout, index_loss=own))
        fed = torch.where(drafted[:, None], _one_later(outputs[-1].hidden, previous), true)
    guessed = tuple(model.logits(output.hidden[rows]) for output in outputs)
    return Unrolled(rows, wanted, guessed, outputs[0].index_loss, outputs[0].expert_loads)


def _one_later(hidden: Tensor, previous: Tensor) -> Tensor:
    """Hidden states [N, d] one position further on in their paths; zeros at the start, as in the engine."""
    return torch.where((previous >= 0)[:, None], hidden[previous], 0.0)


class DraftTrainer(Pretrainer):
    """A `Pretrainer` of the only MTP module; everything else in the model keeps its bits.

    The schedule's shares mean nothing here. In the report `mtp_loss` is the weighted mean of the passes'
    divergences in nats, and `lm_loss` is 0: the model has nothing to learn.
    """

    def __init__(
        self,
        model: CausalLM,
        stream: BatchStream,
        config: PretrainConfig,
        folder: Path,
        *,
        pass_weights: Sequence[float] = PASS_WEIGHTS,
        evaluate: Evaluate | None = None,
        report: Callable[[StepReport], None] | None = None,
    ) -> None:
        if len(model.mtp) != 1:
            raise InputError(f"model: one MTP module is needed, got {len(model.mtp)}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("mtp."))
        super().__init__(model, stream, config, folder, evaluate=evaluate, report=report)
        self._pass_weights = tuple(weight / sum(pass_weights) for weight in pass_weights)

    def _learner(self) -> nn.Module:
        return self.model.mtp

    def _balance(self, loads: Sequence[Tensor]) -> None:
        routers = self.model.routers()
        for router, load in zip(routers[len(routers) - len(loads) :], loads, strict=True):
            router.update_bias(load, self.config.optimiser.bias_rate)

    def _backward(self, batch: Batch, stage: Stage) -> tuple[Losses, list[Tensor]]:
        with self._autocast():
            seen = unrolled(self.model, batch, len(self._pass_weights), index_loss=True)
        losses = [_divergence(logits, seen.wanted) for logits in seen.guessed]
        loss = torch.stack([w * of for w, of in zip(self._pass_weights, losses, strict=True)]).sum()
        index = loss.new_zeros(()) if seen.index_loss is None else seen.index_loss
        (loss + self.config.schedule.index_weight * index).backward()
        return Losses(0.0, index.item(), loss.item()), seen.expert_loads


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL(wanted || softmax(logits)) over rows [R, V]; 0 without rows, and still differentiable."""
    said = F.log_softmax(logits, dim=-1)
    return F.kl_div(said, wanted, reduction="sum", log_target=True) / max(len(wanted), 1)


@torch.no_grad()
def draft_scores(
    model: CausalLM, batches: Sequence[Batch], passes: int = len(PASS_WEIGHTS)
) -> dict[str, float]:
    """How often guess 1, 2, ... is the model's own choice, given the true tokens before it."""
    right, asked = [0] * passes, 0
    for batch in batches:
        seen = unrolled(model, batch, passes, index_loss=False)
        choice = seen.wanted.argmax(-1)
        asked += len(choice)
        for number, logits in enumerate(seen.guessed):
            right[number] += int((logits.argmax(-1) == choice).sum())
    return {f"guess {place}": count / max(asked, 1) for place, count in enumerate(right, 1)}
