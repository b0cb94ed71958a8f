"""The trainer: completed groups in, one optimiser step, numbers out.

    groups -> advantages -> samples -> micro-batches -> hidden rows of the edges
           -> CISPO + index loss -> AdamW -> expert bias

The backbone learns from CISPO alone, the index branch from its own loss alone (the model keeps them apart),
and the MTP modules, if they are trained, from theirs: its gradient is taken with respect to them only.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longforge.forge.batching import Batch, MicroBatch, Sample, make_batch, micro_batches
from longforge.forge.cispo import CispoStats, cispo_loss, edge_logprobs
from longforge.forge.config import TrainerConfig
from longforge.model.causal_lm import CausalLM
from longforge.protocol import Call, Group
from longforge.training.losses import mtp_loss
from longforge.training.optimiser import build_adamw, clip_groups, parameter_groups
from longforge.training.schedule import learning_rate_factor
from longforge.training.state import latest_state, load_state, save_state

__all__ = ["Trainer"]


class Trainer:
    """Owns the model under training and its optimiser.

    `step` counts finished steps; it is also the version of the weights. temperature: that of the rollouts;
    the policy whose likelihood is raised or lowered is the one that sampled.
    """

    def __init__(self, model: CausalLM, config: TrainerConfig, *, temperature: float = 1.0) -> None:
        self.model = model.train()
        self.config = config
        self.temperature = temperature
        self.step = 0
        groups = parameter_groups(
            model,
            lr=config.learning_rate,
            index_lr=config.index_learning_rate,
            weight_decay=config.weight_decay,
        )
        self._optimiser = build_adamw(groups, betas=config.betas, eps=config.eps)
        self._mtp = [p for group in groups if group["name"] == "mtp" for p in _tensors(group["params"])]

    def train(
        self, groups: Sequence[Group], *, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """One step on these groups. Returns what happened as scalars.

        between: called before every micro-batch and before the optimiser; if it raises, no weight has
        changed and the step can be taken again.
        """
        began = time.perf_counter()
        config = self.config
        batch = make_batch(groups, normalise=config.normalise_advantage, mean_over=config.mean_over)
        pieces = self._pieces(batch.samples)
        tokens = sum(len(piece.ids) for piece in pieces)
        self._optimiser.zero_grad(set_to_none=True)
        totals = _Totals()
        for piece in pieces:
            between()
            self._backward(piece, share=len(piece.ids) / tokens, totals=totals)
        between()
        metrics = self._update(totals) if pieces else {}
        self.step += 1
        self.model.version = self.step
        seconds = time.perf_counter() - began
        return {
            **metrics,
            **_batch_metrics(batch, pieces, self.step - 1),
            "train_tokens": tokens,
            "train_seconds": seconds,
            "train_tokens_per_second": tokens / seconds,
        }

    def warm_up(self) -> None:
        """Runs a small batch forward and backward, so that the first real one does not pay for compilation.

        Changes no weight and no state of the optimiser.
        """
        block = self.model.config.block_size
        prompt, answer = tuple(range(2 * block)), tuple(range(block))
        call = Call("warm-up", "warm-up", 0, prompt, answer, (-1.0,) * block, (0,) * block, "stop")
        for piece in self._pieces([Sample(call, 1.0, 1.0 / block)] * 2):
            self._backward(piece, share=1.0, totals=_Totals())
        self._optimiser.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> Path:
        """Writes weights and optimiser so that `load` goes on bit for bit; older states in the folder go."""
        return save_state(folder, self.step, self.model, self._optimiser, {})

    def load(self, folder: Path) -> bool:
        """Goes on from the newest state in the folder; False where there is none."""
        state = latest_state(folder)
        if state is None:
            return False
        self.step = int(load_state(state, self.model, self._optimiser)["step"])
        self.model.version = self.step
        return True

    def _pieces(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Micro-batches. Lightning layers carry a state through each sample, which none can share."""
        shape = self.model.config
        share = all(layer.mixer != "lightning" for layer in shape.layers)
        return list(micro_batches(samples, self.config.micro_batch_tokens, shape.block_size, share=share))

    def _backward(self, piece: MicroBatch, share: float, totals: "_Totals") -> None:
        """Adds one micro-batch to the gradient. share: its part of the batch's fed tokens."""
        config, layout = self.config, piece.layout
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            output = self.model.forward_packed(piece.ids, layout, index_loss=config.index_loss > 0)
        logits = self.model.logits(output.hidden.index_select(0, piece.edges.rows))
        logprobs, entropies = edge_logprobs(logits, piece.edges.targets)
        scored = logprobs
        if self.temperature != 1.0:
            scored, _ = edge_logprobs(logits / self.temperature, piece.edges.targets)
        loss, stats = cispo_loss(
            logprobs,
            piece.old_logprobs,
            piece.advantages,
            piece.edges.weights,
            eps_high=config.eps_high,
            entropies=entropies,
            scored=scored,
        )
        totals.add(loss, stats, output.expert_loads)
        totals.add_fresh(logprobs.detach() - piece.old_logprobs, piece.versions == self.step)
        if output.index_loss is not None:
            loss = loss + config.index_loss * share * output.index_loss
            totals.index_loss += share * float(output.index_loss.detach())
        loss.backward()
        if config.mtp_loss > 0 and self._mtp:
            totals.mtp_loss += share * self._backward_mtp(piece, output.hidden.detach(), share)

    def _backward_mtp(self, piece: MicroBatch, hidden: Tensor, share: float) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            modules = self.model.config.mtp_modules
            found = mtp_loss(self.model, hidden, piece.ids, piece.layout, piece.sampled, modules=modules)
        total = self.config.mtp_loss * found.loss
        if found.index_loss is not None:
            total = total + self.config.index_loss * found.index_loss
        (share * total).backward(inputs=self._mtp)
        return found.loss.item()

    def _update(self, totals: "_Totals") -> dict[str, float]:
        config = self.config
        factor = learning_rate_factor(
            min(self.step, config.steps - 1),
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            final=config.final_rate,
        )
        for group in self._optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor
        norm = clip_groups(self._optimiser, config.clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.model.update_expert_bias(totals.loads, config.bias_rate)
        return {**totals.metrics(), "grad_norm": norm, "learning_rate": config.learning_rate * factor}


class _Totals:
    """Sums over the micro-batches of one step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.index_loss = 0.0
        self.mtp_loss = 0.0
        self.stats = CispoStats.zero()
        self.loads: list[Tensor] = []
        self.fresh = 0
        self.fresh_gap_sum = 0.0

    def add(self, loss: Tensor, stats: CispoStats, loads: Sequence[Tensor]) -> None:
        self.loss += loss.item()
        self.stats = self.stats + stats
        self.loads = [a + b for a, b in zip(self.loads, loads, strict=True)] if self.loads else list(loads)

    def add_fresh(self, gap: Tensor, fresh: Tensor) -> None:
        """Tokens sampled by the very weights that are trained: their gap is rounding alone."""
        self.fresh += int(fresh.sum())
        self.fresh_gap_sum += float(gap[fresh].abs().sum())

    def metrics(self) -> dict[str, float]:
        stats, edges = self.stats, max(self.stats.edges, 1)
        shares = [float(load.max() / load.sum()) for load in self.loads]
        found = {
            "loss": self.loss,
            "index_loss": self.index_loss,
            "mtp_loss": self.mtp_loss,
            "ratio_mean": stats.ratio_sum / edges,
            "ratio_max": stats.ratio_max,
            "clip_share": stats.clipped / edges,
            "entropy": stats.entropy_sum / edges,
            "kl": stats.kl_sum / edges,
            "logprob_gap": stats.logprob_gap_sum / edges,
            "expert_load_max": max(shares, default=0.0),
        }
        if self.fresh:
            found["fresh_logprob_gap"] = self.fresh_gap_sum / self.fresh
        return found


def _batch_metrics(batch: Batch, pieces: Sequence[MicroBatch], version: int) -> dict[str, float]:
    """Counts of a batch, and how many versions its tokens are behind the weights they train."""
    ages = torch.cat([version - piece.versions for piece in pieces]) if pieces else torch.zeros(1)
    return {
        "calls": batch.calls,
        "skipped_calls": batch.calls - len(batch.samples),
        "sampled_tokens": batch.sampled_tokens,
        "micro_batches": len(pieces),
        "prefix_reuse": sum(sum(p.lengths) for p in pieces) / max(sum(len(p.ids) for p in pieces), 1),
        "staleness_mean": float(ages.double().mean()),
        "staleness_max": float(ages.max()),
    }


def _tensors(params: object) -> list[Tensor]:
    assert isinstance(params, list)
    return params
