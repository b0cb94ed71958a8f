"""The names of the special tokens, in one place.

The markers are those of the released M2 and M3 tokenizers. `SPECIAL_TOKENS` is their order in a vocabulary
that `train_tokenizer` makes: after the ordinary pieces, as in the released one. The released tokenizer's
exact order and whether it also holds tags of its own for a tool's answer are not known to us; that we write
`<response>` as ordinary text is a choice.
"""

from typing import Literal

__all__ = ["BOS", "EOS", "SPECIAL_TOKENS", "TURN", "Family", "ThinkingMode"]

Family = Literal["m2", "m3"]
ThinkingMode = Literal["adaptive", "enabled", "disabled"]

BOS = "]~!b["
"""Opens a document."""
TURN = "]~b]"
"""Opens a message; the role's name and a newline follow."""
EOS = "[e~["
"""Ends a message; the model samples it to end its turn."""
CALL_PREFIX = "]<]minimax[>["
"""Stands before every tag of an M3 tool call."""

SPECIAL_TOKENS = (
    BOS,
    TURN,
    EOS,
    CALL_PREFIX,
    "]<]image[>[",
    "]<]video[>[",
    "<think>",
    "</think>",
    "<mm:think>",
    "</mm:think>",
    "<tool_call>",
    "</tool_call>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
)
