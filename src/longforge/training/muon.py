"""Muon for matrices, AdamW for everything else, in one optimiser.

Muon (Jordan et al. 2024): the momentum of each matrix is orthogonalised by five Newton-Schulz steps before it
is applied, so that all directions of a layer learn at the same pace. Experts are a batch of matrices. The
update is scaled to the size that AdamW's would have (0.2 sqrt(larger side), Liu et al. 2025, "Muon is
scalable"), so both share one learning rate.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["MuonAdamW", "orthogonalised"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """[..., m, n] with singular values moved near 1 (between about 0.7 and 1.2), computed in bf16."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Groups named `matrices` go by Muon, the others by fused AdamW (see `parameter_groups`)."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-9,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the loss is computed outside"
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["name"] == "matrices":
                for parameter in present:
                    self._muon(parameter, group)
            elif present:
                self._adamw(present, group)

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, keep = parameter.grad, group["momentum"]
        assert gradient is not None
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - keep)
        update = orthogonalised(gradient.lerp(momentum, keep))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape[-2:]) ** 0.5)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
