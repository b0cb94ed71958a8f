"""A call that was begun is ended with valid JSON; one that goes wrong spoils nothing after it."""

from typing import Any

import pytest

from longforge.chat import ChatParser, parse
from longforge.protocol import Message, ToolCall, ToolSpec
from small_chat import CLOSE, GREP, M2_CLOSE, M2_OPEN, NS, OPEN, check_calls, streamed

START, END = f'{NS}<invoke name="grep">', f"{NS}</invoke>"
X = f"{NS}<pattern>x{NS}</pattern>"
CALL = f"{START}{X}{END}"
ONE = (ToolCall("grep", {"pattern": "x"}),)
NONE = (ToolCall("grep", {}),)


def _check(family: Any, text: str, content: Any, calls: tuple[ToolCall, ...]) -> None:
    """`content` ... is the text itself. Character by character it is the same."""
    message = parse(text, family, [GREP])
    assert message.tool_calls == calls
    assert message.content == (text if content is ... else content)
    deltas = streamed(family, [text])
    check_calls(deltas)
    assert streamed(family, list(text)) == deltas


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{OPEN}\n{CALL}\n{CLOSE}", "", ONE),
        (f"Look.{OPEN}\n{CALL}\n{CALL}\n{CLOSE}\n\n", "Look.", ONE * 2),
        (f"{OPEN}{CALL}{CLOSE} more", "more", ONE),
        # The block is never closed: the calls in it are whole.
        (f"{OPEN}\n{CALL}\n", "", ONE),
        # The call is not closed, but something that ends it follows.
        (f"{OPEN}{START}{X}{CLOSE}", "", ONE),
        (f"{OPEN}{START}{X}{CALL}{CLOSE}", "", ONE * 2),
        (f"{OPEN}{START}{X}{OPEN}{CALL}{CLOSE}", "", ONE * 2),
        (f'{OPEN}{START}{X}{NS}<invoke name="">{CALL}{CLOSE}', f'{NS}<invoke name="">', ONE * 2),
        (f"{OPEN}{START}{CALL}{CLOSE}", "", NONE + ONE),
        # The argument is not closed either.
        (f"{OPEN}{START}{NS}<pattern>x{END}{CLOSE}", "", ONE),
        (f"{OPEN}{START}{NS}<pattern>x{END}{CALL}{CLOSE}", "", ONE * 2),
        (f"{OPEN}{START}{NS}<pattern>x{END}{CLOSE}so{OPEN}{CALL}{CLOSE}", "so", ONE * 2),
        (f"{OPEN}{START}{NS}<pattern>x{CLOSE}\n{OPEN}{CALL}{CLOSE}", "", ONE * 2),
        (f"{OPEN}{START}{NS}<pattern>x{CALL}{CLOSE}", "", ONE * 2),
        (f"{OPEN}{START}{NS}<pattern>x{NS}</wrong>{END}{CALL}{CLOSE}", "", ONE * 2),
        (f"{OPEN}{START}{NS}<pattern>x{NS}</wrong>oops{CALL}{CLOSE}", "oops", ONE * 2),
        # Closing tags of nothing.
        (f"{OPEN}{START}{X}</parameter>{END}{CLOSE}", "", ONE),
        (f"{OPEN}{START}</parameter>{NS}</parameter>{X}{END}{CLOSE}", "", ONE),
        (f"{OPEN}{CALL}{END}{CLOSE}", "", ONE),
        (f"{OPEN}{CALL}{END}</invoke>{CALL}{CLOSE}", "", ONE * 2),
        # The model leaves out the opening tag of the first argument, or a bracket of the call.
        (f"{OPEN}{START}{NS}x{NS}</pattern>{END}{CLOSE}", "", ONE),
        (f"{OPEN}{START}x{NS}</pattern>{END}{CALL}{CLOSE}", "", ONE * 2),
        (f'{OPEN}{NS}invoke name="grep">{X}{END}{CALL}{CLOSE}', "", ONE * 2),
        # Text inside a call that is none of its arguments.
        (f"{OPEN}{START}hm{X}{END}{CALL}{CLOSE}", "hm", ONE * 2),
        (f"{OPEN}{START}{X}hm{END}{CALL}{CLOSE}", "hm", ONE * 2),
        (f"{OPEN}{START}hm{END}{CLOSE}", "hm", NONE),
        (f"{OPEN}{START}{X}{NS}<pattern>y{NS}</pattern>{END}{CLOSE}", "y", ONE),
        (f"{OPEN}{START}{X}{NS}<pattern>{NS}<a>y{NS}</a>{NS}</pattern>{END}{CLOSE}", "y", ONE),
        # Cut off, with what came.
        (f"{OPEN}{START}{NS}<pattern>x", "", ONE),
        (f"{OPEN}{START}{NS}<pattern>x{NS}</patt", "", ONE),
        (f"{OPEN}{START}{X}", "", ONE),
        (f"{OPEN}{START}{X}{NS}</inv", "", ONE),
        (f"{OPEN}{START}{X}{NS}<limit>", "", ONE),
        (f"{OPEN}{START}", "", NONE),
        # Cut off before it is a call.
        (f"{OPEN}", ..., ()),
        (f'{OPEN}{NS}<invoke name="gr', ..., ()),
        (f'{OPEN}{CALL}\n{NS}<invoke name="gr', f'{NS}<invoke name="gr', ONE),
        # Not a call at all.
        (f"{OPEN}\n{CLOSE}", ..., ()),
        (f"{OPEN}grep x{CLOSE}", ..., ()),
        (f"{OPEN}{NS}<grep>x{NS}</grep>{CLOSE}", ..., ()),
        (f'{OPEN}{NS}<invoke name="">{NS}</invoke>{CLOSE}', ..., ()),
        ('<tool_call><invoke name="grep"><pattern>x</pattern></invoke></tool_call>', ..., ()),
        (f"{NS}</tool_call>", ..., ()),
        (CALL, ..., ()),
        # What is none beside good ones, before and after.
        (f"{OPEN}{CALL}nonsense{CLOSE}", "nonsense", ONE),
        (f"{OPEN}{CALL}nonsense {CALL}{CLOSE} so", "nonsense so", ONE * 2),
        (f"{OPEN}nonsense {CALL}{CLOSE}", f"{OPEN}nonsense ", ONE),
        (f"{OPEN}{NS}<oops>{OPEN}{CALL}{CLOSE}", f"{OPEN}{NS}<oops>", ONE),
    ],
)
def test_broken_calls_in_m3(text: str, content: Any, calls: tuple[ToolCall, ...]) -> None:
    _check("m3", text, content, calls)


M2_START = '<invoke name="grep">'
M2_X = '<parameter name="pattern">x</parameter>'
M2_CALL = f"{M2_START}\n{M2_X}\n</invoke>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{M2_OPEN}\n{M2_CALL}\n{M2_CALL}\n{M2_CLOSE}", "", ONE * 2),
        (f"Look.\n\n{M2_OPEN}\n{M2_CALL}\n{M2_CLOSE}\n", "Look.\n", ONE),
        (f"{M2_OPEN}{M2_CALL}", "", ONE),
        (f"{M2_OPEN}{M2_START}{M2_X}{M2_CLOSE}", "", ONE),
        (f"{M2_OPEN}{M2_START}{M2_X}{M2_CALL}", "", ONE * 2),
        (f"{M2_OPEN}{M2_START}{M2_X}\n{M2_OPEN}{M2_CALL}", "", ONE * 2),
        (f"{M2_OPEN}{M2_START}{M2_CALL}", "", NONE + ONE),
        (f"{M2_OPEN}{M2_CALL}</parameter></invoke>{M2_CLOSE}", "", ONE),
        # The argument is not closed.
        (f'\n{M2_OPEN}{M2_START}<parameter name="pattern">x</invoke>{M2_CLOSE}', "", ONE),
        (f'{M2_OPEN}{M2_START}<parameter name="pattern">x</invoke>{M2_CALL}{M2_CLOSE}', "", ONE * 2),
        (f'{M2_OPEN}{M2_START}<parameter name="pattern">x</invoke>hm{M2_CALL}', "hm", ONE * 2),
        (f'{M2_OPEN}{M2_START}<parameter name="pattern">x{M2_CLOSE}', "", ONE),
        (f'{M2_OPEN}{M2_START}<parameter name="pattern">x{M2_CLOSE}so\n{M2_OPEN}{M2_CALL}', "so", ONE * 2),
        # Text that is none of the arguments.
        (f"{M2_OPEN}{M2_START}hm{M2_X}</invoke>{M2_CALL}", "hm", ONE * 2),
        (f"{M2_OPEN}{M2_START}{M2_X}hm{M2_X}</invoke>{M2_CALL}", "hmx", ONE * 2),
        (f"{M2_OPEN}{M2_START}<pattern>x</pattern></invoke>", "<pattern>x</pattern>", NONE),
        # Cut off.
        (f"{M2_OPEN}{M2_START}", "", NONE),
        (f'{M2_OPEN}{M2_START}\n<parameter name="pattern">', "", NONE),
        (f'{M2_OPEN}{M2_START}\n<parameter name="pattern">x', "", ONE),
        (f'{M2_OPEN}{M2_START}\n<parameter name="pattern">x</para', "", ONE),
        (f"{M2_OPEN}{M2_START}\n{M2_X}\n</inv", "", ONE),
        # Not a call.
        (f"{M2_OPEN}{M2_CLOSE}", ..., ()),
        (f"\n{M2_OPEN}hello", ..., ()),
        (f'{M2_OPEN}<invoke name=""></invoke>{M2_CLOSE}', ..., ()),
        (f"{M2_CALL}", ..., ()),
        (f"{M2_OPEN}{M2_CALL}hm{M2_CALL}{M2_CLOSE}", "hm", ONE * 2),
    ],
)
def test_broken_calls_in_m2(text: str, content: Any, calls: tuple[ToolCall, ...]) -> None:
    _check("m2", text, content, calls)


EDIT = ToolSpec(
    "edit",
    "",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "line": {"type": "integer"},
            "where": {"type": "object", "properties": {"from": {"type": "integer"}}},
            "names": {"type": "array", "items": {"type": "string"}},
        },
    },
)


