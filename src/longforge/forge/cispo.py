"""CISPO: clip the importance weight, never the token.

MiniMax-M1 (arXiv 2506.13585) and the M2 report, section 6.1. Maximise

    J = sum_e w_e * sg(min(r_e, 1 + eps_high)) * A_e * log pi(target_e | row_e),   r_e = pi / pi_old

over loss edges e = (row of logits, target id, weight): no token is dropped, the importance weight is
clipped above and carries no gradient. w_e = 1 / (sampled tokens of the batch), or of the edge's group with
every group equal. The lower bound of the clip is 0 and so never binds. eps_high is not published; 4, a
range of [0, 5], is common elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CispoStats", "cispo_loss", "edge_logprobs"]


@dataclass(frozen=True)
class CispoStats:
    """Sums over edges, so that micro-batches add up. All float."""

    edges: int
    ratio_sum: float
    ratio_max: float
    clipped: int
    entropy_sum: float
    kl_sum: float
    """Sum of (r - 1 - log r): unbiased, non-negative estimate of KL(old || new) (J. Schulman, 2020, "k3")."""
    logprob_gap_sum: float
    """Sum of |log pi - log pi_old|: train against rollout, zero for fresh weights up to rounding."""

    @staticmethod
    def zero() -> "CispoStats":
        return CispoStats(0, 0.0, 0.0, 0, 0.0, 0.0, 0.0)

    def __add__(self, other: "CispoStats") -> "CispoStats":
        return CispoStats(
            self.edges + other.edges,
            self.ratio_sum + other.ratio_sum,
            max(self.ratio_max, other.ratio_max),
            self.clipped + other.clipped,
            self.entropy_sum + other.entropy_sum,
            self.kl_sum + other.kl_sum,
            self.logprob_gap_sum + other.logprob_gap_sum,
        )


def edge_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and, without gradient, the entropy of its row.

    logits: fp32 [E, V]; targets: int64 [E]. Returns (logprobs [E], entropies [E]).
    """
    logs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropies = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, targets[:, None]).squeeze(-1), entropies


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    eps_high: float,
    entropies: Tensor | None = None,
    scored: Tensor | None = None,
) -> tuple[Tensor, CispoStats]:
    """Minus J over the given edges, and what happened in it.

    logprobs, old_logprobs, advantages, weights: [E]. Sums over micro-batches that use one normaliser in
    `weights` equal the loss of the whole batch. scored: [E] log-probabilities that carry the gradient where
    `logprobs` do not: those of the tempered policy that sampled, while the ratio stays that of the recorded,
    untempered ones.
    """
    with torch.no_grad():
        gap = logprobs - old_logprobs
        ratio = gap.exp()
        clipped = ratio.clamp(max=1.0 + eps_high)
        stats = CispoStats(
            edges=len(ratio),
            ratio_sum=float(ratio.sum()),
            ratio_max=float(ratio.max()) if len(ratio) else 0.0,
            clipped=int((ratio > 1.0 + eps_high).sum()),
            entropy_sum=0.0 if entropies is None else float(entropies.sum()),
            kl_sum=float((ratio - 1.0 - gap).sum()),
            logprob_gap_sum=float(gap.abs().sum()),
        )
    gradient = logprobs if scored is None else scored
    return -(weights * clipped * advantages * gradient).sum(), stats
