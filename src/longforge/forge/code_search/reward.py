"""The judge: a final message is right where it is the answer and nothing else."""

__all__ = ["normalise", "score"]


def score(answer: str | None, expected: str) -> float:
    """1.0 where `answer` is `expected`, else 0.0.

    White space, backticks or quotes around the answer, punctuation after it and the empty brackets of a call
    are forgiven; any other word is not. The rule is strict so that a long guess cannot hide the right name.
    """
    return 1.0 if answer is not None and normalise(answer) == normalise(expected) else 0.0


def normalise(answer: str) -> str:
    """The answer without the decoration that `score` forgives."""
    text = answer.strip()
    for marks in ("`'\"", ".,;:!", "`'\""):
        text = text.strip(marks) if "`" in marks else text.rstrip(marks)
        text = text.strip()
    return text.removesuffix("()")
