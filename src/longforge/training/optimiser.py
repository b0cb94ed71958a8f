"""Parameter groups, schedules and the optimiser's state as plain tensors (no pickle)."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "build_adamw",
    "clip_groups",
    "learning_rate_factor",
    "linear_between",
    "load_optimiser_tensors",
    "optimiser_tensors",
    "parameter_groups",
    "set_learning_rates",
]

GROUPS = ("matrices", "vectors", "index", "mtp")


def group_of(name: str, parameter: Tensor) -> str:
    """Which group a parameter belongs to, by its name in the model.

    The index branch is trained by its own loss at its own rate; MTP modules start late; norms, biases and tables
    are not decayed.
    """
    if ".index_" in name:
        return "index"
    if "mtp" in name.split("."):
        return "mtp"
    if parameter.dim() < 2 or "embed_tokens" in name or "lm_head" in name:
        return "vectors"
    return "matrices"


def parameter_groups(
    model: nn.Module, *, lr: float, index_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Groups for a torch optimiser, each with `name`, `base_lr`, `weight_decay` and `params`. Empty ones are left out."""
    members: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, parameter)].append(parameter)
    rate = dict.fromkeys(GROUPS, lr) | {"index": index_lr if index_lr is not None else lr}
    decay = dict.fromkeys(GROUPS, weight_decay) | {"vectors": 0.0, "index": 0.0}
    return [
        {"name": name, "params": params, "lr": rate[name], "base_lr": rate[name], "weight_decay": decay[name]}
        for name, params in members.items()
        if params
    ]


def build_adamw(
    groups: list[dict[str, object]], *, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-9
) -> torch.optim.AdamW:
    """Fused AdamW: one pass over each parameter."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """Linear warm-up to 1 over `warmup_steps`, then linear decay to `final` at `steps`. step counts from 0."""
    assert step >= 0 and warmup_steps >= 0 and steps > 0, (step, warmup_steps, steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = (steps - step) / max(steps - warmup_steps, 1)
    return final + (1 - final) * min(max(left, 0.0), 1.0)


def linear_between(progress: float, *, start: float, stop: float, first: float, last: float) -> float:
    """`first` until progress `start`, `last` from `stop` on, a straight line between them."""
    if progress <= start:
        return first
    if progress >= stop:
        return last
    return first + (last - first) * (progress - start) / (stop - start)


def set_learning_rates(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to `factor` times its base rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_groups(optimiser: torch.optim.Optimizer, max_norm: float) -> float:
    """Clips the gradient norm of the index branch and of everything else apart. Returns the norm of the latter.

    Apart, because the index loss easily makes a norm far above the language model's (facts: its clip would then
    throttle the backbone).
    """
    index, others = [], []
    for group in optimiser.param_groups:
        (index if group["name"] == "index" else others).extend(
            p for p in group["params"] if p.grad is not None
        )
    if index:
        nn.utils.clip_grad_norm_(index, max_norm)
    return float(nn.utils.clip_grad_norm_(others, max_norm)) if others else math.nan


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as `moment/parameter name` -> tensor, for safetensors."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{moment}/{names[parameter]}": value.detach().clone()
        for parameter, moments in optimiser.state.items()
        for moment, value in moments.items()
    }


def load_optimiser_tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimiser_tensors` took. Parameters without an entry start fresh."""
    parameters = dict(model.named_parameters())
    optimiser.state.clear()
    for key, value in _sorted(tensors):
        moment, name = key.split("/", 1)
        optimiser.state.setdefault(parameters[name], {})[moment] = value.clone()


def _sorted(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: item[0])
