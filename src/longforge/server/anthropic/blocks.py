"""Content blocks of the Messages dialect, as a request may hold them. Text is the only medium."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from longforge.chat.schema import MAX_NESTING, too_deep
from longforge.server.wire import Body

__all__ = [
    "AssistantBlock",
    "RedactedThinkingBlock",
    "TextBlock",
    "ThinkingBlock",
    "ToolResultBlock",
    "ToolUseBlock",
    "Unserved",
    "UserBlock",
    "text_of",
]


class CacheControl(Body):
    """Accepted wherever the dialect has it. All prefixes are cached, for as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Body):
    """What all blocks may carry."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    """Text. The official client echoes our own blocks with an empty `citations`."""

    type: Literal["text"]
    text: str
    citations: list[None] | None = Field(default=None, max_length=0)


class ThinkingBlock(Block):
    """Thinking with the mark it was given; foreign marks and none at all are taken too."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block):
    """Thinking that only its maker can read."""

    type: Literal["redacted_thinking"]
    data: str


class Caller(Body):
    """Who called a tool: only the model itself can."""

    type: Literal["direct"]


class ToolUseBlock(Block):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str
    input: dict[str, Any]
    caller: Caller | None = None
    toolset_name: None = None

    @field_validator("input")
    @classmethod
    def _not_too_deep(cls, value: dict[str, Any]) -> dict[str, Any]:
        if too_deep(value):
            raise ValueError(f"expected arguments of at most {MAX_NESTING} levels, got deeper ones")
        return value


class Unserved(Body):
    """A block of another kind, refused in words of its own."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal[
        "image",
        "document",
        "search_result",
        "container_upload",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "tool_reference",
    ]

    @model_validator(mode="after")
    def _refuse(self) -> "Unserved":
        raise ValueError(f"blocks of type {self.type!r} are not served: this model reads text only")


ResultBlock = Annotated[TextBlock | Unserved, Field(discriminator="type")]


class ToolResultBlock(Block):
    """A tool's answer. A result that is an error is told to the model as one."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlock] = ""
    is_error: bool | None = None
    toolset_name: None = None

    @property
    def text(self) -> str:
        """What the model reads."""
        text = text_of(self.content)
        return f"Error: {text}" if self.is_error else text


UserBlock = Annotated[TextBlock | ToolResultBlock | Unserved, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | Unserved, Field(discriminator="type")
]


def text_of(content: str | list[Any]) -> str:
    """The text of a string or of the text blocks in a list, with nothing between them."""
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))
