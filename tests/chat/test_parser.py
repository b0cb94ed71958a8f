"""The parser takes any text in any pieces, loses none of it and never raises."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longforge.chat import ChatParser, Delta, parse
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall
from small_chat import CLOSE, GREP, NS, OPEN, check_calls, cut_at, streamed

CALL = f'{NS}<invoke name="grep">{NS}<pattern>x{NS}</pattern>{NS}</invoke>'
FRAGMENTS = {
    "m3": """<mm:think> </mm:think> NS<tool_call> NS</tool_call> NS<invoke§name="grep"> NS<invoke§name="">
        NS</invoke> NS<pattern> NS</pattern> NS<item> NS</item> NS<tool NS< NS
        ]<]mini <mm:th </parameter> <""",
    "m2": """<think> </think> <minimax:tool_call> </minimax:tool_call> <invoke§name="grep"> </invoke>
        <invoke§name=""> <parameter§name="pattern"> <parameter§name="p"> </parameter>
        <minimax: </thi <parameter> </ <""",
}


def _fragments(family: str) -> list[str]:
    listed = FRAGMENTS[family].replace("NS", NS).split()
    return [fragment.replace("§", " ") for fragment in listed] + ["\n", "\n", " "]


def _text(family: str, parts: list[int]) -> str:
    """Tags and numbered words; a part below zero is a word."""
    fragments = _fragments(family)
    return "".join(
        f"word{i} " if part < 0 else fragments[part % len(fragments)] for i, part in enumerate(parts)
    )


parts = st.lists(st.integers(-8, 20), max_size=25)


@given(parts=parts, cuts=st.lists(st.integers(0, 300), max_size=8), thinking_open=st.booleans())
@settings(max_examples=400)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_the_split_makes_no_difference(
    family, parts: list[int], cuts: list[int], thinking_open: bool
) -> None:
    text = _text(family, parts)
    at_once = streamed(family, [text], thinking_open=thinking_open)
    check_calls(at_once)
    assert streamed(family, cut_at(text, cuts), thinking_open=thinking_open) == at_once
    assert streamed(family, list(text), thinking_open=thinking_open) == at_once


@given(parts=parts, thinking_open=st.booleans())
@settings(max_examples=300)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_no_word_is_lost_or_doubled(family, parts: list[int], thinking_open: bool) -> None:
    text = _text(family, parts) + "\n"  # half a tag at the end of a call is no word
    message = parse(text, family, [GREP], thinking_open)
    told = json.dumps([message.thinking, message.content, [call.arguments for call in message.tool_calls]])
    assert sorted(re.findall(r"word\d+", told)) == sorted(re.findall(r"word\d+", text))


@given(text=st.text().filter(lambda text: not re.search("</?(mm:)?think>|tool_call>", text)))
@example(text="a ] ]< <b> \n\n</x> ")
@settings(max_examples=100)
def test_plain_text_is_content_as_it_is(text: str) -> None:
    assert parse(text, "m3") == parse(text, "m2") == Message("assistant", text)


def test_text_is_passed_on_as_soon_as_it_cannot_be_a_tag() -> None:
    parser = ChatParser("m3", [GREP])
    assert parser.push("The answer") == [Delta("content", "The answer")]
    assert parser.push(" is <mm") == [Delta("content", " is ")]
    assert parser.push("m>") == [Delta("content", "<mmm>")]
    assert parser.push("]<]mini") == []
    assert parser.push("max[>[<tool_") == []
    assert parser.push("call>") == []
    assert parser.push(f"{CALL}")[-1] == Delta("call_end", call=ToolCall("grep", {"pattern": "x"}))
    assert parser.push(f"\n{CLOSE}\n") == []
    assert parser.finish() == []


def test_thinking_streams_and_ends() -> None:
    parser = ChatParser("m2", thinking_open=True)
    assert parser.push("I should\n") == [Delta("thinking", "I should")]
    assert parser.push("look\n") == [Delta("thinking", "\nlook")]
    assert parser.push("</think>\n") == []
    assert parser.push("\nHere") == [Delta("content", "Here")]


@pytest.mark.parametrize(
    ("family", "thinking_open", "text", "thinking", "content"),
    [
        ("m3", False, "<mm:think>why</mm:think>so", "why", "so"),
        ("m3", False, "</mm:think>so", "", "so"),
        ("m3", False, "<mm:think></mm:think>so", "", "so"),
        ("m3", True, "why</mm:think>so", "why", "so"),
        ("m3", True, "</mm:think>so", "", "so"),
        ("m3", True, "never ends <mm:think>", "never ends <mm:think>", ""),
        ("m3", False, "so</mm:think>", None, "so</mm:think>"),
        ("m3", False, "a<mm:think>1</mm:think>b<mm:think>2</mm:think>", "12", "ab"),
        ("m3", True, f"{OPEN}{CALL}{CLOSE}", f"{OPEN}{CALL}{CLOSE}", ""),
        ("m2", True, "why\n</think>\n\nso", "why", "so"),
        ("m2", True, "why</think>so", "why", "so"),
        ("m2", True, "\n\nwhy\n\n</think>\n\n\nso\n", "\n\nwhy\n", "\nso\n"),
        ("m2", True, "cut off\n", "cut off\n", ""),
        ("m2", False, "<think>\nwhy\n</think>\n\nso", "why", "so"),
    ],
)
def test_thinking_is_told_from_content(
    family, thinking_open: bool, text: str, thinking, content: str
) -> None:
    message = parse(text, family, [GREP], thinking_open)
    assert (message.thinking, message.content, message.tool_calls) == (thinking, content, ())


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match="expected m2 or m3, got 'm1'"):
        ChatParser("m1")  # pyright: ignore[reportArgumentType]
