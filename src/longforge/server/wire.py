"""Messages and tools of the OpenAI dialect, and their way to and from `protocol.Message`.

Unknown fields are refused by name, never ignored; a value outside what is served is refused with what is. The
requests are in `sampling_fields`, `chat_request` and `completion_request`, the replies in `replies`. The
forge gateway uses them too, so nothing here knows the engine.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from longforge.chat.schema import MAX_NESTING, too_deep
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec
from longforge.server.tool_answers import leading_in_call_order

__all__ = [
    "MAX_MESSAGES",
    "MAX_SCHEMA_CHARACTERS",
    "MAX_TOOLS",
    "Body",
    "ChatMessage",
    "NotStrict",
    "Tool",
    "WeightsRequest",
    "check_names",
    "check_schema",
    "message_body",
    "to_messages",
    "to_tools",
    "tool_body",
    "tool_call_body",
]

MAX_MESSAGES = 16_384
MAX_TOOLS = 1024
MAX_SCHEMA_CHARACTERS = 262_144
"""Longest JSON schema, written as JSON."""


class Body(BaseModel):
    """Refuses unknown fields and does not turn one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A piece of content. Text is the only kind."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """`arguments` is a JSON object, written as a string."""

    name: str
    arguments: str


class WireToolCall(Body):
    """One call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ReasoningDetail(Body):
    """One piece of thinking in MiniMax's `reasoning_details` form."""

    model_config = ConfigDict(extra="ignore", strict=True)
    text: str = ""


class ChatMessage(Body):
    """A message of the conversation.

    Thinking comes back as it was given: `reasoning_content`, `reasoning` or `reasoning_details`. Fields that
    the official client echoes from our own replies are accepted while they are empty.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[ReasoningDetail] | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = Field(default=None, max_length=0)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def thinking(self) -> str | None:
        """The thinking, whichever way it was sent."""
        if self.reasoning_details:
            return "".join(detail.text for detail in self.reasoning_details)
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @model_validator(mode="after")
    def _fields_of_role(self) -> "ChatMessage":
        if self.role != "assistant" and (self.tool_calls or self.thinking is not None):
            raise ValueError(f"tool_calls and reasoning belong to the assistant, not to role {self.role!r}")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of role 'tool' needs tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError(f"tool_call_id belongs to role 'tool', not to role {self.role!r}")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is missing in a message of role {self.role!r}")
        return self


def _not_strict(value: Any) -> Any:
    if value is True:
        raise ValueError(
            "arguments follow their schema for sure where tool_choice demands the call; leave the field out"
        )
    return value


NotStrict = Annotated[Literal[False] | None, BeforeValidator(_not_strict)]
"""A tool's `strict`, which clients like to set."""


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema of type object."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: NotStrict = None

    @field_validator("parameters")
    @classmethod
    def _servable(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is not None:
            check_schema(parameters)
        return parameters


class Tool(Body):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class WeightsRequest(Body):
    """Body of POST /admin/weights."""

    path: str = Field(min_length=1)
    version: int = Field(ge=0)


def check_names(names: Sequence[str]) -> None:
    """ValueError for two tools of one name: a call would not say which of them it calls."""
    seen = set[str]()
    for name in names:
        if name in seen:
            raise ValueError(f"tools: expected different names, got {name!r} twice")
        seen.add(name)


def check_schema(schema: dict[str, Any]) -> None:
    """ValueError for a JSON schema that is too deep, too long, or holds a number that JSON has not."""
    if too_deep(schema):
        raise ValueError(f"expected a JSON schema of at most {MAX_NESTING} levels, got a deeper one")
    try:
        length = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise ValueError("expected a JSON schema with finite numbers, got NaN or an infinity") from None
    if length > MAX_SCHEMA_CHARACTERS:
        raise ValueError(
            f"expected a JSON schema of at most {MAX_SCHEMA_CHARACTERS} characters, got {length}"
        )


def to_messages(messages: list[ChatMessage]) -> list[Message]:
    """Wire messages as every room knows them.

    Tools' answers are put in the order of their calls. Errors: InputError naming the message, for arguments
    that are no JSON object or one nested too deeply, and for tools' answers that do not fit the calls.
    """
    result: list[Message] = []
    for is_answer, run in itertools.groupby(enumerate(messages), lambda item: item[1].role == "tool"):
        first = len(result)
        run = [_message(message, place) for place, message in run]
        result += (
            leading_in_call_order(result[-1].tool_calls if result else (), run, first) if is_answer else run
        )
    return result


def to_tools(tools: list[Tool]) -> tuple[ToolSpec, ...]:
    """Offered tools as every room knows them."""
    empty = {"type": "object", "properties": {}}
    return tuple(
        ToolSpec(t.function.name, t.function.description or "", t.function.parameters or empty) for t in tools
    )


def tool_body(tool: ToolSpec) -> dict[str, Any]:
    """One entry of a request's `tools`."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def tool_call_body(call: ToolCall) -> dict[str, Any]:
    """One entry of a message's `tool_calls`."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def message_body(message: Message) -> dict[str, Any]:
    """A message on the wire; `reasoning_content` and `tool_calls` only where there are any."""
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        body["reasoning_content"] = message.thinking
    if message.tool_calls:
        body["tool_calls"] = [tool_call_body(call) for call in message.tool_calls]
        body["content"] = message.content or None
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def _message(message: ChatMessage, place: int) -> Message:
    calls = tuple(_tool_call(call, place) for call in message.tool_calls or ())
    role = "system" if message.role == "developer" else message.role
    return Message(role, message.text, message.thinking, calls, message.tool_call_id)


def _tool_call(call: WireToolCall, place: int) -> ToolCall:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or too_deep(arguments):
        raise InputError(
            f"messages[{place}].tool_calls: arguments of {call.function.name!r}: expected a JSON object of "
            f"at most {MAX_NESTING} levels, got {call.function.arguments[:80]!r}"
        )
    return ToolCall(call.function.name, arguments, call.id)
