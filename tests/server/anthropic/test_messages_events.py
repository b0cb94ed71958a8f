"""Blocks of an answer from deltas that a model may not give in such an order, and errors in the middle."""

import json
from typing import Any

import pytest

from longforge.chat.parser import Delta
from longforge.errors import ContextOverflow, EngineError, InputError, Overloaded
from longforge.protocol import StopReason, ToolCall
from longforge.server.anthropic.errors import told
from longforge.server.anthropic.events import (
    BlockEvents,
    Usage,
    Writer,
    message_of_events,
    start,
    stop_reason,
)
from longforge.server.seal import Seal
from longforge.server.wire_bytes import named_sse

SEAL = Seal("small", b"secret")
STARTED = start("small", Usage(5, 2, 1))
CALL = ToolCall("grep", {"limit": 3}, "t1")
CALLED = [
    Delta("call_start", call=ToolCall("grep", {}, "t1")),
    Delta("call_arguments", '{"limit"'),
    Delta("call_arguments", ": 3}"),
    Delta("call_end", call=CALL),
]


def blocks(deltas: list[Delta], **options: Any) -> list[dict[str, Any]]:
    machine = BlockEvents(Writer(SEAL, **options), version=4)
    events = [STARTED, *machine.push(deltas), *machine.finish()]
    open_block = None
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert open_block is None, "one block after the other"
            open_block = event["index"]
        else:
            assert event["index"] == open_block
            open_block = None if event["type"] == "content_block_stop" else open_block
    assert open_block is None
    return message_of_events(events)["content"]


def test_text_that_comes_inside_a_call_waits_for_its_end():
    deltas = [*CALLED[:2], Delta("content", "late"), *CALLED[2:], Delta("content", "r")]
    assert blocks(deltas) == [
        {"type": "tool_use", "id": "t1", "name": "grep", "input": {"limit": 3}},
        {"type": "text", "text": "later"},
    ]


def test_text_that_waits_for_a_call_that_never_ends_is_not_lost():
    cut = [Delta("call_start", call=CALL), Delta("content", "late")]
    assert blocks(cut)[1] == {"type": "text", "text": "late"}


def test_two_calls_are_two_blocks():
    again = [CALLED[0], Delta("call_arguments", "{}"), CALLED[3]]
    assert [block["input"] for block in blocks([*CALLED, *again])] == [{"limit": 3}, {}]


@pytest.mark.parametrize("deltas", [[], [Delta("thinking")]])
def test_nothing_at_all_is_one_empty_text(deltas: list[Delta]):
    assert blocks(deltas, drops_empty=True) == [{"type": "text", "text": ""}]


def test_a_skipped_thought_is_an_empty_block_where_thinking_was_asked_for():
    thought = blocks([Delta("thinking"), Delta("content", "a")])[0]
    assert thought["thinking"] == ""
    assert SEAL.read("", thought["signature"]).verdict == "verified"


def test_thinking_is_signed_with_the_version_that_wrote_it():
    thought = blocks([Delta("thinking", "h"), Delta("thinking", "m"), Delta("content", "a")])[0]
    assert thought == {"type": "thinking", "thinking": "hm", "signature": SEAL.sign("hm", 4)}


@pytest.mark.parametrize(
    ("reason", "completion", "stop", "calls", "word"),
    [
        (StopReason.STOP, 3, None, 0, "end_turn"),
        (StopReason.STOP, 3, None, 1, "tool_use"),
        (StopReason.STOP, 3, "x", 1, "stop_sequence"),
        (StopReason.LENGTH, 9, None, 1, "max_tokens"),
        (StopReason.LENGTH, 3, None, 0, "model_context_window_exceeded"),
    ],
)
def test_each_end_has_its_word(reason: StopReason, completion: int, stop: str | None, calls: int, word: str):
    event = stop_reason(reason, Usage(5, 2, completion), 9, stop, calls)
    assert event["delta"] == {"stop_reason": word, "stop_sequence": stop}
    assert event["usage"]["input_tokens"] == 3 and event["usage"]["cache_read_input_tokens"] == 2


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full"), 529, "overloaded_error"),
        (EngineError("broken"), 500, "api_error"),
        (InputError("no"), 400, "invalid_request_error"),
        (ContextOverflow(9, 5), 400, "invalid_request_error"),
    ],
)
def test_each_error_has_its_type(error: Any, status: int, kind: str):
    got, body = told(error)
    assert (got, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"]["message"] == str(error)


def test_half_a_surrogate_pair_in_arguments_stays_valid_json():
    event = {"type": "x", "text": "\ud800é"}
    data = named_sse(event).decode().split("data: ")[1]
    assert json.loads(data) == event
