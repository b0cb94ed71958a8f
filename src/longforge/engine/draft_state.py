"""What drafting knows of one request."""

from torch import Tensor

__all__ = ["DraftState"]

LEARNING_RATE = 0.1
"""Weight of the newest guess in the running estimate of acceptance."""


class DraftState:
    """One request's: which pairs its draft keys cover, and how well guesses do."""

    __slots__ = ("acceptance", "done", "idle_tokens", "judged", "length", "pending", "verified")

    def __init__(self) -> None:
        self.done = 0
        """Positions whose pair the module has seen."""
        self.pending: list[Tensor] = []
        """Hidden states of position done-1 and on, as far as they are computed."""
        self.acceptance = 0.8
        """Running estimate of how likely a guess is right, given that those before it are."""
        self.length = 0
        """Guesses that are worth it, as last thought over."""
        self.judged: tuple[int, int] | None = None
        """When that was: the size of the batch, and verifications by then."""
        self.verified = 0
        """Verifications so far."""
        self.idle_tokens = 0
        """Tokens since the last guess."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Takes note of a verification: guesses behind the first wrong one tell nothing."""
        self.verified += 1
        for place in range(min(drafted, accepted + 1)):
            self.acceptance += LEARNING_RATE * ((place < accepted) - self.acceptance)
