"""What replies tell about single tokens: text, bytes, log-probabilities, ids, versions, selected blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longforge.chat import StreamDecoder, Tokenizer
from longforge.engine import PromptToken, TokenEvent

__all__ = ["Offsets", "block_report", "chat_logprobs", "completion_logprobs", "token_text"]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token; for one that is no whole text `bytes:` and its bytes as hexadecimal escapes, so
    that different tokens differ."""
    raw = tokenizer.piece_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    tokenizer: Tokenizer, events: Sequence[TokenEvent], alternatives: int, stop_ids: frozenset[int]
) -> dict[str, Any]:
    """The `logprobs` of a chat choice: an entry per sampled token, thinking and markup included.

    The bytes of all entries together are the text that was sampled; a token that ended the answer, one of
    `stop_ids`, has none.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = list(tokenizer.piece_bytes(token))
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": raw}

    content = []
    for event in events:
        sampled = entry(event.token_id, event.logprob)
        if event.stop_reason is not None and event.token_id in stop_ids:
            sampled["bytes"] = []
        top = event.top_logprobs[:alternatives]
        content.append({**sampled, "top_logprobs": [entry(token, logprob) for token, logprob in top]})
    return {"content": content, "refusal": None}


class Offsets:
    """Where each token's text begins in the text so far, in characters. A token that only ends a character
    begins where that character does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._characters = 0

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._characters
        self._characters += len(self._decoder.push((token_id,)))
        return offset


@dataclass(frozen=True, slots=True)
class _Row:
    """One token of a prompt or an answer."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def completion_logprobs(
    tokenizer: Tokenizer,
    prompt: Sequence[tuple[int, PromptToken | None]],
    events: Sequence[TokenEvent],
    alternatives: int,
    offsets: Offsets,
) -> dict[str, Any]:
    """The `logprobs` of a completion: of a prompt that is given back (id and what the model thought of it,
    None for the first) and of sampled tokens. `top_logprobs` has the token itself as well."""
    rows = [_Row(token, p and p.logprob, p.top_logprobs if p else ()) for token, p in prompt]
    rows += [_Row(event.token_id, event.logprob, event.top_logprobs) for event in events]
    return {
        "tokens": [token_text(tokenizer, row.token_id) for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [_top(tokenizer, row, alternatives) for row in rows] if alternatives else None,
        "text_offset": [offsets.next(row.token_id) for row in rows],
    }


def _top(tokenizer: Tokenizer, row: _Row, alternatives: int) -> dict[str, float] | None:
    if row.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, logprob in (*row.top[:alternatives], (row.token_id, row.logprob)):
        top.setdefault(token_text(tokenizer, token), logprob)
    return top


def block_report(events: Sequence[TokenEvent], block_size: int) -> dict[str, Any]:
    """The blocks that the newest token selected; the field `longforge` of a chunk."""
    return {"blocks": list(events[-1].blocks) if events else [], "block_size": block_size}
