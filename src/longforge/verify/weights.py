"""New weights: their tokens say so, and pages of the old ones are never found again."""

import torch
from torch import Tensor

from longforge.engine import TokenEvent
from longforge.verify.check import Check
from longforge.verify.compare import Comparison
from longforge.verify.drive import Asked, greedy, request, run, sampled
from longforge.verify.subject import Subject

__all__ = ["weights_have_versions"]

ANSWER = 4
"""Tokens of an answer."""
CHANGE = 0.2
"""Size of the perturbation, relative to the table of embeddings."""


def weights_have_versions(subject: Subject) -> Check:
    """Perturbed weights under a running request, then the first ones again under a higher version."""
    model = subject.model
    table = model.model.embed_tokens.weight
    original, version = table.detach().clone(), model.version
    try:
        return _check(subject, original, _perturbed(original))
    finally:
        with torch.no_grad():
            table.copy_(original)
        model.version = version


def _check(subject: Subject, original: Tensor, perturbed: Tensor) -> Check:
    model, found = subject.model, Comparison(subject)
    prompt, second = (subject.tokens(2 * subject.block + 2, seed) for seed in (61, 62))
    asked = [request("greedy", prompt, greedy(ANSWER)), request("sampled", second, sampled(ANSWER, 61))]
    first = model.version
    with subject.engine(pages=30, prefix_cache=True) as engine:
        answers = {first: run(engine, asked)}
        hit = run(engine, [request("again", prompt, greedy(1))])["again"][0].cached_tokens
        found.expect(hit == 2 * subject.block, f"before the swap {hit} tokens were found, not all pages")
        over = request("over the swap", prompt, greedy(ANSWER))
        engine.submit(over)
        events = [event for event in engine.step() if isinstance(event, TokenEvent)]
        for version, weights in ((first + 1, perturbed), (first + 2, original)):
            # Other tensors are copied onto themselves, which costs no memory.
            engine.swap_weights({**model.state_dict(), "model.embed_tokens.weight": weights}, version)
            while engine.has_work:
                events += [event for event in engine.step() if isinstance(event, TokenEvent)]
            _compare_fresh(subject, found, asked, answers, version, run(engine, asked))
        told = [event.version for event in events]
        expected = [first] + [first + 1] * (ANSWER - 1)
        found.expect(told == expected, f"a request over the swap: versions {told}, not {expected}")
    for version, by_name in answers.items():
        versions = {event.version for events in by_name.values() for event in events}
        found.expect(versions == {version}, f"tokens of version {version} say {sorted(versions)}")
    found.same(asked, answers[first + 2], answers[first], "the first weights again, ")
    return found.verdict("weights_have_versions", f"versions {first} to {first + 2}, no old page found")


def _compare_fresh(
    subject: Subject,
    found: Comparison,
    asked: Asked,
    answers: dict[int, dict[str, list[TokenEvent]]],
    version: int,
    told: dict[str, list[TokenEvent]],
) -> None:
    """Answers after a swap, against an engine that never knew other weights."""
    answers[version] = told
    cached = max(events[0].cached_tokens for events in told.values())
    found.expect(cached == 0, f"version {version}: {cached} tokens were found on pages of older weights")
    with subject.engine(pages=30) as fresh:
        found.same(asked, told, run(fresh, asked), f"version {version}, ")


def _perturbed(table: Tensor) -> Tensor:
    """The table with noise, always the same."""
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).to(table)
    return table + CHANGE * table.float().std().to(table.dtype) * noise
