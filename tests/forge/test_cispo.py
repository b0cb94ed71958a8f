"""CISPO equals its formula, and its gradient is that of a weighted log-likelihood."""

import math

import pytest
import torch

from longforge.forge.cispo import CispoStats, cispo_loss, edge_logprobs

EPS = 4.0


def example(edges: int = 17, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(edges, generator=generator, dtype=torch.float64) * 5
    old = logprobs + torch.randn(edges, generator=generator, dtype=torch.float64)
    advantages = torch.randn(edges, generator=generator, dtype=torch.float64)
    weights = torch.rand(edges, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), old, advantages, weights


def test_loss_is_the_hand_formula():
    logprobs, old, advantages, weights = example()
    loss, _ = cispo_loss(logprobs, old, advantages, weights, eps_high=EPS)
    by_hand = 0.0
    for lp, lo, a, w in zip(
        logprobs.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True
    ):
        by_hand -= w * min(math.exp(lp - lo), 1 + EPS) * a * lp
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)


def test_gradient_is_that_of_the_weighted_log_likelihood():
    logprobs, old, advantages, weights = example()
    cispo_loss(logprobs, old, advantages, weights, eps_high=0.5)[0].backward()
    ratio = (logprobs.detach() - old).exp().clamp(max=1.5)
    assert torch.equal(logprobs.grad, -(weights * ratio * advantages)), "the ratio carries no gradient"
    assert bool((logprobs.grad != 0).all()), "no token is dropped, clipped or not"


def test_the_gradient_can_be_the_tempered_policys():
    logprobs, old, advantages, weights = example()
    scored = logprobs.detach().clone().requires_grad_()
    loss, _ = cispo_loss(logprobs, old, advantages, weights, eps_high=EPS, scored=scored)
    loss.backward()
    ratio = (logprobs.detach() - old).exp().clamp(max=1 + EPS)
    assert logprobs.grad is None and torch.equal(scored.grad, -(weights * ratio * advantages))


def test_micro_batches_add_up_to_the_batch():
    logprobs, old, advantages, weights = example(21)
    entropies = torch.rand(21, dtype=torch.float64)
    whole, stats = cispo_loss(logprobs, old, advantages, weights, eps_high=EPS, entropies=entropies)
    parts, total = torch.zeros((), dtype=torch.float64), CispoStats.zero()
    for part in (slice(0, 8), slice(8, 9), slice(9, 21)):
        loss, more = cispo_loss(
            logprobs[part],
            old[part],
            advantages[part],
            weights[part],
            eps_high=EPS,
            entropies=entropies[part],
        )
        parts, total = parts + loss, total + more
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for name in ("edges", "ratio_max", "clipped"):
        assert getattr(total, name) == getattr(stats, name)
    for name in ("ratio_sum", "entropy_sum", "kl_sum", "logprob_gap_sum"):
        assert getattr(total, name) == pytest.approx(getattr(stats, name))


def test_fresh_weights_have_ratio_one_and_no_divergence():
    logprobs, _, advantages, weights = example()
    _, stats = cispo_loss(logprobs, logprobs.detach(), advantages, weights, eps_high=EPS)
    assert stats.ratio_sum == stats.edges and stats.ratio_max == 1.0
    assert stats.clipped == 0 and stats.kl_sum == 0.0 and stats.logprob_gap_sum == 0.0


def test_edge_logprobs_are_log_softmax_with_its_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3, 1])
    logprobs, entropies = edge_logprobs(logits, targets)
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs, distribution.log_prob(targets), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, distribution.entropy(), rtol=1e-12, atol=1e-12)
