"""Conversations and texts from disk, and the stream of batches that a configuration asks for."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longforge.chat.tokenizer import Tokenizer
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec
from longforge.training.config import PretrainConfig
from longforge.training.data import BatchStream, Source
from longforge.training.samples import Conversation, ConversationSource, TextSource

__all__ = ["build_stream", "conversation_of", "read_conversations", "read_texts"]

TEXT_ENDINGS = (".py", ".md", ".rst", ".txt")


def build_stream(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    block_size: int,
    *,
    conversations: Callable[[int], Conversation] | None,
    texts: Sequence[str] = (),
) -> BatchStream:
    """The training stream: `text_share` of the samples from `texts`, the others conversations.

    conversations: gives conversation number i for any i. Where one of the two is missing the other fills in.
    """
    data = config.data
    sources: dict[str, tuple[Source, float]] = {}
    if conversations is not None:
        source = ConversationSource(
            conversations,
            tokenizer,
            background=data.background_weight,
            openings=data.openings,
            seed=config.seed,
            max_tokens=data.max_tokens,
        )
        sources["conversations"] = (source, 1.0 - data.text_share if texts else 1.0)
    if texts:
        chunks = TextSource(
            texts, tokenizer, tokens=data.text_tokens, weight=data.text_weight, seed=config.seed
        )
        sources["texts"] = (chunks, data.text_share if conversations is not None else 1.0)
    return BatchStream(sources, tokens=data.tokens_per_step, block_size=block_size, seed=config.seed)


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations of a JSONL file, in the form of a Chat Completions request: `messages` and `tools`.

    Raises InputError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a JSONL file of conversations, got {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(conversation_of(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}:{number}: expected an object with `messages` in chat form, got {error!r}"
                ) from None
    if not found:
        raise InputError(f"{path}: expected at least one conversation, got none")
    return found


def conversation_of(body: Mapping[str, Any]) -> Conversation:
    """One conversation from its JSON form."""
    return Conversation(
        tuple(_message(message) for message in body["messages"]),
        tuple(_tool(tool) for tool in body.get("tools") or ()),
    )


def read_texts(folder: Path) -> list[str]:
    """All text files below a folder, in order of their paths. Raises InputError where there are none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in TEXT_ENDINGS and file.is_file())
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{folder}: expected text files ({', '.join(TEXT_ENDINGS)}) below it, found none")
    return texts


def _message(body: Mapping[str, Any]) -> Message:
    calls = tuple(_call(call) for call in body.get("tool_calls") or ())
    return Message(
        role=body["role"],
        content=body.get("content") or "",
        thinking=body.get("reasoning_content"),
        tool_calls=calls,
        tool_call_id=body.get("tool_call_id"),
    )


def _call(body: Mapping[str, Any]) -> ToolCall:
    function = body["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return ToolCall(function["name"], dict(arguments), body.get("id", ""))


def _tool(body: Mapping[str, Any]) -> ToolSpec:
    function = body.get("function", body)
    return ToolSpec(function["name"], function.get("description", ""), function.get("parameters", {}))
