"""Text and tokens of a conversation: tokenizer, templates, parsers of thinking and tool calls; no torch."""

from longforge.chat.parser import ChatParser, Delta, message_of, parse
from longforge.chat.template import encode_prompt, render, starts_in_thinking
from longforge.chat.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from longforge.chat.tokens import Family, ThinkingMode

__all__ = [
    "ChatParser",
    "Delta",
    "Family",
    "StreamDecoder",
    "ThinkingMode",
    "Tokenizer",
    "encode_prompt",
    "message_of",
    "parse",
    "render",
    "starts_in_thinking",
    "train_tokenizer",
]
