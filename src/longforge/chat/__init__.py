"""Text and tokens of a conversation: tokenizer, templates, parsers of thinking and tool calls. Loads no torch."""

from longforge.chat.template import encode_prompt, render, starts_in_thinking
from longforge.chat.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from longforge.chat.tokens import Family, ThinkingMode

__all__ = [
    "Family",
    "StreamDecoder",
    "ThinkingMode",
    "Tokenizer",
    "encode_prompt",
    "render",
    "starts_in_thinking",
    "train_tokenizer",
]
