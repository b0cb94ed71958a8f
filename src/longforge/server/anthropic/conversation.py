"""From a request of the Messages dialect to the conversation that the template renders."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from longforge.errors import InputError
from longforge.protocol import Message, ToolCall
from longforge.server.anthropic.blocks import (
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_of,
)
from longforge.server.anthropic.wire import AssistantMessage, CountRequest, UserMessage
from longforge.server.seal import Echo, Seal, Verdict
from longforge.server.tool_answers import in_call_order

__all__ = ["Conversation", "read_conversation"]

BILLING_HEADER = "x-anthropic-billing-header"
"""A system text's first line that begins so is a coding agent's note to its own server, new in each
request: in the prompt it would keep anything from being found in the cache."""


@dataclass
class Conversation:
    """The messages, and what the marks on the thinking in them say."""

    messages: list[Message] = field(default_factory=list)
    echoes: Counter[Verdict] = field(default_factory=Counter)


def read_conversation(body: CountRequest, seal: Seal) -> Conversation:
    """The conversation of a request.

    Errors: InputError naming the message, for tools' results that do not fit the calls, for an answer of the
    assistant at the end (there is no continuing one).
    """
    found = Conversation()
    if body.system is not None and (system := _system_text(body.system)):
        found.messages.append(Message("system", system))
    calls: tuple[ToolCall, ...] = ()
    for place, message in enumerate(body.messages):
        where = f"messages[{place}]"
        if isinstance(message, UserMessage):
            found.messages += _of_user(message, calls, where)
            calls = ()
            continue
        if calls:
            in_call_order(calls, (), where)  # says which result is missing
        if isinstance(message, AssistantMessage):
            found.messages.append(_of_assistant(message, seal, found.echoes, where))
            calls = found.messages[-1].tool_calls
        else:
            found.messages.append(Message("system", text_of(message.content)))
    if isinstance(body.messages[-1], AssistantMessage):
        raise InputError(
            f"messages[{len(body.messages) - 1}]: expected the last message to be the user's, got the "
            "assistant's: an answer that was begun cannot be continued here"
        )
    return found


def _system_text(system: str | list[TextBlock]) -> str:
    texts = [system] if isinstance(system, str) else [block.text for block in system]
    return "".join(text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text for text in texts)


def _of_user(message: UserMessage, calls: Sequence[ToolCall], where: str) -> list[Message]:
    """Results of tools, in the order of the calls, then what the user says."""
    blocks = [] if isinstance(message.content, str) else message.content
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    if any(isinstance(block, ToolResultBlock) for block in blocks[len(results) :]):
        raise InputError(f"{where}.content: expected tool_result blocks first, got one after another block")
    answers = [Message("tool", block.text, tool_call_id=block.tool_use_id) for block in results]
    messages = in_call_order(calls, answers, f"{where}.content")
    if len(results) < len(blocks) or not results:
        messages.append(Message("user", text_of(message.content)))
    return messages


def _of_assistant(message: AssistantMessage, seal: Seal, echoes: Counter[Verdict], where: str) -> Message:
    blocks = [] if isinstance(message.content, str) else message.content
    thoughts: list[str] = []
    for block in blocks:
        if isinstance(block, ThinkingBlock):
            echo = seal.read(block.thinking, block.signature)
        elif isinstance(block, RedactedThinkingBlock):
            echo = Echo(None, "unreadable")  # this server makes none
        else:
            continue
        echoes[echo.verdict] += 1
        if echo.text is not None:
            thoughts.append(echo.text)
    calls = tuple(ToolCall(b.name, b.input, b.id) for b in blocks if isinstance(b, ToolUseBlock))
    if len({call.id for call in calls}) < len(calls):
        raise InputError(f"{where}.content: expected another id for each tool_use block, got one twice")
    thinking = "".join(thoughts) if thoughts else None
    return Message("assistant", text_of(message.content), thinking, calls)
