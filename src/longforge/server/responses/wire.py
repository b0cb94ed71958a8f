"""Bodies of the Responses dialect: what a request may say.

Unknown fields are refused by name. Accepted without changing the answer, because the official client or
coding agents always send them and nothing is lost by it: labels (`metadata`, `user`, `safety_identifier`,
`prompt_cache_key`; caching is automatic), `service_tier` "auto" and "default" (there is one tier),
`reasoning.summary` "auto" (there are no summaries; the thinking itself is given), `text.verbosity` "medium"
and `truncation` "disabled" (the defaults), `stream_options.include_obfuscation` false.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from longforge.chat import ThinkingMode
from longforge.chat.constraint import Constraint
from longforge.protocol import SamplingParams, ToolSpec
from longforge.server.chat_request import DEFAULT_CHAT_TOKENS
from longforge.server.responses.items import Item
from longforge.server.wire import MAX_MESSAGES, MAX_TOOLS, Body, NotStrict, check_names, check_schema

__all__ = ["ResponsesRequest"]


class FunctionTool(Body):
    """A function of the client's; there are no tools of the server's."""

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: NotStrict = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "function"):
            raise ValueError(f"type: expected 'function', got {kind!r}; this server has no tools of its own")
        return value

    @field_validator("parameters")
    @classmethod
    def _servable(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        check_schema(value or {})
        return value

    @property
    def spec(self) -> ToolSpec:
        """The tool as every room knows it."""
        empty = {"type": "object", "properties": {}}
        return ToolSpec(self.name, self.description or "", self.parameters or empty)


class NamedFunction(Body):
    """A choice of one function."""

    type: Literal["function"]
    name: str


class Format(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """A schema is always followed to the letter."""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> "Format":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("a schema belongs to type 'json_schema', and to no other type")
        check_schema(self.json_schema or {})
        return self


class Text(Body):
    """How the text is to be."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """How much to think: none turns it off, the lower efforts let the model decide, the higher ones make it
    think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class StreamOptions(Body):
    """Obfuscation is not made."""

    include_obfuscation: Literal[False] | None = None


Label = Annotated[str, StringConstraints(max_length=512)]


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    model: str
    input: str | Annotated[list[Item], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    metadata: dict[str, Label] | None = Field(default=None, max_length=16)
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ResponsesRequest":
        if not self.input and self.input != "":
            raise ValueError("input: expected text or at least 1 item, got an empty list")
        if self.background and self.stream:
            raise ValueError("background: expected no stream with it; ask for the response by its id")
        if self.background and not self.stored:
            raise ValueError("background: expected store to be true, since the response is fetched later")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        check_names([tool.name for tool in self.tools or ()])
        return self

    @property
    def stored(self) -> bool:
        """Whether the response can be asked for later."""
        return self.store is not False

    @property
    def seals(self) -> bool:
        """Whether thinking is given sealed too."""
        return bool(self.include)

    @property
    def thinking_mode(self) -> ThinkingMode:
        """How the model may think."""
        effort = self.reasoning.effort if self.reasoning else None
        if effort == "none":
            return "disabled"
        return "enabled" if effort in ("high", "xhigh", "max") else "adaptive"

    @property
    def offered_tools(self) -> tuple[ToolSpec, ...]:
        """The tools the model gets to see: none with tool_choice "none"."""
        return () if self.tool_choice == "none" else tuple(tool.spec for tool in self.tools or ())

    @property
    def constraint(self) -> Constraint:
        """What the form of the answer must be."""
        name = self.tool_choice.name if isinstance(self.tool_choice, NamedFunction) else None
        form = self.text.format if self.text else None
        schema = {} if form is not None and form.type == "json_object" else None
        return Constraint(
            calls="required" if name is not None or self.tool_choice == "required" else "free",
            tool=name,
            parallel=self.parallel_tool_calls is not False or not self.offered_tools,
            schema=form.json_schema if form is not None and form.json_schema is not None else schema,
        )

    @property
    def limit(self) -> int:
        """Most tokens of the answer; without a word the same as in Chat Completions."""
        return self.max_output_tokens or DEFAULT_CHAT_TOKENS

    @property
    def params(self) -> SamplingParams:
        """What the engine is asked for."""
        return SamplingParams(
            max_tokens=self.limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )
