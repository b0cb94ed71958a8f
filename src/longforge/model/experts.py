"""Feed-forwards: the dense one, and experts behind a sigmoid router.

Routing (M2 report, arXiv 2605.26494, section 2.2.1, as the released inference code computes it): the sigmoid
of each logit in fp32; a bias per expert is added for the selection only; the weights are the unbiased
sigmoids of the chosen, divided by their sum. Load balance comes from moving that bias by the sign rule (Wang
et al. 2024, loss-free balancing).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longforge.kernels.grouped_experts import grouped_experts
from longforge.model.config import ModelConfig
from longforge.model.step import Step

__all__ = ["DenseFeedForward", "Experts", "MixtureOfExperts", "Router", "Routing", "gated"]


def gated(gate_up: Tensor, config: ModelConfig) -> Tensor:
    """The gated activation of [..., 2I] (gate channels first) -> [..., I].

    silu: silu(gate) * up. swiglu_oai: gate clamped above, up on both sides, then
    (up + 1) * gate * sigmoid(alpha * gate).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if config.activation == "silu":
        return F.silu(gate) * up
    gate = gate.clamp(max=config.swiglu_limit)
    up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    swish = gate * torch.sigmoid(config.swiglu_alpha * gate)
    return torch.addcmul(swish, up, swish)


class DenseFeedForward(nn.Module):
    """A gated feed-forward d -> size -> d."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, d] -> [N, d]."""
        return self.down_proj(gated(self.gate_up_proj(x), self.config))


class Routing(NamedTuple):
    """The experts of each token: ids int64 [N, k], weights fp32 [N, k]."""

    ids: Tensor
    weights: Tensor


class Router(nn.Module):
    """Scores experts and chooses k of them per token. The bias stays fp32 whatever the model's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.routed_scale = config.routed_scale
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """x [N, d]; the logits and scores are fp32 (fp64 for an fp64 model), under autocast too."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.to(weight.dtype), weight))
        ids = torch.topk(
            scores.detach() + self.e_score_correction_bias, self.top_k, dim=-1, sorted=False
        ).indices
        chosen = scores.gather(-1, ids)
        weights = chosen / chosen.sum(-1, keepdim=True)
        return Routing(ids, weights if self.routed_scale == 1.0 else weights * self.routed_scale)

    def update_bias(self, load: Tensor, rate: float) -> None:
        """The sign rule: b_e += rate * sign(mean load - load_e); load [E] counts choices per expert."""
        load = load.to(self.e_score_correction_bias)
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # A step of the sign rule is below bf16's resolution, so a change of dtype must not touch the bias.
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(moved.device)
        return self


class Experts(nn.Module):
    """The weights of E experts, stacked: gate_up_proj [E, 2I, d], gate rows first; down_proj [E, d, I]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        e, i, d = config.experts, config.expert_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))

    def forward(self, x: Tensor, routing: Routing, step: Step) -> Tensor:
        """The weighted sum of each token's experts: x [N, d] -> [N, d]."""
        return grouped_experts(
            x,
            self.gate_up_proj,
            self.down_proj,
            routing.ids,
            routing.weights.to(x.dtype),
            activation=self.config.activation,
            alpha=self.config.swiglu_alpha,
            limit=self.config.swiglu_limit,
            backend=step.backend,
        )


class MixtureOfExperts(nn.Module):
    """routed_scale * (weighted sum of the chosen experts) + the shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.shared_expert_size
        self.shared_experts = DenseFeedForward(config, shared) if shared else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, d] -> [N, d]; tells the step how many tokens each expert got."""
        routing = self.gate(x)
        if step.count_loads:
            experts = self.gate.e_score_correction_bias.shape[0]
            step.expert_loads.append(torch.bincount(routing.ids.flatten(), minlength=experts))
        routed = self.experts(x, routing, step)
        return routed if self.shared_experts is None else routed + self.shared_experts(x, step)
