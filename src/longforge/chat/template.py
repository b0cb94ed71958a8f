"""Conversations as prompts.

The templates are jinja2 files. What a template prints is data by default: it is cut out of the rendered text
before encoding, so no message, tool description, argument or tool result can ever become a special token.

An assistant message that was parsed from a well-formed answer renders to exactly the text that was sampled,
so the next prompt of a conversation without a new user message is an exact extension of the last prompt and
its answer.

Thinking of assistant messages is rendered only after the last user message (interleaved thinking: it lives
through all tool rounds of a turn and is dropped when the user speaks again). For M2 this is the released
rule; whether the released M3 template keeps older thinking is not verified, and giving it the same rule is a
choice. The default system text, the wording of the tool block and M3's one line about the thinking mode are
ours.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from longforge.chat.format import Piece, call_pieces
from longforge.chat.tokenizer import Tokenizer
from longforge.chat.tokens import Family, ThinkingMode
from longforge.errors import InputError
from longforge.protocol import Message, Role, ToolSpec

__all__ = ["encode_prompt", "render", "render_pieces", "starts_in_thinking"]

# A placeholder for one piece of data in the rendered text. Data never stands in that text itself, so it
# cannot contain a placeholder, and the templates hold no character of the private use area.
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


def render(
    messages: Sequence[Message],
    tools: Sequence[ToolSpec] = (),
    *,
    family: Family = "m3",
    thinking: ThinkingMode = "adaptive",
    add_generation_prompt: bool = True,
) -> str:
    """The prompt as a person reads it. Ids come from `encode_prompt`, where data cannot become markers."""
    pieces = render_pieces(
        messages, tools, family=family, thinking=thinking, add_generation_prompt=add_generation_prompt
    )
    return "".join(piece.text for piece in pieces)


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec] = (),
    *,
    family: Family = "m3",
    thinking: ThinkingMode = "adaptive",
    add_generation_prompt: bool = True,
    context: int | None = None,
) -> list[int]:
    """Token ids of the prompt. Data is encoded without special tokens, whatever it spells.

    context: most tokens that are of use; what is longer for sure is a ContextOverflow and not encoded.
    """
    pieces = render_pieces(
        messages, tools, family=family, thinking=thinking, add_generation_prompt=add_generation_prompt
    )
    if context is not None:
        tokenizer.check_fits((piece.text for piece in pieces), context)
    return [i for piece in pieces for i in tokenizer.encode(piece.text, special=piece.markup)]


def render_pieces(
    messages: Sequence[Message],
    tools: Sequence[ToolSpec] = (),
    *,
    family: Family = "m3",
    thinking: ThinkingMode = "adaptive",
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """The prompt as stretches of markup and of data, in order.

    `thinking` applies to M3: "adaptive" lets the model decide, "enabled" opens a thinking block for it,
    "disabled" closes one. M2 always thinks. Raises InputError for no messages, for an answer of a tool that
    nobody called, and for a family, mode or role that does not exist.
    """
    if family not in get_args(Family):
        raise InputError(f"family: expected m2 or m3, got {family!r}")
    if thinking not in get_args(ThinkingMode):
        raise InputError(f"thinking: expected adaptive, enabled or disabled, got {thinking!r}")
    _check_order(messages)
    system = messages[0].content if messages[0].role == "system" else None
    rest = messages if system is None else messages[1:]
    data: list[str] = []
    text = _template(family).render(
        system=system,
        tools=[_tool_json(tool) for tool in tools],
        messages=[_view(message, family) for message in rest],
        last_user=max((i for i, message in enumerate(rest) if message.role == "user"), default=-1),
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
        data=data,
    )
    cut = _PLACEHOLDER.split(text)
    pieces = [
        Piece(data[int(part)], False) if place % 2 else Piece(part, True)
        for place, part in enumerate(cut)
        if part
    ]
    return _joined(pieces)


def starts_in_thinking(family: Family, thinking: ThinkingMode) -> bool:
    """Whether the generation prompt leaves the model inside a thinking block."""
    return family == "m2" or thinking == "enabled"


def _check_order(messages: Sequence[Message]) -> None:
    if not messages:
        raise InputError("messages: at least one message, got none")
    asked = False
    for place, message in enumerate(messages):
        if message.role not in get_args(Role):
            raise InputError(
                f"messages[{place}].role: expected system, user, assistant or tool, got {message.role!r}"
            )
        if message.role == "tool":
            if not asked:
                raise InputError(
                    f"messages[{place}]: a tool message must follow an assistant message with tool_calls"
                )
        else:
            asked = bool(message.tool_calls)


def _view(message: Message, family: Family) -> dict[str, Any]:
    """What a template sees of a message. `role_markup` is the role as the template's own text."""
    thinking, content = message.thinking, message.content
    if family == "m2" and thinking is None and message.role == "assistant" and "</think>" in content:
        head, _, content = content.partition("</think>")
        thinking = head.rpartition("<think>")[2].strip("\n")
        content = content.lstrip("\n")
    calls = [
        [Markup(piece.text) if piece.markup else piece.text for piece in call_pieces(call, family)]
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "role_markup": Markup(message.role),
        "content": content,
        "thinking": thinking,
        "calls": calls,
    }


def _tool_json(tool: ToolSpec) -> str:
    body = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


@jinja2.pass_context
def _set_data_aside(context: jinja2.runtime.Context, value: Any) -> Markup:
    """Called for all that a template prints: data is put aside and a placeholder printed in its place."""
    if isinstance(value, Markup):
        return value
    if not isinstance(value, str):
        raise TypeError(f"a template may print text only, got {type(value).__name__}")
    if not value:
        return Markup("")
    data: list[str] = context["data"]
    data.append(value)
    return Markup(f"\ue000{len(data) - 1}\ue001")


@cache
def _template(family: Family) -> jinja2.Template:
    source = (Path(__file__).parent / "templates" / f"{family}.jinja").read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(
        autoescape=True,
        finalize=_set_data_aside,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.from_string(source)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring stretches of markup as one, so that they are encoded as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.markup and joined[-1].markup:
            joined[-1] = Piece(joined[-1].text + piece.text, True)
        else:
            joined.append(piece)
    return joined
