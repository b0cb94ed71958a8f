"""Arguments are typed by the schema, and their text may hold what looks like tags."""

from typing import Any

import pytest

from longforge.chat import Delta, message_of, parse
from longforge.protocol import ToolCall
from small_chat import CLOSE, M2_CLOSE, M2_OPEN, NS, OPEN, WRITE, check_calls, merged, streamed


def _value(name: str, text: str, family: str) -> str:
    return (
        f"{NS}<{name}>{text}{NS}</{name}>"
        if family == "m3"
        else f'<parameter name="{name}">{text}</parameter>'
    )


def _whole(family: str, inside: str, name: str = "write") -> str:
    if family == "m3":
        return f'{OPEN}\n{NS}<invoke name="{name}">{inside}{NS}</invoke>\n{CLOSE}'
    return f'{M2_OPEN}\n<invoke name="{name}">\n{inside}\n</invoke>\n{M2_CLOSE}'


@pytest.mark.parametrize("family", ["m2", "m3"])
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("path", "", ""),
        ("path", "5", "5"),
        ("path", "  spaces ", "  spaces "),
        ("line", "5", 5),
        ("line", "five", "five"),
        ("line", "", ""),
        ("share", "2.50", 2.5),
        ("all", "true", True),
        ("all", "perhaps", "perhaps"),
        ("either", "5", 5),
        ("either", "a5", "a5"),
        ("content", "null", None),
        ("names", "", []),
        ("names", '["a", "b"]', ["a", "b"]),
        ("where", '{"file": "a"}', {"file": "a"}),
        ("where", "{file: a}", "{file: a}"),
        ("unknown", "true", True),
        ("unknown", "truth", "truth"),
        ("unknown", "", ""),
        ("unknown", '"quoted"', '"quoted"'),
        ("unknown", "[1, 2", "[1, 2"),
    ],
)
def test_values_are_typed_by_the_schema(family: Any, name: str, text: str, value: Any) -> None:
    written = _whole(family, _value(name, text, family))
    deltas = streamed(family, list(written), [WRITE])
    check_calls(deltas)
    assert deltas == streamed(family, [written], [WRITE])
    assert deltas[-1].call == ToolCall("write", {name: value})


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_a_call_without_arguments_has_an_empty_object(family: Any) -> None:
    deltas = streamed(family, list(_whole(family, "")), [WRITE])
    assert [delta.kind for delta in deltas] == ["call_start", "call_arguments", "call_end"]
    assert deltas[1].text == "{}"


@pytest.mark.parametrize(
    "text",
    [
        "</parameter>",
        "a</parameter>b",
        "<parameter>\n  <hello></hello>\n</parameter>\n",
        "</parameter></parameter>",
        "</invoke>",
        "a </invoke> b",
        f"Montréal {M2_CLOSE} café",
        f"{M2_CLOSE}</invoke>\n",
        f'{M2_OPEN}\n<invoke name="f">\n<parameter name="x">',
        "</parameter",
        "<",
    ],
)
def test_m2_text_may_hold_tags(text: str) -> None:
    inside = f'<parameter name="path">\n{text}\n</parameter>\n<parameter name="line">1</parameter>'
    written = _whole("m2", inside) + "\n" + _whole("m2", inside)
    deltas = streamed("m2", list(written), [WRITE])
    check_calls(deltas)
    assert deltas == streamed("m2", [written], [WRITE])
    assert message_of(deltas).tool_calls == (ToolCall("write", {"path": text, "line": 1}),) * 2


@pytest.mark.parametrize(
    "text",
    [
        NS,
        f"a {NS} b",
        f"{NS}<b>bold{NS}</b> text",
        f"{NS}</b>",
        f"{NS}</invoke>",
        f"a{NS}</invoke>{NS}<b>",
        f"a{CLOSE}",
        f"{NS}<",
        "]<]mini",
        "</path></invoke></parameter>",
    ],
)
def test_m3_text_may_hold_tags_and_the_marker(text: str) -> None:
    written = _whole("m3", _value("path", text, "m3")) * 2
    deltas = streamed("m3", list(written), [WRITE])
    check_calls(deltas)
    assert deltas == streamed("m3", [written], [WRITE])
    assert message_of(deltas).tool_calls == (ToolCall("write", {"path": text}),) * 2


@pytest.mark.parametrize(
    "text", [NS, f"{NS} x {NS}", f"{NS}<b>x{NS}</b>", f"a {NS}</invoke>", "]<]minimax[>"]
)
def test_the_marker_in_content_is_content(text: str) -> None:
    assert parse(text, "m3", [WRITE]).content == text
    assert merged(streamed("m3", list(text + OPEN + CLOSE))) == [Delta("content", text + OPEN + CLOSE)]


def test_the_first_opening_tag_may_be_missing_in_m3() -> None:
    inside = f"{NS}a <b>c</b>.txt{NS}</path>{NS}<content>Hello{NS}</content>"
    written = _whole("m3", inside) + "\n" + _whole("m3", _value("line", "1", "m3"))
    deltas = streamed("m3", list(written), [WRITE])
    assert deltas == streamed("m3", [written], [WRITE])
    calls = (
        ToolCall("write", {"path": "a <b>c</b>.txt", "content": "Hello"}),
        ToolCall("write", {"line": 1}),
    )
    assert message_of(deltas).tool_calls == calls and message_of(deltas).content == ""
