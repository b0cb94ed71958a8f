"""Which drafted tokens stay: the acceptance rule of speculative decoding."""

from collections.abc import Sequence

__all__ = ["accepted"]


def accepted(sampled: Sequence[int], drafts: Sequence[int]) -> int:
    """How many drafts stay: those before the first that differs from the token sampled in its place.

    One forward pass gives the logits after the last known token and after each draft, and the sampler draws
    len(drafts) + 1 tokens from them, each from its own distribution with the draw of its own (seed,
    position): `sampled`. Then sampled[: accepted + 1] are the tokens to append; further ones stand on a draft
    that did not come true.

    Why that is exact. sampled[j] is what plain decoding would sample if its tokens so far were the known ones
    and drafts[:j], as its draw depends on seed and position only. If the first j drafts equal the first j
    sampled tokens, then those are plain decoding's tokens, by induction, and so sampled[j] is the next of
    them, whether or not drafts[j] equals it. Hence the very tokens of plain decoding, and therefore its law,
    whatever the drafts are and wherever they come from; good drafts only make more tokens per pass. A draw
    that is discarded is used again for its position after the right tokens, which changes nothing: a token's
    value is a function of its draw and the tokens before it.

    In the terms of Leviathan, Kalman and Matias (arXiv 2211.17192, section 2.3) and Chen et al. (arXiv
    2302.01318, algorithm 2), which accept a draft d ~ q with probability min(1, p(d) / q(d)) and else sample
    from the residual max(0, p - q), normalised: a given draft has q(d) = 1, so it is accepted with
    probability p(d), and the residual is p without d. Sampling from p and comparing does just that in one
    draw: the token is d with probability p(d), and otherwise has the law of p given that it is not d.
    """
    stay = 0
    for token, draft in zip(sampled, drafts, strict=False):
        if token != draft:
            break
        stay += 1
    return stay
