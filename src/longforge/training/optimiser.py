"""Parameter groups, clipping and the optimiser's state as plain tensors (no pickle)."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "build_adamw",
    "clip_groups",
    "load_optimiser_tensors",
    "optimiser_tensors",
    "parameter_groups",
]

GROUPS = ("matrices", "vectors", "index", "mtp")


def group_of(name: str, parameter: Tensor) -> str:
    """Which group a parameter belongs to, by its name in the model.

    The index branch is trained by its own loss at its own rate; MTP modules start late; norms, biases and
    tables are not decayed.
    """
    if name.startswith("mtp."):
        return "mtp"
    if "index_" in name:
        return "index"
    if parameter.dim() < 2 or "embed_tokens" in name or "lm_head" in name:
        return "vectors"
    return "matrices"


def parameter_groups(
    model: nn.Module, *, lr: float, index_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Groups for a torch optimiser, each with `name` and `base_lr`. Empty ones are left out."""
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


def clip_groups(optimiser: torch.optim.Optimizer, max_norm: float) -> float:
    """Clips the norms of the index branch, of the MTP modules and of the rest apart; returns the last.

    Apart, because the index loss easily makes a norm far above the language model's, and one clip for both
    would throttle the backbone.
    """
    parts: dict[str, list[Tensor]] = {"index": [], "mtp": [], "main": []}
    for group in optimiser.param_groups:
        part = group["name"] if group["name"] in parts else "main"
        parts[part] += [parameter for parameter in group["params"] if parameter.grad is not None]
    norms = {part: nn.utils.clip_grad_norm_(members, max_norm) for part, members in parts.items() if members}
    return float(norms["main"]) if "main" in norms else math.nan


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as `moment/parameter name` -> tensor, for safetensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
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
