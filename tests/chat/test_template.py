"""What a conversation looks like as a prompt, and that nobody's text can change its shape."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.chat import Tokenizer, encode_prompt, parse, render, starts_in_thinking
from longforge.chat.tokens import SPECIAL_TOKENS
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec

GREP = ToolSpec("grep", "Find lines.", {"type": "object", "properties": {"pattern": {"type": "string"}}})
CALL = ToolCall("grep", {"pattern": "class Foo", "limit": 3})

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "First?"),
    Message("assistant", "One.", thinking="old thought"),
    Message("user", "Second?"),
    Message("assistant", "", thinking="new thought", tool_calls=(CALL, CALL)),
    Message("tool", "a.py:1"),
    Message("tool", "b.py:2"),
    Message("assistant", "Two.", thinking="last thought"),
]

M2 = """]~!b[]~b]system
Be brief.[e~[
]~b]user
First?[e~[
]~b]ai
One.[e~[
]~b]user
Second?[e~[
]~b]ai
<think>
new thought
</think>


<minimax:tool_call>
<invoke name="grep">
<parameter name="pattern">class Foo</parameter>
<parameter name="limit">3</parameter>
</invoke>
<invoke name="grep">
<parameter name="pattern">class Foo</parameter>
<parameter name="limit">3</parameter>
</invoke>
</minimax:tool_call>[e~[
]~b]tool
<response>a.py:1</response>
<response>b.py:2</response>[e~[
]~b]ai
<think>
last thought
</think>

Two.[e~[
]~b]ai
<think>
"""

NS = "]<]minimax[>["
M3 = f"""]~!b[]~b]system
Be brief.
Thinking: adaptive[e~[
]~b]user
First?[e~[
]~b]ai
One.[e~[
]~b]user
Second?[e~[
]~b]ai
<mm:think>new thought</mm:think>{NS}<tool_call>
{NS}<invoke name="grep">{NS}<pattern>class Foo{NS}</pattern>{NS}<limit>3{NS}</limit>{NS}</invoke>
{NS}<invoke name="grep">{NS}<pattern>class Foo{NS}</pattern>{NS}<limit>3{NS}</limit>{NS}</invoke>
{NS}</tool_call>[e~[
]~b]tool
<response>a.py:1</response>
<response>b.py:2</response>[e~[
]~b]ai
<mm:think>last thought</mm:think>Two.[e~[
]~b]ai
"""


@pytest.mark.parametrize(("family", "expected"), [("m2", M2), ("m3", M3)])
def test_a_whole_conversation_in_either_format(family, expected: str) -> None:
    """Thinking stays after the last user message and is dropped before it; tool answers share a message."""
    assert render(CONVERSATION, family=family) == expected


@pytest.mark.parametrize(
    ("family", "thinking", "end"),
    [
        ("m2", "adaptive", "]~b]ai\n<think>\n"),
        ("m2", "disabled", "]~b]ai\n<think>\n"),
        ("m3", "adaptive", "]~b]ai\n"),
        ("m3", "enabled", "]~b]ai\n<mm:think>"),
        ("m3", "disabled", "]~b]ai\n</mm:think>"),
    ],
)
def test_the_generation_prompt_of_each_mode(family, thinking, end: str) -> None:
    prompt = render([Message("user", "Hi")], family=family, thinking=thinking)
    without = render([Message("user", "Hi")], family=family, thinking=thinking, add_generation_prompt=False)
    assert prompt == without + end
    assert without.endswith("]~b]user\nHi[e~[\n")
    assert starts_in_thinking(family, thinking) == end.endswith(("<think>\n", "<mm:think>"))


@pytest.mark.parametrize("thinking", ["adaptive", "enabled", "disabled"])
def test_the_system_message_of_m3_states_the_mode_and_m2_knows_none(thinking) -> None:
    ask = [Message("system", "Be brief."), Message("user", "Hi")]
    system = render(ask, family="m3", thinking=thinking).split("[e~[")[0]
    assert system == f"]~!b[]~b]system\nBe brief.\nThinking: {thinking}"
    assert render(ask, family="m2", thinking=thinking) == render(ask, family="m2")


@pytest.mark.parametrize(
    ("family", "thinking", "answer", "thought", "content"),
    [
        ("m2", "adaptive", "why\n</think>\n\nso", "why", "so"),
        ("m2", "disabled", "why\n</think>\n\nso", "why", "so"),
        ("m2", "enabled", "cut off while thin", "cut off while thin", ""),
        ("m3", "adaptive", "<mm:think>why</mm:think>so", "why", "so"),
        ("m3", "adaptive", "</mm:think>so", "", "so"),
        ("m3", "adaptive", "so", None, "so"),
        ("m3", "enabled", "why</mm:think>so", "why", "so"),
        ("m3", "enabled", "cut off while thin", "cut off while thin", ""),
        ("m3", "disabled", "so", None, "so"),
        ("m3", "disabled", "</mm:think>so", "", "so"),
        ("m3", "disabled", "<mm:think>why</mm:think>so", "why", "so"),
    ],
)
def test_an_answer_is_read_as_its_prompt_left_the_model(family, thinking, answer, thought, content) -> None:
    """What a prompt spells has no say: only the mode tells whether the model starts in thinking."""
    parsed = parse(answer, family, thinking_open=starts_in_thinking(family, thinking))
    assert (parsed.thinking, parsed.content) == (thought, content)


@pytest.mark.parametrize(("family", "thinking"), [("m2", "adaptive"), ("m3", "adaptive"), ("m3", "enabled")])
def test_thinking_lives_through_the_tool_rounds_of_a_turn_and_no_longer(family, thinking) -> None:
    turn = [
        Message("user", "q"),
        Message("assistant", "", thinking="first thought", tool_calls=(CALL,)),
        Message("tool", "r"),
        Message("assistant", "", thinking="second thought", tool_calls=(CALL,)),
        Message("tool", "r"),
    ]
    during = render(turn, family=family, thinking=thinking)
    after = render([*turn, Message("assistant", "a"), Message("user", "b")], family=family, thinking=thinking)
    assert "first thought" in during and "second thought" in during
    assert "thought" not in after and after.count("class Foo") == 2


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_tools_stand_in_the_system_message_one_json_line_each(family) -> None:
    other = ToolSpec("read", 'Read a "file".')
    system = render([Message("user", "Hi")], [GREP, other], family=family).split("[e~[")[0].splitlines()
    lines = [line.removeprefix("<tool>").removesuffix("</tool>") for line in system]
    assert (
        '{"name":"grep","description":"Find lines.",'
        '"parameters":{"type":"object","properties":{"pattern":{"type":"string"}}}}'
    ) in lines
    assert any(line.startswith('{"name":"read","description":"Read a \\"file\\"."') for line in lines)
    assert not any("grep" in line for line in render([Message("user", "Hi")], family=family).splitlines())


def test_thinking_inside_m2_content_is_found() -> None:
    """Clients that keep thinking in content send it back that way."""
    split = [Message("user", "q"), Message("assistant", "<think>\nwhy\n</think>\n\nso")]
    apart = [Message("user", "q"), Message("assistant", "so", thinking="why")]
    assert render(split, family="m2") == render(apart, family="m2")


def test_a_skipped_thought_is_kept_as_the_model_wrote_it() -> None:
    asked = Message("user", "q")
    skipped, unsaid = Message("assistant", "a", thinking=""), Message("assistant", "a")
    assert render([asked, skipped]).endswith("]~b]ai\n</mm:think>a[e~[\n]~b]ai\n")
    assert render([asked, unsaid]).endswith("]~b]ai\na[e~[\n]~b]ai\n")
    assert "]~b]ai\n<mm:think></mm:think>a[e~[" in render([asked, skipped], thinking="enabled")
    assert "]~b]ai\n</mm:think>a[e~[" in render([asked, unsaid, asked], thinking="disabled")


def _filled(text: str) -> tuple[list[Message], list[ToolSpec]]:
    """A conversation with `text` wherever somebody's text can stand."""
    inner = {text: text, "list": [text, {"inner": text}]}
    messages = [
        Message("system", text),
        Message("user", text),
        Message("assistant", text, thinking=text, tool_calls=(ToolCall(text, inner),)),
        Message("tool", text),
        Message("system", text),
    ]
    return messages, [ToolSpec(text, text, {"type": "object", "properties": {text: {"description": text}}})]


