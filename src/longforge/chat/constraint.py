"""What an answer must be: a call, a call of one tool, JSON of a schema; as a grammar over its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longforge.chat.call_grammar import CallGrammar
from longforge.chat.guarded_schema import Guard
from longforge.chat.lark import (
    Rules,
    embedded_json,
    literal,
    markup,
    one_of,
    regex,
    split_text,
    symbols,
    text_without,
)
from longforge.chat.tokenizer import Tokenizer
from longforge.chat.tokens import Family
from longforge.errors import InputError
from longforge.protocol import Grammar, ToolSpec

__all__ = ["Constraint", "answer_grammar"]

# What content must not spell after a `<`, lest it be read as thinking or as calls.
_CONTENT_WORDS: dict[Family, tuple[str, ...]] = {
    "m2": ("think>", "/think>", "minimax:"),
    "m3": ("mm:think>", "/mm:think>", "]minimax"),
}
# Whitespace is bounded: a model may not fill its answer with it.
_JSON_FORM = {"whitespace_pattern": r"[ \t\n\r]{1,80}", "json_allowed_escapes": 'nrbtf\\"'}


@dataclass(frozen=True)
class Constraint:
    """What a request asks of the form of its answer; nothing by default.

    calls: "free" as the model likes, "required" at least one call. tool: only calls of this tool, and
    required. parallel: whether more than one call is allowed. schema: the content must be JSON of this
    schema ({} is any object); not together with required calls.
    """

    calls: Literal["free", "required"] = "free"
    tool: str | None = None
    parallel: bool = True
    schema: dict[str, Any] | None = None


def answer_grammar(
    constraint: Constraint,
    tools: Sequence[ToolSpec],
    family: Family,
    thinking_open: bool,
    tokenizer: Tokenizer,
    *,
    may_think: bool = True,
) -> Grammar | None:
    """The grammar of the whole answer, thinking included, up to its stop token; None where all is allowed.

    may_think: whether an answer that does not begin inside thinking may open it. Choices: required calls
    come without content; JSON content and calls exclude each other; a call has its properties in the order
    of the schema, and no others. Errors: InputError for a tool that is not offered, for required calls
    without tools, for a schema that cannot be served.
    """
    offered = _offered(constraint, tools)
    required = constraint.calls == "required" or constraint.tool is not None
    if not required and constraint.schema is None and (constraint.parallel or not offered):
        return None
    answer = _Answer(family, tokenizer)
    if constraint.schema is not None:
        answer.may_be_json(constraint.schema)
    elif not required:
        answer.may_be_content()
    if offered:
        answer.may_have_calls(offered, constraint.parallel)
    return Grammar("lark", answer.text(thinking_open, may_think))


def _offered(constraint: Constraint, tools: Sequence[ToolSpec]) -> list[ToolSpec]:
    """The tools that may be called."""
    if constraint.calls == "free" and constraint.tool is None:
        return list(tools)
    if constraint.schema is not None:
        raise InputError("response_format: expected none where calls are required, got a schema")
    if constraint.tool is None:
        if not tools:
            raise InputError("tool_choice: a call is required, but there are no tools")
        return list(tools)
    named = [tool for tool in tools if tool.name == constraint.tool]
    if not named:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise InputError(f"tool_choice: {constraint.tool!r}: no such tool; there are {known}")
    return named


class _Answer:
    """Collects what may follow the thinking."""

    def __init__(self, family: Family, tokenizer: Tokenizer) -> None:
        self._family: Family = family
        self._tokenizer = tokenizer
        self._rules = Rules()
        self._after_thought: list[str] = []
        self._alone: list[str] = []
        self._content: str | None = None
        self._words = _CONTENT_WORDS[family]

    def may_be_json(self, schema: dict[str, Any]) -> None:
        guarded = Guard(self._words, "response_format").rewrite(schema or {"type": "object"})
        self._add(self._rules.rule(embedded_json({**guarded, "x-guidance": _JSON_FORM})), newlines=2)

    def may_be_content(self) -> None:
        self._content = text_without(self._words)
        self._add(self._rules.terminal(regex(self._content)), newlines=0)

    def may_have_calls(self, tools: Sequence[ToolSpec], parallel: bool) -> None:
        """Calls, after content if there may be content."""
        head, block = CallGrammar(self._rules, self._family, self._tokenizer).block(tools, parallel)
        if self._content is not None:
            self._add(
                f"{self._rules.terminal(f'{regex(self._content)} {literal(head)}')} {block}", newlines=0
            )
        else:
            self._add(f"{literal(head)} {block}", newlines=3)

    def text(self, thinking_open: bool, may_think: bool) -> str:
        """The whole grammar."""
        tag = "mm:think" if self._family == "m3" else "think"
        head, tail = split_text(markup(f"</{tag}>", self._tokenizer))
        thought = self._rules.terminal(f"{regex(text_without((f'/{tag}>',)))} {literal(head)}")
        thoughtful = f"{thought} {tail} {one_of(self._after_thought)}"
        if thinking_open:
            return self._rules.text(thoughtful)
        plain = one_of(self._alone)
        if not may_think:
            return self._rules.text(plain)
        opened = f"{self._symbols(f'<{tag}>')} {thoughtful}"
        # A closing tag at the very start is how M3 skips its thought.
        skipped = [f"{self._symbols(f'</{tag}>')} {plain}"] if self._family == "m3" else []
        return self._rules.text(one_of([opened, *skipped, plain]))

    def _add(self, body: str, newlines: int) -> None:
        """newlines: how many M2 may write between a thought and this."""
        spaced = newlines and self._family == "m2"
        self._after_thought.append(f"/\\n{{1,{newlines}}}/? {body}" if spaced else body)
        self._alone.append(body)

    def _symbols(self, text: str) -> str:
        return symbols(markup(text, self._tokenizer))