@pytest.mark.parametrize(
    ("inside", "arguments", "content"),
    [
        # An argument that is not closed before the next, which the schema knows.
        (f"{NS}<path>a{NS}<line>3{NS}</line>{END}", {"path": "a", "line": 3}, ""),
        (f"{NS}<where>{NS}<from>3{NS}</where>{NS}<line>3{NS}</line>", {"where": {"from": 3}, "line": 3}, ""),
        (f"{NS}<where>{NS}<from>3{NS}</from>{END}", {"where": {"from": 3}}, ""),
        (f"{NS}<names>{NS}<item>a{NS}</names>{NS}<line>3{NS}</line>", {"names": ["a"], "line": 3}, ""),
        (f"{NS}<names>{NS}<item>a{NS}</item>b{NS}</names>", {"names": ["a"]}, "b"),
        (f"{NS}<names>{NS}<item>a{NS}</item>{NS}<b>b{NS}</b>{NS}</names>", {"names": ["a", "b"]}, ""),
        (f"{NS}<line>3{END}", {"line": 3}, ""),
        # Cut off: half a number is no number, and nothing is nothing.
        (f"{NS}<line>3", {"line": "3"}, ""),
        (f"{NS}<path>a b", {"path": "a b"}, ""),
        (f"{NS}<line>", {}, ""),
        (f"{NS}<where>", {}, ""),
        (f"{NS}<where>{NS}<from>", {"where": {}}, ""),
        (f"{NS}<where>{NS}<from>1", {"where": {"from": "1"}}, ""),
        (f"{NS}<names>{NS}<item>a{NS}</item>{NS}<item>", {"names": ["a"]}, ""),
        (f"{NS}<new>{NS}<item>a{NS}</item>{NS}<item>", {"new": ["a"]}, ""),
        (f"{NS}<new>{NS}<item>1{NS}</item>{NS}<item>2", {"new": [1, "2"]}, ""),
    ],
)
def test_arguments_that_are_open_when_the_call_ends_are_closed(
    inside: str, arguments: dict[str, Any], content: str
) -> None:
    text = f'{OPEN}{NS}<invoke name="edit">{inside}'
    expected = Message("assistant", content, tool_calls=(ToolCall("edit", arguments),))
    assert parse(text, "m3", [EDIT]) == expected
    deltas = streamed("m3", list(text), [EDIT])
    check_calls(deltas)
    assert deltas == streamed("m3", [text], [EDIT])


@pytest.mark.parametrize(
    ("family", "text", "cut_off"),
    [
        ("m3", f"{OPEN}{START}{NS}<pattern>x", True),
        ("m3", f"{OPEN}{START}{X}", True),
        ("m3", f"{OPEN}{CALL}", False),
        ("m3", f"{OPEN}{START}{NS}<pattern>x{END}", False),
        ("m3", "text", False),
        ("m2", f"{M2_OPEN}{M2_START}{M2_X}", True),
        ("m2", f"{M2_OPEN}{M2_CALL}", False),
    ],
)
def test_a_parser_knows_that_the_text_ended_inside_a_call(family: Any, text: str, cut_off: bool) -> None:
    parser = ChatParser(family, [GREP])
    parser.push(text)
    assert not parser.cut_off
    parser.finish()
    assert parser.cut_off == cut_off


@pytest.mark.parametrize(
    ("value", "depth", "text"),
    [
        (f"{NS}<a>" * 300 + "x" + f"{NS}</a>" * 300, 100, f"{NS}<a>" * 200 + "x"),
        (f"{NS}<a>" * 99 + "[[0]]" + f"{NS}</a>" * 99, 99, "[[0]]"),
        (f"{NS}<a>" + '{"b":' * 300 + "1" + "}" * 300 + f"{NS}</a>", 1, '{"b":' * 300 + "1" + "}" * 300),
    ],
)
def test_arguments_nested_too_deeply_stay_text(value: str, depth: int, text: str) -> None:
    (call,) = parse(f'{OPEN}{NS}<invoke name="f">{value}{NS}</invoke>{CLOSE}', "m3").tool_calls
    inner: Any = call.arguments
    for _ in range(depth):
        inner = inner["a"]
    assert inner == text
    assert streamed("m3", list(f'{OPEN}{NS}<invoke name="f">{value}'))[-1].call == call


def test_arguments_as_deep_as_allowed_are_read() -> None:
    value = f"{NS}<a>" * 98 + "[[0]]" + f"{NS}</a>" * 98
    (call,) = parse(f'{OPEN}{NS}<invoke name="f">{value}{NS}</invoke>{CLOSE}', "m3").tool_calls
    inner: Any = call.arguments
    for _ in range(98):
        inner = inner["a"]
    assert inner == [[0]]


def test_a_call_of_an_unknown_tool_is_a_call() -> None:
    text = f'{OPEN}{NS}<invoke name="rm">{NS}<path>/{NS}</path>{NS}</invoke>{CLOSE}'
    assert parse(text, "m3", [GREP]).tool_calls == (ToolCall("rm", {"path": "/"}),)
