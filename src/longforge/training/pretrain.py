"""Trains a model from nothing: dense warm-up of the index, sparse training, MTP modules at the end.

    step = batch -> losses -> backward -> clip -> AdamW -> expert bias

Loss (MSA, arXiv 2606.13392, eq. 11): L = L_LM + index_weight * sum over layers of L_KL, and in the last part
of the run mtp_weight * L_MTP (M2 report, section 2.3).
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longforge.errors import RunError
from longforge.model.causal_lm import CausalLM
from longforge.training.config import PretrainConfig
from longforge.training.data import ASSISTANT, Batch, BatchStream
from longforge.training.losses import (
    Edges,
    MtpLoss,
    cross_entropy,
    mtp_loss,
    next_token_edges,
    thin_edges,
)
from longforge.training.muon import MuonAdamW
from longforge.training.optimiser import (
    build_adamw,
    clip_groups,
    parameter_groups,
)
from longforge.training.schedule import Stage, learning_rate_factor, stage_of
from longforge.training.state import latest_state, load_state, save_state

__all__ = ["METRICS", "Losses", "Pretrainer", "StepReport"]

METRICS = "metrics.jsonl"

Scores = Mapping[str, float]
Evaluate = Callable[[CausalLM, int], Scores]


@dataclass(frozen=True)
class StepReport:
    """One step's numbers, as they go to the metrics file and the progress bar."""

    step: int
    planned: int
    seconds: float
    """Training time so far, over all resumes."""
    tokens: int
    """Tokens so far."""
    tokens_per_second: float
    phase: str
    lm_loss: float
    index_loss: float
    mtp_loss: float | None
    """None while the modules are not trained."""
    grad_norm: float
    lr_factor: float
    expert_loads: tuple[tuple[float, ...], ...]
    """Share of the routed tokens each expert got, per MoE layer."""


class Losses(NamedTuple):
    lm: float
    index: float
    mtp: float | None


