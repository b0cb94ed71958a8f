"""Speculation changes no token and no law: checked by integrating over the draws, exactly.

The "model" is a table of logits by the last two tokens. A decoder is followed through every outcome: each
position's draw is known to lie in an interval, and sampling a token narrows it to where that token is drawn.
So a draw that is discarded and used again is the same draw here as well.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from longforge.engine.sampler import Row, TokenCounts, law, sample
from longforge.engine.speculation import accepted
from longforge.protocol import SamplingParams
from sampling_law import expected_law, mask_of

PROMPT = (1, 4)
LENGTH = 3
Tokens = tuple[int, ...]
Draws = tuple[tuple[float, float], ...]
"""The interval in which the draw of each position lies."""
Drafter = Callable[[Tokens], Tokens]
Rule = Callable[["Chain", Tokens, Tokens], list[tuple[float, Tokens]]]
"""From (chain, tokens so far, drafts): (probability, tokens to append)."""


class Chain:
    """A model, what is asked of it, and the laws of its next tokens by tokens so far."""

    def __init__(self, vocab: int, params: SamplingParams, *, grammar: bool = False) -> None:
        generator = torch.Generator().manual_seed(vocab)
        self.table = torch.randn(vocab, vocab, vocab, generator=generator) * 1.5
        self.vocab, self.params, self.grammar = vocab, params, grammar
        self._laws: dict[Tokens, np.ndarray] = {}

    def logits(self, tokens: Tokens) -> torch.Tensor:
        first, second = (*PROMPT, *tokens)[-2:]
        return self.table[first, second]

    def allowed(self, tokens: Tokens) -> tuple[int, ...] | None:
        """A grammar: no token twice in a row, and no token 0 first."""
        if not self.grammar:
            return None
        last = tokens[-1] if tokens else 0
        return tuple(token for token in range(self.vocab) if token != last)

    def row(self, tokens: Tokens, drafts: Tokens, seed: int = 0) -> Row:
        counts = TokenCounts(PROMPT)
        for token in tokens:
            counts.add(token)
        allowed = self.allowed(tokens + drafts)
        known = len(tokens) + len(drafts)
        mask = None if allowed is None else mask_of(allowed, self.vocab)
        return Row(self.params, seed, len(PROMPT) + known, known, counts, drafts, mask)

    def law(self, tokens: Tokens, drafts: Tokens = ()) -> np.ndarray:
        """As the engine's sampler has it, from a row with drafts."""
        key = (*tokens, -1, *drafts)
        if key not in self._laws:
            self._laws[key] = law(self.logits(tokens + drafts), self.row(tokens, drafts))
        return self._laws[key]


def plain_law(chain: Chain) -> np.ndarray:
    """The law of the first tokens of plain decoding, by the formulas alone: [vocab] * LENGTH."""
    joint = np.zeros((chain.vocab,) * LENGTH)

    def extend(tokens: Tokens, probability: float) -> None:
        if len(tokens) == LENGTH:
            joint[tokens] = probability
            return
        logits, allowed = chain.logits(tokens).tolist(), chain.allowed(tokens)
        following = expected_law(logits, chain.params, prompt=PROMPT, answer=tokens, allowed=allowed)
        for token in np.flatnonzero(following).tolist():
            extend((*tokens, token), probability * following[token])

    extend((), 1.0)
    return joint


def outcomes(chain: Chain, tokens: Tokens, drafts: Tokens, draws: Draws) -> Iterator[tuple[Tokens, Draws]]:
    """Every (sampled tokens of one pass's rows, where the draws lie then)."""
    branches: list[tuple[Tokens, Draws]] = [((), draws)]
    for at in range(len(drafts) + 1):
        edges = np.concatenate(([0.0], np.cumsum(chain.law(tokens, drafts[:at]))))
        edges[-1] = 1.0
        place, grown = len(tokens) + at, []
        for sampled, known in branches:
            for token in range(chain.vocab):
                low, high = max(known[place][0], edges[token]), min(known[place][1], edges[token + 1])
                if high > low:
                    narrowed = (*known[:place], (low, high), *known[place + 1 :])
                    grown.append(((*sampled, token), narrowed))
        branches = grown
    yield from branches