@given(
    text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "\ue0000\ue001", "{{ x }}", "{%", "é", "a"]), min_size=1)
)
@settings(max_examples=60)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_no_text_becomes_a_marker(tokenizer: Tokenizer, family, text: list[str]) -> None:
    if family == "m2":  # a whole thinking block in M2's content is thinking, wherever it was spelled
        text = [part for part in text if part != "</think>"] or ["a"]
    markers = {tokenizer.token_id(name) for name in SPECIAL_TOKENS}
    messages, tools = _filled("".join(text))
    hostile = encode_prompt(tokenizer, messages, tools, family=family)
    harmless = encode_prompt(tokenizer, *_filled("harmless"), family=family)
    assert [i for i in hostile if i in markers] == [i for i in harmless if i in markers]
    assert tokenizer.decode(hostile) == render(messages, tools, family=family)


def test_a_tool_answer_that_nobody_asked_for_is_refused() -> None:
    ask, answer = Message("user", "q"), Message("tool", "r")
    for wrong in ([answer], [ask, answer], [ask, Message("assistant", "no call"), answer]):
        with pytest.raises(InputError, match="must follow an assistant message with tool_calls"):
            render(wrong)
    called = Message("assistant", tool_calls=(CALL,))
    with pytest.raises(InputError, match=r"messages\[3\]"):
        render([ask, called, ask, answer])
    assert render([ask, called, answer, answer]).count("]~b]tool") == 1
    assert render([ask, called, answer, called, answer]).count("]~b]tool") == 2


def test_what_does_not_exist_is_refused_in_one_line() -> None:
    ask = [Message("user", "q")]
    with pytest.raises(InputError, match="at least one message"):
        render([])
    with pytest.raises(InputError, match="expected m2 or m3, got 'm4'"):
        render(ask, family="m4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="got 'sometimes'"):
        render(ask, thinking="sometimes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"messages\[0\].role: .* got 'robot'"):
        render([replace(ask[0], role="robot")])  # pyright: ignore[reportArgumentType]
