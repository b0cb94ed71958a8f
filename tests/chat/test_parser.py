"""The parser takes any text in any pieces, loses none of it and never raises."""

import itertools
import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longforge.chat import ChatParser, Delta, parse
from longforge.chat.format import call_text
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec

NS = "]<]minimax[>["
OPEN, CLOSE = f"{NS}<tool_call>", f"{NS}</tool_call>"
GREP = ToolSpec("grep", "", {"type": "object", "properties": {"pattern": {"type": "string"}}})

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


def _merged(deltas: list[Delta]) -> list[Delta]:
    """The same deltas with neighbours of one kind joined: what a split may change and nothing else."""
    merged: list[Delta] = []
    for delta in deltas:
        if merged and delta.call is None and merged[-1].kind == delta.kind:
            merged[-1] = Delta(delta.kind, merged[-1].text + delta.text)
        else:
            merged.append(delta)
    return merged


def _stream(family, pieces: list[str], thinking_open: bool = False) -> list[Delta]:
    parser = ChatParser(family, [GREP], thinking_open)
    pushed = [delta for piece in pieces for delta in parser.push(piece)]
    return _merged(pushed + parser.finish())


parts = st.lists(st.integers(-8, 20), max_size=25)


@given(parts=parts, cuts=st.lists(st.integers(0, 300), max_size=8), thinking_open=st.booleans())
@settings(max_examples=400)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_the_split_makes_no_difference(
    family, parts: list[int], cuts: list[int], thinking_open: bool
) -> None:
    text = _text(family, parts)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    at_once = _stream(family, [text], thinking_open)
    assert _stream(family, pieces, thinking_open) == at_once
    assert _stream(family, list(text), thinking_open) == at_once


@given(parts=parts, thinking_open=st.booleans())
@settings(max_examples=300)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_no_word_is_lost_or_doubled(family, parts: list[int], thinking_open: bool) -> None:
    text = _text(family, parts)
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
    assert parser.push(f'call>{NS}<invoke name="grep">{NS}<pattern>x{NS}</pattern>') == []
    assert parser.push(f"{NS}</invoke>")[-1] == Delta("call_end", call=ToolCall("grep", {"pattern": "x"}))
    assert parser.push(f"\n{CLOSE}\n") == []
    assert parser.finish() == []


def test_thinking_streams_and_ends() -> None:
    parser = ChatParser("m2", thinking_open=True)
    assert parser.push("I should\n") == [Delta("thinking", "I should")]
    assert parser.push("look\n") == [Delta("thinking", "\nlook")]
    assert parser.push("</think>\n") == []
    assert parser.push("\nHere") == [Delta("content", "Here")]


def _call(pattern: str = "x") -> str:
    return f'{NS}<invoke name="grep">{NS}<pattern>{pattern}{NS}</pattern>{NS}</invoke>'


ONE = (ToolCall("grep", {"pattern": "x"}),)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{OPEN}\n{_call()}\n{CLOSE}", "", ONE),
        (f"Look.{OPEN}\n{_call()}\n{_call()}\n{CLOSE}\n\n", "Look.", ONE * 2),
        (f"{OPEN}{_call()}{CLOSE} more", "more", ONE),
        # The block is never closed: the calls in it are whole.
        (f"{OPEN}\n{_call()}\n", "", ONE),
        # The call is not closed, but its arguments are, and something that ends it follows.
        (f'{OPEN}{NS}<invoke name="grep">{NS}<pattern>x{NS}</pattern>{CLOSE}', "", ONE),
        (f'{OPEN}{NS}<invoke name="grep">{NS}<pattern>x{NS}</pattern>{_call()}{CLOSE}', "", ONE * 2),
        # Closing tags of nothing.
        (
            f'{OPEN}{NS}<invoke name="grep">{NS}<pattern>x{NS}</pattern></parameter>{NS}</invoke>{CLOSE}',
            "",
            ONE,
        ),
        (f"{OPEN}{_call()}{NS}</invoke>{CLOSE}", "", ONE),
        # Cut off: half the arguments may be missing.
        (f'{OPEN}{NS}<invoke name="grep">{NS}<pattern>x', ..., ()),
        (f'{OPEN}{NS}<invoke name="grep">{NS}<pattern>x{NS}</pattern>', ..., ()),
        (f"{OPEN}", ..., ()),
        (f"{OPEN}\n{CLOSE}", ..., ()),
        # Not a call at all.
        (f"{OPEN}grep x{CLOSE}", ..., ()),
        (f"{OPEN}{NS}<grep>x{NS}</grep>{CLOSE}", ..., ()),
        (f'{OPEN}{NS}<invoke name="">{NS}</invoke>{CLOSE}', ..., ()),
        (f'{OPEN}{NS}<invoke name="grep">{NS}<pattern>x{NS}</invoke>{CLOSE}', ..., ()),
        (f'{OPEN}{NS}<invoke name="grep">x{NS}</invoke>{CLOSE}', ..., ()),
        ('<tool_call><invoke name="grep"><pattern>x</pattern></invoke></tool_call>', ..., ()),
        (f"{NS}</tool_call>", ..., ()),
        # One good call, then a bad one: the good one counts, the bad one is text.
        (f"{OPEN}{_call()}nonsense{CLOSE}", f"nonsense{CLOSE}", ONE),
        (f'{OPEN}{_call()}\n{NS}<invoke name="gr', f'\n{NS}<invoke name="gr', ONE),
        # A bad block does not spoil a good one after it.
        (f"{OPEN}{NS}<oops>{OPEN}{_call()}{CLOSE}", f"{OPEN}{NS}<oops>", ONE),
    ],
)
def test_broken_calls_in_m3(text: str, content, calls: tuple[ToolCall, ...]) -> None:
    message = parse(text, "m3", [GREP])
    assert message.tool_calls == calls
    assert message.content == (text if content is ... else content)


