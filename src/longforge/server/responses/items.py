"""Items of the Responses dialect: what a conversation is made of, and its way to `protocol.Message`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from longforge.chat.schema import MAX_NESTING, too_deep
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall
from longforge.server.seal import Echo, Seal, Verdict
from longforge.server.tool_answers import in_call_order
from longforge.server.wire import Body

__all__ = ["CallItem", "Item", "MessageItem", "OutputItem", "ReasoningItem", "read_items"]

Status = Literal["in_progress", "completed", "incomplete"]


class TextPart(Body):
    """Text, of a person or of the model. The official client echoes empty lists of our own parts."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[None] | None = Field(default=None, max_length=0)
    logprobs: list[None] | None = Field(default=None, max_length=0)


class UnservedPart(Body):
    """Content of another medium, refused in words of its own."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["input_image", "input_file", "input_audio", "refusal"]

    @model_validator(mode="after")
    def _refuse(self) -> "UnservedPart":
        raise ValueError(f"parts of type {self.type!r} are not served: this model reads text only")


Content = list[Annotated[TextPart | UnservedPart, Field(discriminator="type")]]


class MessageItem(Body):
    """A message; of the assistant, one of its answers given back."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Content
    id: str | None = None
    status: Status | None = None
    phase: None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return _text_of(self.content)


class ReasoningText(Body):
    """A piece of thinking."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    """Thinking given back: as text, sealed, or both."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class CallItem(Body):
    """A call of a function. `arguments` is a JSON object, written as a string."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None

    @property
    def call(self) -> ToolCall:
        """As every room knows it. InputError for arguments that are no JSON object."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict) or too_deep(arguments):
            raise InputError(
                f"input: arguments of {self.name!r}: expected a JSON object of at most {MAX_NESTING} levels, "
                f"got {self.arguments[:80]!r}"
            )
        return ToolCall(self.name, arguments, self.call_id)


class OutputItem(Body):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Content
    id: str | None = None
    status: Status | None = None
    name: None = None
    namespace: None = None
    caller: None = None
    created_by: None = None


def _kind(value: Any) -> str:
    """The type of an item; a message may leave it out."""
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]


@dataclass
class _Reader:
    """Messages from items. Items of the assistant that follow each other are one message."""

    seal: Seal
    messages: list[Message] = field(default_factory=list)
    echoes: Counter[Verdict] = field(default_factory=Counter)
    _thoughts: list[str] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _calls: list[ToolCall] = field(default_factory=list)
    _asked: tuple[ToolCall, ...] = ()
    _answers: list[Message] = field(default_factory=list)

    def read(self, item: Any) -> None:
        """Takes the next item."""
        if isinstance(item, OutputItem):
            self._end_message()
            self._answers.append(Message("tool", _text_of(item.output), tool_call_id=item.call_id))
            return
        self._end_answers()
        if isinstance(item, ReasoningItem):
            self._think(item)
        elif isinstance(item, CallItem):
            self._calls.append(item.call)
        elif item.role == "assistant":
            self._texts.append(item.text)
        else:
            self._end_message()
            self._end_answers()
            self.messages.append(Message("user" if item.role == "user" else "system", item.text))

    def finish(self) -> None:
        """The conversation is whole."""
        self._end_message()
        self._end_answers()

    def _think(self, item: ReasoningItem) -> None:
        text = None if item.content is None else "".join(part.text for part in item.content)
        if text is None and item.encrypted_content is None:
            echo = Echo(None, "unreadable")  # a summary is not what the model thought
        else:
            echo = self.seal.read(text or "", item.encrypted_content or "")
        self.echoes[echo.verdict] += 1
        if echo.text is not None:
            self._thoughts.append(echo.text)

    def _end_message(self) -> None:
        if not (self._thoughts or self._texts or self._calls):
            return
        self._asked = tuple(self._calls)
        if len({call.id for call in self._asked}) < len(self._asked):
            raise InputError("input: expected another call_id for each function_call, got one twice")
        thinking = "".join(self._thoughts) if self._thoughts else None
        self.messages.append(Message("assistant", "".join(self._texts), thinking, self._asked))
        self._thoughts, self._texts, self._calls = [], [], []

    def _end_answers(self) -> None:
        if self._asked or self._answers:
            self.messages += in_call_order(self._asked, self._answers, "input")
            self._asked, self._answers = (), []


def read_items(items: Sequence[Any], seal: Seal) -> tuple[list[Message], Counter[Verdict]]:
    """The messages that items stand for, and what the marks on the thinking among them say.

    Errors: InputError for arguments that are no JSON object, for outputs that do not fit the calls before.
    """
    reader = _Reader(seal)
    for item in items:
        reader.read(item)
    reader.finish()
    return reader.messages, reader.echoes


def _text_of(content: str | Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))
