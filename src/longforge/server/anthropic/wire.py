"""Bodies of the Messages dialect: what a request may say.

Unknown fields are refused by name. Accepted without changing the answer, because the official client or
coding agents always send them and nothing is lost by it: `cache_control` (caching is automatic), `metadata`
(a label), `service_tier` "auto" (there is one tier), `output_config.effort` (a hint; this model decides its
effort itself), `context_management` that keeps all thinking, `eager_input_streaming` (arguments are always
streamed as they are parsed), `display` "summarized" (the thinking itself is shown), and fields that say the
default: `container`, `inference_geo`, `mcp_servers`, `speed`, `defer_loading`, `allowed_callers`, `strict`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from longforge.chat import ThinkingMode
from longforge.chat.constraint import Constraint
from longforge.protocol import SamplingParams, ToolSpec
from longforge.server.anthropic.blocks import AssistantBlock, CacheControl, TextBlock, UserBlock
from longforge.server.sampling_fields import MAX_STOP_CHARACTERS, MAX_STOPS
from longforge.server.wire import MAX_MESSAGES, MAX_TOOLS, Body, NotStrict, check_names, check_schema

__all__ = ["CountRequest", "MessagesRequest", "WireMessage"]

SMALLEST_BUDGET = 1024


StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class UserMessage(Body):
    """What a person says, after the results of the tools that were called."""

    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantMessage(Body):
    """An answer of the model, given back whole."""

    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemMessage(Body):
    """A system text in the middle of a conversation."""

    role: Literal["system"]
    content: str | list[TextBlock]


WireMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class Tool(Body):
    """A tool of the client's; there are no tools of the server's."""

    name: str = Field(min_length=1)
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    strict: NotStrict = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            raise ValueError(
                f"type: expected 'custom' or none, got {kind!r}; this server has no tools of its own"
            )
        return value

    @field_validator("input_schema")
    @classmethod
    def _servable(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_schema(value)
        return value

    @property
    def spec(self) -> ToolSpec:
        """The tool as every room knows it."""
        return ToolSpec(self.name, self.description or "", self.input_schema)


class ToolChoice(Body):
    """Whether tools may, must or must not be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _name_for_tool(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("tool_choice: a name belongs to type 'tool', and to no other type")
        if self.type == "none" and self.disable_parallel_tool_use is not None:
            raise ValueError("tool_choice: disable_parallel_tool_use does not go with type 'none'")
        return self


class Thinking(Body):
    """How the model may think. display "omitted" gives the thinking only inside its mark."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=SMALLEST_BUDGET)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _fields_of_type(self) -> "Thinking":
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("thinking: budget_tokens belongs to type 'enabled', and to no other type")
        if self.type == "disabled" and self.display is not None:
            raise ValueError("thinking: display does not go with type 'disabled'")
        return self


class OutputFormat(Body):
    """The answer's text is JSON of this schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")

    @field_validator("json_schema")
    @classmethod
    def _servable(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_schema(value)
        return value


class OutputConfig(Body):
    """The form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class KeptThinking(Body):
    """The one edit that asks for nothing to be edited."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Body):
    """Edits of the conversation; none are made here."""

    edits: list[KeptThinking]


class Metadata(Body):
    """A label."""

    user_id: str | None = None


class CountRequest(Body):
    """Body of POST /v1/messages/count_tokens: a conversation."""

    model: str
    messages: list[WireMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    mcp_servers: list[None] | None = Field(default=None, max_length=0)
    speed: Literal["standard"] | None = None

    @model_validator(mode="after")
    def _different_tools(self) -> "CountRequest":
        check_names([tool.name for tool in self.tools or ()])
        return self

    @property
    def thinking_mode(self) -> ThinkingMode:
        """As the templates name it; without the field there is no thinking (M2 always thinks)."""
        return self.thinking.type if self.thinking else "disabled"

    @property
    def offered_tools(self) -> tuple[ToolSpec, ...]:
        """The tools the model gets to see: none with tool_choice "none"."""
        if self.tool_choice is not None and self.tool_choice.type == "none":
            return ()
        return tuple(tool.spec for tool in self.tools or ())

    @property
    def constraint(self) -> Constraint:
        """What the form of the answer must be."""
        choice = self.tool_choice or ToolChoice(type="auto")
        output = self.output_config.format if self.output_config else None
        return Constraint(
            calls="required" if choice.type in ("any", "tool") else "free",
            tool=choice.name,
            parallel=not (choice.disable_parallel_tool_use and self.offered_tools),
            schema=output.json_schema if output else None,
        )


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop_sequences: list[StopSequence] | None = Field(default=None, max_length=MAX_STOPS)
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto"] | None = None
    container: None = None
    inference_geo: None = None

    @model_validator(mode="after")
    def _consistent(self) -> "MessagesRequest":
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget is not None and budget >= self.max_tokens:
            raise ValueError(
                f"thinking.budget_tokens: expected less than max_tokens ({self.max_tokens}), got {budget}"
            )
        return self

    @property
    def hides_thinking(self) -> bool:
        """Whether thinking is given only inside its mark."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def params(self) -> SamplingParams:
        """What the engine is asked for."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
        )
