"""Body of POST /v1/chat/completions."""

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from longforge.chat.constraint import Constraint
from longforge.chat.tokens import ThinkingMode
from longforge.protocol import ToolSpec
from longforge.server.sampling_fields import MAX_TOP_LOGPROBS, Sampling
from longforge.server.wire import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    ChatMessage,
    Tool,
    check_names,
    check_schema,
    to_tools,
)

__all__ = ["DEFAULT_CHAT_TOKENS", "ChatRequest", "TemplateArguments"]

DEFAULT_CHAT_TOKENS = 1024
"""Longest answer of a chat request that names no limit.

The engine reserves pages for it, so it is not the context.
"""


class Thinking(Body):
    """M3's thinking switch."""

    type: ThinkingMode


class TemplateArguments(Body):
    """What other servers hand to the chat template; here the thinking switch alone."""

    thinking_mode: ThinkingMode | None = None
    enable_thinking: bool | None = None

    @property
    def mode(self) -> ThinkingMode | None:
        """How the model may think, if they say so."""
        if self.thinking_mode is not None or self.enable_thinking is None:
            return self.thinking_mode
        return "enabled" if self.enable_thinking else "disabled"

    @model_validator(mode="after")
    def _one_switch(self) -> "TemplateArguments":
        if self.thinking_mode is not None and self.enable_thinking is not None:
            raise ValueError("expected thinking_mode or enable_thinking, got both")
        return self


class NamedFunction(Body):
    """The name of an offered function."""

    name: str = Field(min_length=1)


class NamedTool(Body):
    """A choice of one tool: `{"type": "function", "function": {"name": ...}}`."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Body):
    """A JSON schema and its label. It is always followed strictly."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _servable(cls, schema: dict[str, Any]) -> dict[str, Any]:
        check_schema(schema)
        return schema


class ResponseFormat(Body):
    """The form of the content."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', which needs it")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that the content must follow; None for free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {} if self.type == "json_object" else None


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """"none" turns thinking off; how much it thinks the model decides itself."""
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_split: bool | None = None
    """Give the thinking in MiniMax's `reasoning_details` form too."""
    report_blocks: bool | None = None
    """Tell in each chunk which blocks of the context the newest token's sparse layers selected."""

    @property
    def limit(self) -> int:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS

    @property
    def asked_thinking(self) -> ThinkingMode | None:
        """How the model may think, if the request says so."""
        return next(iter(self._thinking_modes()), None)

    @property
    def thinking_mode(self) -> ThinkingMode:
        """How the model may think."""
        return self.asked_thinking or "adaptive"

    @property
    def offered_tools(self) -> tuple[ToolSpec, ...]:
        """The tools the model gets to see: none with tool_choice "none"."""
        return () if self.tool_choice == "none" else to_tools(self.tools or [])

    @property
    def named_tool(self) -> str | None:
        """The one tool that must be called, if one was named."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def alternatives(self) -> int:
        """Most likely tokens to report beside each sampled one."""
        return self.top_logprobs or 0

    @property
    def constraint(self) -> Constraint:
        """What the form of the answer must be."""
        must_call = self.tool_choice == "required" or self.named_tool is not None
        return Constraint(
            calls="required" if must_call else "free",
            tool=self.named_tool,
            parallel=self.parallel_tool_calls is not False or not self.offered_tools,
            schema=self.response_format.schema_wanted if self.response_format else None,
        )

    def _thinking_modes(self) -> set[ThinkingMode]:
        modes: set[ThinkingMode] = set()
        if self.thinking is not None:
            modes.add(self.thinking.type)
        if self.reasoning_effort is not None:
            modes.add("disabled" if self.reasoning_effort == "none" else "adaptive")
        if self.chat_template_kwargs is not None and (mode := self.chat_template_kwargs.mode) is not None:
            modes.add(mode)
        return modes

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        modes = self._thinking_modes()
        if len(modes) > 1:
            raise ValueError(
                "thinking, reasoning_effort and chat_template_kwargs: expected one mode, got "
                + " and ".join(mode for mode in get_args(ThinkingMode) if mode in modes)
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.report_blocks and not self.stream:
            raise ValueError("report_blocks needs stream to be true")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        offered = [tool.function.name for tool in self.tools or ()]
        check_names(offered)
        if self.tool_choice == "required" and not offered:
            raise ValueError("tool_choice: 'required' needs tools")
        if self.named_tool is not None and self.named_tool not in offered:
            raise ValueError(f"tool_choice: expected the name of an offered tool, got {self.named_tool!r}")
        constraint = self.constraint
        if constraint.calls == "required" and constraint.schema is not None:
            raise ValueError("response_format: a required call leaves no content that could be JSON")
        if self.ignore_eos and constraint != Constraint():
            raise ValueError("ignore_eos: an answer of a given form ends where its form ends")