M2_ONE = '<invoke name="grep">\n<parameter name="pattern">x</parameter>\n</invoke>'
M2_OPEN, M2_CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{M2_OPEN}\n{M2_ONE}\n{M2_ONE}\n{M2_CLOSE}", "", ONE * 2),
        (f"Look.\n\n{M2_OPEN}\n{M2_ONE}\n{M2_CLOSE}\n", "Look.\n", ONE),
        (f"{M2_OPEN}{M2_ONE}", "", ONE),
        (f'{M2_OPEN}<invoke name="grep"><parameter name="pattern">x</parameter>{M2_CLOSE}', "", ONE),
        (f"{M2_OPEN}{M2_ONE}</parameter></invoke>{M2_CLOSE}", "", ONE),
        (f'\n{M2_OPEN}<invoke name="grep"><parameter name="pattern">x</invoke>{M2_CLOSE}', ..., ()),
        (f"{M2_OPEN}{M2_CLOSE}", ..., ()),
        (f"\n{M2_OPEN}hello", ..., ()),
        (f"{M2_ONE}", ..., ()),
    ],
)
def test_broken_calls_in_m2(text: str, content, calls: tuple[ToolCall, ...]) -> None:
    message = parse(text, "m2", [GREP])
    assert message.tool_calls == calls
    assert message.content == (text if content is ... else content)


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
        ("m3", True, f"{OPEN}{_call()}{CLOSE}", f"{OPEN}{_call()}{CLOSE}", ""),
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


def test_an_argument_given_twice_is_not_a_call() -> None:
    text = f'{OPEN}{NS}<invoke name="grep">{NS}<p>1{NS}</p>{NS}<p>2{NS}</p>{NS}</invoke>{CLOSE}'
    assert parse(text, "m3", [GREP]) == Message("assistant", text)


@pytest.mark.parametrize(
    "value",
    [
        f"{NS}<a>" * 300 + "x" + f"{NS}</a>" * 300,
        f"{NS}<a>" + '{"b":' * 300 + "1" + "}" * 300 + f"{NS}</a>",
    ],
)
def test_arguments_nested_too_deeply_are_not_a_call(value: str) -> None:
    text = f'{OPEN}{NS}<invoke name="f">{value}{NS}</invoke>{CLOSE}'
    assert parse(text, "m3") == Message("assistant", text)
    assert _stream("m3", list(text)) == [Delta("content", text)]


def test_arguments_as_deep_as_allowed_are_a_call() -> None:
    value = f"{NS}<a>" * 100 + "x" + f"{NS}</a>" * 100
    text = f'{OPEN}{NS}<invoke name="f">{value}{NS}</invoke>{CLOSE}'
    (call,) = parse(text, "m3").tool_calls
    assert call_text(call, "m3") in text


def test_a_call_of_an_unknown_tool_is_a_call() -> None:
    text = f'{OPEN}{NS}<invoke name="rm">{NS}<path>/{NS}</path>{NS}</invoke>{CLOSE}'
    assert parse(text, "m3", [GREP]).tool_calls == (ToolCall("rm", {"path": "/"}),)


def test_time_grows_with_the_length_only() -> None:
    """20,000 hostile pieces, one push each: a parser that starts over at every tag would take minutes."""
    started = time.perf_counter()
    for piece in (f"{OPEN}{NS}<", f'{OPEN}{NS}<invoke name="f">{NS}<a>', "<mm:th", "]<]minimax[>"):
        parser = ChatParser("m3", [GREP])
        for _ in range(5000):
            parser.push(piece)
        parser.finish()
    assert time.perf_counter() - started < 10


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match="expected m2 or m3, got 'm1'"):
        ChatParser("m1")  # pyright: ignore[reportArgumentType]