def chain_law(chain: Chain, drafter: Drafter, depth: int) -> np.ndarray:
    """The law of the first tokens when each pass verifies up to `depth` drafts: [vocab] * LENGTH."""
    joint = np.zeros((chain.vocab,) * LENGTH)
    unfinished: list[tuple[Tokens, Draws]] = [((), ((0.0, 1.0),) * LENGTH)]
    while unfinished:
        tokens, draws = unfinished.pop()
        if len(tokens) == LENGTH:
            joint[tokens] += np.prod([high - low for low, high in draws])
            continue
        drafts = drafter(tokens)[: min(depth, LENGTH - len(tokens) - 1)]
        for sampled, narrowed in outcomes(chain, tokens, drafts, draws):
            appended = sampled[: accepted(sampled, drafts) + 1]
            unfinished.append((tokens + appended, narrowed))
    return joint


def rule_law(chain: Chain, drafter: Drafter, depth: int, rule: Rule) -> np.ndarray:
    """The same for a rule that has fresh draws in each pass."""
    joint = np.zeros((chain.vocab,) * LENGTH)
    unfinished: list[tuple[Tokens, float]] = [((), 1.0)]
    while unfinished:
        tokens, probability = unfinished.pop()
        if len(tokens) == LENGTH:
            joint[tokens] += probability
            continue
        drafts = drafter(tokens)[: min(depth, LENGTH - len(tokens) - 1)]
        for share, appended in rule(chain, tokens, drafts):
            unfinished.append((tokens + appended, probability * share))
    return joint


def residual_rule(chain: Chain, tokens: Tokens, drafts: Tokens, *, residual: bool = True):
    """The published rule for a one-hot draft: accepted with p(draft), else the residual (or, wrongly, p)."""
    outcome, reached = list[tuple[float, Tokens]](), 1.0
    for at, draft in enumerate(drafts):
        p = chain.law(tokens, drafts[:at])
        other = np.where(np.arange(chain.vocab) == draft, 0, p) if residual else p
        if p[draft] < 1:
            share = reached * (1 - p[draft]) / other.sum()
            outcome += [(share * other[t], (*drafts[:at], t)) for t in np.flatnonzero(other).tolist()]
        reached *= p[draft]
    last = chain.law(tokens, drafts)
    return outcome + [(reached * last[t], (*drafts, t)) for t in np.flatnonzero(last).tolist() if reached]


def resampling_from_p(chain: Chain, tokens: Tokens, drafts: Tokens):
    return residual_rule(chain, tokens, drafts, residual=False)


def accepting_the_likeliest(chain: Chain, tokens: Tokens, drafts: Tokens):
    """Wrong: a draft stays while it is the likeliest token."""
    likeliest = [int(chain.law(tokens, drafts[:at]).argmax()) for at in range(len(drafts))]
    stay = drafts[: accepted(likeliest, drafts)]
    p = chain.law(tokens, stay)
    return [(p[t], (*stay, t)) for t in np.flatnonzero(p).tolist()]


def good(chain: Chain) -> Drafter:
    """Drafts what greedy decoding would say."""

    def draft(tokens: Tokens) -> Tokens:
        drafts: Tokens = ()
        while len(drafts) < LENGTH:
            drafts += (int(chain.law(tokens + drafts).argmax()),)
        return drafts

    return draft


def bad(chain: Chain) -> Drafter:
    """Drafts the least likely tokens, impossible ones where there are any."""

    def draft(tokens: Tokens) -> Tokens:
        drafts: Tokens = ()
        while len(drafts) < LENGTH:
            following = chain.law(tokens + drafts) if not drafts or chain.law(tokens)[drafts[0]] else None
            drafts += (0,) if following is None else (int(following.argmin()),)
        return drafts

    return draft


