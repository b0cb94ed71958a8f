"""What an answer must be: a call, a call of one tool, JSON of a schema; as a grammar over its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longforge.chat.tokenizer import Tokenizer
from longforge.chat.tokens import Family
from longforge.errors import InputError
from longforge.protocol import Grammar, ToolSpec

__all__ = ["Constraint", "answer_grammar"]


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
) -> Grammar | None:
    """The grammar of the whole answer, thinking included, up to its stop token; None where all is allowed.

    Errors: InputError for a tool that is not offered, for required calls without tools, for a schema that
    cannot be served.
    """
    if constraint == Constraint():
        return None
    raise InputError("response_format and tool_choice: only free answers are served yet")
