"""A writer without a mind: it takes any token that a grammar allows, and snippets that could do harm."""

import random
from collections.abc import Sequence

import numpy as np

from longforge.chat import Tokenizer
from longforge.engine.grammar import Matcher

TEMPTATIONS = (
    *(
        "null",
        "\nnull\n",
        "true",
        "1",
        "-5",
        "2.50",
        "1e300",
        "{",
        "[[",
        '{"a": 1}',
        "[1]",
        "\n",
        " ",
        "",
        "<",
        "é",
    ),
    *(
        "</invoke>",
        "<invoke",
        "</minimax:tool_call>",
        "<think>",
        "</think>",
        "<mm:think>",
        "</mm:think>",
        "[e~[",
    ),
    *(
        "]<]minimax[>[<x>",
        "]<]minimax[>[</invoke>",
        "]<]minimax[>[<tool_call>",
        "]<]minimax[>",
        "</param",
        "item",
    ),
)
ENDS = ("</parameter>\n", "</mm:think>", "</think>", '"', "}", "]", "0", '"}', "]<]minimax[>[</", "\\n", ", ")


def allowed(mask: np.ndarray) -> list[int]:
    """The tokens of a mask."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def write(
    matcher: Matcher, tokenizer: Tokenizer, rng: random.Random, patience: int = 30, limit: int = 800
) -> list[int] | None:
    """Tokens up to the stop token, which is looked for after `patience` tokens; None if it never came."""
    tokens: list[int] = []
    while len(tokens) < limit:
        mask = matcher.masks()[0]
        choices = allowed(mask)
        assert choices, "nothing is allowed, not even to stop"
        if tokenizer.eos_id in choices and (len(choices) == 1 or len(tokens) > patience):
            return [*tokens, tokenizer.eos_id]
        choices = [token for token in choices if token != tokenizer.eos_id]
        specials = [token for token in choices if token in tokenizer.special_ids]
        late = len(tokens) > patience
        snippet = _fits(matcher, tokenizer, rng, ENDS if late else TEMPTATIONS + ENDS)
        if specials and rng.random() < (0.8 if late else 0.2):
            step = [rng.choice(specials)]
        elif snippet and rng.random() < 0.7:
            step = snippet
        else:
            step = [rng.choice(choices)]
        for token in step:
            matcher.accept(token)
        tokens += step
    return None


def _fits(matcher: Matcher, tokenizer: Tokenizer, rng: random.Random, texts: Sequence[str]) -> list[int]:
    """The tokens of one of the texts that the grammar allows as a whole, spelled out; or none."""
    for text in rng.sample(texts, len(texts)):
        tokens = tokenizer.encode(text, special=rng.random() < 0.5)
        if tokens and tokenizer.eos_id not in tokens:
            masks = matcher.masks(tokens)
            if len(masks) == len(tokens) + 1:
                return tokens
    return []
