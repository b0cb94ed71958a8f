"""What the agent tells the model: one short system prompt and two compact tool specs.

The demo's model is tiny and every token costs, so the words here are few on purpose.
"""

from longforge.protocol import Message, ToolSpec

__all__ = ["SYSTEM_PROMPT", "TOOL_SPECS", "opening_messages"]

SYSTEM_PROMPT = "Answer about a Python tree. Search it with the tools. Reply with the answer alone."

TOOL_SPECS: tuple[ToolSpec, ...] = (
    ToolSpec(
        "grep",
        "search lines",
        {"type": "object", "properties": {"pattern": {"type": "string"}, "path": {"type": "string"}}},
    ),
    ToolSpec(
        "read",
        "show lines",
        {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "start": {"type": "integer"},
                "end": {"type": "integer"},
            },
        },
    ),
)


def opening_messages(question: str) -> list[Message]:
    """The system prompt and the question: where every episode starts."""
    return [Message("system", SYSTEM_PROMPT), Message("user", question)]
