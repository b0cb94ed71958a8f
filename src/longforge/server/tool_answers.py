"""Tools' answers in the order of their calls.

The templates write a call's answer without its id, so its place alone tells which call it belongs to; the
dialects allow any order.
"""

from collections.abc import Sequence

from longforge.errors import InputError
from longforge.protocol import Message, ToolCall

__all__ = ["in_call_order", "leading_in_call_order"]


def in_call_order(calls: Sequence[ToolCall], answers: Sequence[Message], place: str) -> list[Message]:
    """One answer for each call, in the calls' order. place: where the answers stand, for messages.

    Errors: InputError for an answer to no call, a second answer to one, a call without an answer.
    """
    by_id: dict[str, Message] = {}
    asked = {call.id for call in calls}
    for answer in answers:
        name = answer.tool_call_id or ""
        if name not in asked:
            raise InputError(
                f"{place}: expected results of the calls just before, got one for {name!r}, which is none"
            )
        if name in by_id:
            raise InputError(f"{place}: expected one result for the call {name!r}, got two")
        by_id[name] = answer
    for call in calls:
        if call.id not in by_id:
            raise InputError(f"{place}: expected a result for the call {call.id!r}, got none")
    return [by_id[call.id] for call in calls]


def leading_in_call_order(calls: Sequence[ToolCall], answers: Sequence[Message], first: int) -> list[Message]:
    """Answers to all calls or to the first ones, in the calls' order. first: place of the first answer.

    Errors: InputError naming the message, for an answer to none of the calls or to one that has one already,
    and where a call without an answer stands before one with an answer.
    """
    waiting: dict[str | None, list[int]] = {}
    for number, call in enumerate(calls):
        waiting.setdefault(call.id, []).append(number)
    placed: dict[int, Message] = {}
    for place, answer in enumerate(answers, first):
        numbers = waiting.get(answer.tool_call_id)
        if not numbers:
            raise InputError(
                f"messages[{place}].tool_call_id: expected the id of a call just before that has no answer "
                f"yet, got {answer.tool_call_id!r}"
            )
        placed[numbers.pop(0)] = answer
    for number in range(len(placed)):
        if number not in placed:
            raise InputError(
                f"messages[{first}]: expected an answer to the call {calls[number].id!r} as well: answers "
                "belong to calls by their order"
            )
    return [placed[number] for number in range(len(placed))]
