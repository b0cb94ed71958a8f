"""A call is passed on while it is written: its name, strings as they come, brackets with their first tag."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.chat import ChatParser, Delta, message_of
from longforge.chat.format import call_text
from longforge.protocol import ToolCall
from small_chat import CLOSE, M2_CLOSE, M2_OPEN, NS, OPEN, TYPES, WRITE, check_calls, cut_at, streamed


class Stream:
    """A parser inside a call; `push` gives the JSON of its arguments that a piece makes certain."""

    def __init__(self, family: Any) -> None:
        self._parser = ChatParser(family, [WRITE])
        start = f"{OPEN}{NS}" if family == "m3" else M2_OPEN
        deltas = self._parser.push(start + '<invoke name="write">')
        assert deltas[0] == Delta("call_start", call=ToolCall("write", {})), "named at once"
        self.start = "".join(delta.text for delta in deltas)

    def push(self, text: str) -> str:
        deltas = self._parser.push(text)
        assert {delta.kind for delta in deltas} <= {"call_arguments"}
        return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("name", ["path", "content", "maybe", "unknown"])
def test_a_string_is_passed_on_as_it_comes_in_m3(name: str) -> None:
    stream = Stream("m3")
    assert stream.start == "{"
    assert stream.push(f"{NS}<{name}>") == ""
    assert stream.push("a «b» ") == f'"{name}": "a «b» '
    assert stream.push('"\n\\') == r"\"\n\\"
    assert stream.push("c]<]mini") == "c"
    assert stream.push("max[>[ <b>") == "]<]minimax[>[ <b>"
    assert stream.push(f"{NS}</{name}") == ""
    assert stream.push(">") == '"'
    assert stream.push(f"{NS}<line>3") == ""
    assert stream.push(f"{NS}</line>") == ', "line": 3'


@pytest.mark.parametrize("name", ["path", "content", "maybe", "unknown"])
def test_a_string_is_passed_on_as_it_comes_in_m2(name: str) -> None:
    stream = Stream("m2")
    assert stream.start == "{"
    assert stream.push(f'\n<parameter name="{name}">\n') == ""
    assert stream.push("a «b»\n") == f'"{name}": "a «b»'
    assert stream.push("\n") == r"\n", "the last newline may belong to the tag"
    assert stream.push("c <b>") == r"\nc <b>"
    assert stream.push("<para") == ""
    assert stream.push("meter>\n") == "<parameter>"
    assert stream.push("</parameter>") == "", "it may be the text's own"
    assert stream.push("\n<") == ""
    assert stream.push("/invok") == ""


def test_brackets_come_with_the_first_tag_inside() -> None:
    stream = Stream("m3")
    assert stream.push(f"{NS}<edits>\n") == ""
    assert stream.push(f"{NS}<item>") == '"edits": ['
    assert stream.push(f"{NS}<old>") == "{"
    assert stream.push("x = 1") == '"old": "x = 1'
    assert stream.push(f"{NS}</old>{NS}<at>12") == '"'
    assert stream.push(f"{NS}</at>{NS}</item>") == ', "at": 12}'
    assert stream.push(f"{NS}<item>{NS}<old>y") == ', {"old": "y'
    assert stream.push(f"{NS}</old>{NS}</item>{NS}</edits>") == '"}]'
    assert stream.push(f"{NS}<where>{NS}<file>a") == ', "where": {"file": "a'
    assert stream.push(f"{NS}</file>{NS}</where>{NS}<new>{NS}<k>v") == '"}, "new": {"k": "v'


def test_what_is_not_certain_waits_for_its_tag() -> None:
    stream = Stream("m3")
    assert stream.push(f"{NS}<either>12") == ""
    assert stream.push(" rooms") == ""
    assert stream.push(f"{NS}</either>") == '"either": "12 rooms"'
    assert stream.push(f"{NS}<content>nul") == ""
    assert stream.push(f"l{NS}</content>") == ', "content": null'
    assert stream.push(f"{NS}<maybe>null") == ""
    assert stream.push("able") == ', "maybe": "nullable'
    assert stream.push(f"{NS}</maybe>{NS}<new>{NS}<item>1{NS}</item>") == '"'
    assert stream.push(f"{NS}<name>x{NS}</name>{NS}</new>") == ', "new": {"item": 1, "name": "x"}'
    assert stream.push(f"{NS}<two>{NS}<item>1{NS}</item>{NS}</two>") == ', "two": [1]'


_TAGS = {
    "m3": [f"{NS}<{slash}{name}>" for name in [*TYPES, "item", "old", "at", "new"] for slash in ("", "/")]
    + [f'{NS}<invoke name="write">', f'{NS}invoke name="f">', f"{NS}</invoke>"] * 4
    + [OPEN, CLOSE, "</parameter>", NS, f"{NS}<", "<mm:think>", "</mm:think>"],
    "m2": [f'<parameter name="{name}">' for name in [*TYPES, "new"]]
    + ["</parameter>"] * 10
    + ['<invoke name="write">', '<invoke name="f">', "</invoke>", '<invoke name="">'] * 3
    + [M2_OPEN, M2_CLOSE, "<parameter>", "</", "</path>", "<think>", "</think>"],
}
_WORDS = [
    "\n",
    "\n\n",
    " ",
    "1",
    "12",
    "true",
    "nul",
    "null",
    "{",
    '{"a": 1}',
    "[",
    "2]",
    '"',
    "é\\",
    "a",
    "-",
]


@given(data=st.data(), cuts=st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=250)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_no_split_of_any_text_makes_a_difference(family: Any, data: st.DataObject, cuts: list[int]) -> None:
    """Tags of a typed tool in any order, values half and whole: calls stay valid however the text comes."""
    parts = data.draw(st.lists(st.sampled_from([*_TAGS[family], *_WORDS]), max_size=20))
    begun = {"m3": f'{OPEN}{NS}<invoke name="write">', "m2": f'{M2_OPEN}<invoke name="write">'}
    text = begun[family] + "".join(parts)
    at_once = streamed(family, [text], [WRITE])
    check_calls(at_once)
    assert streamed(family, cut_at(text, cuts), [WRITE]) == at_once
    assert streamed(family, list(text), [WRITE]) == at_once


ARGUMENTS = {
    "path": "src/«a».py",
    "content": "def f():\n\treturn 'x'\n",
    "line": 12,
    "all": True,
    "names": ["a", "", "c"],
    "edits": [{"old": "x", "at": 1}, {"old": "</b>", "at": 2}],
    "where": {"file": "f", "exact": False},
    "unknown": [{"k": "v"}, {"k": "w"}],
}


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_every_two_places_to_cut_a_call_give_the_same(family: Any) -> None:
    call = ToolCall("write", ARGUMENTS)
    block = [OPEN, CLOSE] if family == "m3" else [M2_OPEN, M2_CLOSE]
    text = f"So.\n{block[0]}\n{call_text(call, family)}\n{block[1]}"
    at_once = streamed(family, [text], [WRITE])
    assert at_once[-1].call == call and json.loads(at_once[-2].text) == ARGUMENTS
    for place in range(len(text)):
        assert streamed(family, cut_at(text, [place, place + 7]), [WRITE]) == at_once


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_every_prefix_of_a_call_is_a_whole_call_with_valid_arguments(family: Any) -> None:
    """A string argument never shrinks, and only the argument that was cut off may have another type."""
    text = (OPEN if family == "m3" else M2_OPEN) + call_text(ToolCall("write", ARGUMENTS), family)
    begun = text.index(">", text.index("invoke")) + 1
    for end in range(begun, len(text)):
        deltas = streamed(family, [text[:end]], [WRITE])
        check_calls(deltas)
        (call,) = message_of(deltas).tool_calls
        assert message_of(deltas).content == ""
        for name in list(call.arguments)[:-1]:
            assert call.arguments[name] == ARGUMENTS[name]