class Pretrainer:
    """Drives one run in `folder`: `step()` once, or `run()` to the end. Resumes what it finds there.

    The run is a function of the configuration's seed and of the planned number of steps; the plan shrinks
    below `schedule.steps` only where the time limit would be overrun.
    """

    def __init__(
        self,
        model: CausalLM,
        stream: BatchStream,
        config: PretrainConfig,
        folder: Path,
        *,
        evaluate: Evaluate | None = None,
        report: Callable[[StepReport], None] | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model.to(device)
        self.config = config
        self.done = 0
        self.planned = config.schedule.steps
        self.seconds = 0.0
        self.tokens = 0
        self._stream = stream
        self._folder = folder
        self._evaluate = evaluate
        self._report = report
        self._device = torch.device(device)
        groups = parameter_groups(
            self._learner(),
            lr=config.optimiser.lr,
            index_lr=config.optimiser.index_lr,
            weight_decay=config.optimiser.weight_decay,
        )
        build = MuonAdamW if config.optimiser.matrices == "muon" else build_adamw
        self._optimiser = build(groups, betas=config.optimiser.betas)
        self._mtp_parameters = [
            parameter
            for group in self._optimiser.param_groups
            if group["name"] == "mtp"
            for parameter in group["params"]
        ]
        self._clock = clock
        self._pace = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def step(self) -> StepReport:
        """Trains on the next batch."""
        began = self._clock()
        batch = self._stream.next().to(self._device)
        stage = stage_of(self.done / self.planned, self.config)
        factor = self._set_rates(stage)
        losses, loads = self._backward(batch, stage)
        if not math.isfinite(losses.lm + losses.index + (losses.mtp or 0.0)):
            raise RunError(
                f"step {self.done + 1}: expected a finite loss, got {losses.lm} (index {losses.index}, "
                f"MTP {losses.mtp}); lower optimiser.lr and start in an empty folder"
            )
        norm = clip_groups(self._optimiser, self.config.optimiser.clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._balance(loads)
        self.done += 1
        self.tokens += batch.ids.numel()
        seconds = self._clock() - began
        self._account(seconds)
        return StepReport(
            step=self.done,
            planned=self.planned,
            seconds=self.seconds,
            tokens=self.tokens,
            tokens_per_second=batch.ids.numel() / max(seconds, 1e-9),
            phase=stage.phase,
            lm_loss=losses.lm,
            index_loss=losses.index,
            mtp_loss=losses.mtp,
            grad_norm=norm,
            lr_factor=factor,
            expert_loads=tuple(tuple((load / load.sum()).tolist()) for load in loads),
        )

    def _learner(self) -> nn.Module:
        """The part of the model whose parameters are trained."""
        return self.model

    def _balance(self, loads: Sequence[Tensor]) -> None:
        self.model.update_expert_bias(loads, self.config.optimiser.bias_rate)

    def _backward(self, batch: Batch, stage: Stage) -> tuple[Losses, list[Tensor]]:
        """Computes the losses and leaves their gradients in the parameters."""
        with self._autocast():
            output = self.model.forward_packed(batch.ids, batch.layout, phase=stage.phase, index_loss=True)
        lm = cross_entropy(output.hidden, self._edges(batch), self.model.logits)
        index = output.index_loss if output.index_loss is not None else lm.new_zeros(())
        total = lm + self.config.schedule.index_weight * index
        mtp_value = None
        loads = output.expert_loads
        if stage.mtp != "off" and self._mtp_parameters:
            own, mtp = self._mtp(output.hidden, batch, stage)
            mtp_value = mtp.loss.item()
            loads = [*loads, *mtp.expert_loads]
            if stage.mtp == "joint":
                total = total + own
            else:
                own.backward(inputs=self._mtp_parameters)
        total.backward()
        return Losses(lm.item(), index.item(), mtp_value), loads

    def _mtp(self, hidden: Tensor, batch: Batch, stage: Stage) -> tuple[Tensor, MtpLoss]:
        """The MTP modules' whole loss, and its parts. They learn what the assistant says, nothing else."""
        if stage.mtp == "detached":
            hidden = hidden.detach()
        spoken = torch.where(batch.weights >= ASSISTANT, batch.weights, 0.0)
        with self._autocast():
            mtp = mtp_loss(
                self.model, hidden, batch.ids, batch.layout, spoken, modules=self.model.config.mtp_modules
            )
        index = 0.0 if mtp.index_loss is None else self.config.schedule.index_weight * mtp.index_loss
        return stage.mtp_weight * mtp.loss + index, mtp

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.optimiser.bf16)

    def _edges(self, batch: Batch) -> Edges:
        edges = next_token_edges(batch.ids, batch.layout, batch.weights)
        seeded = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.done)
        return thin_edges(edges, below=ASSISTANT, share=self.config.data.background_rows, generator=seeded)

    def _set_rates(self, stage: Stage) -> float:
        """Rates of this step: one course for the model, one of its own for the late MTP modules."""
        schedule = self.config.schedule
        factor = learning_rate_factor(self.done, steps=self.planned, warmup_steps=schedule.warmup_steps)
        late = min(1.0, stage.mtp_progress * 20) * (1.0 - stage.mtp_progress)
        for group in self._optimiser.param_groups:
            group["lr"] = group["base_lr"] * (late if group["name"] == "mtp" else factor)
        return factor

    def _account(self, seconds: float) -> None:
        """Adds a step's time and squeezes the plan where the time limit would be overrun."""
        self.seconds += seconds
        self._pace = seconds if self._pace == 0 else 0.95 * self._pace + 0.05 * seconds
        if self.done % 20 == 0:
            left = max(self.config.schedule.minutes * 60 - self.seconds, 0.0)
            self.planned = max(min(self.config.schedule.steps, self.done + int(left / self._pace)), self.done)

    def run(self) -> bool:
        """Trains to the end of the plan. Returns False when interrupted; the state is saved either way."""
        schedule = self.config.schedule
        saved = self.seconds
        with _interrupts() as interrupted, (self._folder / METRICS).open("a", encoding="utf-8") as metrics:
            while self.done < self.planned and not interrupted:
                report = self.step()
                if self._report is not None:
                    self._report(report)
                if self.done % schedule.log_every == 0 or self.done == self.planned:
                    _write(metrics, asdict(report))
                if self._evaluate and (self.done % schedule.evaluate_every == 0 or self.done >= self.planned):
                    _write(metrics, self._scores(self._evaluate))
                if self.seconds - saved > 60 * schedule.checkpoint_minutes:
                    self.save()
                    saved = self.seconds
        self.save()
        return self.done >= self.planned

    def _scores(self, evaluate: Evaluate) -> dict[str, Any]:
        began = self._clock()
        scores = evaluate(self.model, self.done)
        self.seconds += self._clock() - began
        return {"step": self.done, "seconds": self.seconds, "tokens": self.tokens, "held_out": dict(scores)}

    def save(self) -> Path:
        """Writes a state from which `resume` goes on."""
        counters = {
            "planned": self.planned,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "pace": self._pace,
            "stream": self._stream.state(),
        }
        return save_state(self._folder, self.done, self.model, self._optimiser, counters)

    def resume(self) -> bool:
        """Goes on from the newest state in the folder. Returns False where there is none."""
        state = latest_state(self._folder)
        if state is None:
            (self._folder / METRICS).unlink(missing_ok=True)
            return False
        counters = load_state(state, self.model, self._optimiser)
        self.done, self.planned = int(counters["step"]), int(counters["planned"])
        self.seconds, self.tokens = float(counters["seconds"]), int(counters["tokens"])
        self._pace = float(counters["pace"])
        self._stream.load(counters["stream"])
        _forget_after(self._folder / METRICS, self.done)
        return True


def _write(metrics: Any, row: Mapping[str, Any]) -> None:
    metrics.write(json.dumps(row) + "\n")
    metrics.flush()


def _forget_after(metrics: Path, step: int) -> None:
    """Drops lines of steps that will be done again."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C and a polite kill fill the list instead of tearing a step apart; a second Ctrl-C does."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
