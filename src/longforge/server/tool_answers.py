"""Tools' answers in the order of their calls.

The templates write a call's answer without its id, so its place alone tells which call it belongs to; the
dialects allow any order.
"""

from collections.abc import Sequence

from longforge.errors import InputError
from longforge.protocol import Message, ToolCall

__all__ = ["in_call_order"]


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
