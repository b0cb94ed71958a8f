"""Greedy answers of two sides must be the same tokens, up to ties within rounding."""

from collections.abc import Callable, Sequence

from longforge.errors import CheckError

__all__ = ["TIE", "check_same"]

TIE = 5e-4
"""Two fp32 logits closer than this may change places where sums are taken in another order."""


def check_same(
    what: str,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    gap: Callable[[Sequence[int], int, int], float],
    tie: float = TIE,
) -> int:
    """Tokens that were compared: of each prompt up to the first difference, which must be a tie.

    gap: how far apart the logits of two tokens are after some tokens. CheckError where answers differ beyond
    that, and where one ends before the other.
    """
    compared = 0
    for number, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        place = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if len(set(pair)) > 1), None)
        if place is None:
            if len(mine) != len(other):
                raise CheckError(
                    f"bench serve: {what}, prompt {number}: answers of equal length expected, got "
                    f"{len(mine)} and {len(other)} tokens; nothing is reported while the check fails"
                )
            compared += len(mine)
            continue
        apart = gap([*prompt, *mine[:place]], mine[place], other[place])
        if not apart <= tie:
            raise CheckError(
                f"bench serve: {what}, prompt {number}: token {other[place]} expected at {place}, got "
                f"{mine[place]}, and their logits are {apart:.3g} apart; nothing is reported while the check "
                "fails"
            )
        compared += place
    return compared