def adversarial(chain: Chain) -> Drafter:
    """Drafts that depend on all tokens so far, and sometimes repeat themselves."""
    return lambda tokens: tuple(
        (3 * sum(tokens) + len(tokens) + at // 2) % chain.vocab for at in range(LENGTH)
    )


CASES = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "greedy": SamplingParams(temperature=0.0),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.25),
    "penalties": SamplingParams(presence_penalty=0.8, frequency_penalty=0.6, repetition_penalty=1.5),
    "bias": SamplingParams(logit_bias=((0, 1.5), (2, -2.0))),
    "min_tokens": SamplingParams(min_tokens=2, stop_token_ids=(3,)),
    "all": SamplingParams(
        temperature=1.3,
        top_k=5,
        top_p=0.9,
        min_p=0.05,
        frequency_penalty=1.0,
        repetition_penalty=0.7,
        logit_bias=((1, 0.7),),
        min_tokens=1,
        stop_token_ids=(2,),
    ),
}


@pytest.mark.parametrize("grammar", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("name", CASES)
def test_chains_keep_the_law_of_plain_decoding(name: str, grammar: bool):
    chain = Chain(8 if name == "all" else 5, CASES[name], grammar=grammar)
    expected = plain_law(chain)
    assert abs(expected.sum() - 1) < 1e-12
    for drafter in (good, bad, adversarial):
        for depth in (0, 1, 2):
            np.testing.assert_allclose(chain_law(chain, drafter(chain), depth), expected, rtol=0, atol=1e-12)


def test_the_published_rule_gives_the_same_law():
    chain = Chain(6, CASES["temperature"])
    for drafter in (good, bad, adversarial):
        actual = rule_law(chain, drafter(chain), 2, residual_rule)
        np.testing.assert_allclose(actual, plain_law(chain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [resampling_from_p, accepting_the_likeliest])
def test_a_wrong_rule_is_told_apart(rule: Rule):
    """Otherwise the checks above would promise nothing."""
    chain = Chain(6, CASES["temperature"])
    difference = abs(rule_law(chain, good(chain), 2, rule) - plain_law(chain)).max()
    assert difference > 0.01


def decode(chain: Chain, seed: int, drafter: Drafter | None, length: int) -> tuple[Tokens, int]:
    """(tokens, passes) of the real sampler with the real rule."""
    tokens, passes = Tokens(), 0
    while len(tokens) < length:
        drafts = drafter(tokens)[: length - len(tokens) - 1] if drafter else ()
        rows = [chain.row(tokens, drafts[:at], seed) for at in range(len(drafts) + 1)]
        logits = torch.stack([chain.logits(tokens + row.drafts) for row in rows])
        sampled = sample(logits, rows).token_ids
        tokens += tuple(sampled[: accepted(sampled, drafts) + 1])
        passes += 1
    return tokens, passes


@pytest.mark.parametrize("name", CASES)
def test_speculation_gives_the_tokens_of_plain_decoding(name: str):
    chain = Chain(7, CASES[name], grammar=True)
    for seed in range(12):
        tokens, passes = decode(chain, seed, None, 10)
        assert passes == 10
        for drafter in (good, bad, adversarial):
            again, fewer = decode(chain, seed, drafter(chain), 10)
            assert again == tokens
            assert fewer <= passes
    assert decode(chain, 0, lambda so_far: tokens_of(chain)[len(so_far) :], 10)[1] == 1


def tokens_of(chain: Chain) -> Tokens:
    return decode(chain, 0, None, 10)[0]


def test_speculated_samples_follow_the_law():
    chain, runs = Chain(5, CASES["temperature"]), 4000
    expected = plain_law(chain).ravel() * runs
    seen = np.zeros_like(expected)
    for seed in range(runs):
        tokens, _ = decode(chain, seed, good(chain), LENGTH)
        seen[np.ravel_multi_index(tokens, (5,) * LENGTH)] += 1
    common = expected > 5
    cells_seen = np.append(seen[common], seen[~common].sum())
    cells = np.append(expected[common], expected[~common].sum())
    freedom = len(cells) - 1
    statistic = ((cells_seen - cells) ** 2 / cells).sum()
    # Wilson and Hilferty's approximation of the quantile at 1 - 1e-4.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("sampled", "drafts", "count"),
    [((4,), (), 0), ((4, 5, 6), (4, 5), 2), ((4, 9, 6), (4, 5), 1), ((9, 5, 6), (4, 5), 0)],
)
def test_drafts_stay_up_to_the_first_that_differs(sampled: Tokens, drafts: Tokens, count: int):
    assert accepted(sampled, drafts) == count
