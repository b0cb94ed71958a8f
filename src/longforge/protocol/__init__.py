"""Words that cross rooms or processes: plain data, standard library only."""

from longforge.protocol.experience import Call, Episode, Group
from longforge.protocol.messages import Message, Role, ToolCall, ToolSpec
from longforge.protocol.sampling import Grammar, SamplingParams, StopReason

__all__ = [
    "Call",
    "Episode",
    "Grammar",
    "Group",
    "Message",
    "Role",
    "SamplingParams",
    "StopReason",
    "ToolCall",
    "ToolSpec",
]
