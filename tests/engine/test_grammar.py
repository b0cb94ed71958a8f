"""Masks of grammars: what they allow, how they follow drafts, what they refuse."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constrained import allowed, write
from longforge.chat import parse
from longforge.chat.constraint import Constraint, answer_grammar
from longforge.engine import grammar as engine_grammar
from longforge.engine.grammar import Grammars, Matcher
from longforge.engine.sampler import Row, sample
from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.protocol import Grammar, SamplingParams, ToolSpec
from small_model import small_model, small_tokenizer

TOKENIZER = small_tokenizer()
VOCABULARY = 321
GRAMMARS = Grammars(TOKENIZER, VOCABULARY)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b"],
}
EXAMPLES = (
    Grammar("json_schema", json.dumps(SCHEMA)),
    Grammar("regex", "(ab|a)*c?"),
    Grammar("lark", f'start: /[a-e]*/ <[{TOKENIZER.token_id("</think>")}]> "end"'),
)


def start(kind: Any, text: str) -> Matcher:
    return GRAMMARS.start(Grammar(kind, text))


def after(matcher: Matcher, text: str) -> list[int]:
    """What is allowed after `text`."""
    for token in TOKENIZER.encode(text):
        matcher.accept(token)
    return allowed(matcher.masks()[0])


def test_the_stop_token_is_allowed_exactly_when_the_answer_is_complete() -> None:
    stop = TOKENIZER.eos_id
    assert stop not in after(start("regex", "ab+"), "a")
    assert stop in after(start("regex", "ab+"), "ab")
    assert len(after(start("regex", "ab+"), "ab")) > 1
    assert after(start("regex", "ab"), "ab") == [stop]
    assert after(start("json_schema", json.dumps(SCHEMA)), '{"a":"x","b":[]}') == [stop]


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_text() -> None:
    choices = allowed(start("regex", "(?s:.*)").masks()[0])
    assert set(choices) & set(TOKENIZER.special_ids) == {TOKENIZER.eos_id}
    assert max(choices) < TOKENIZER.vocab_size


@pytest.mark.parametrize("vocabulary", [TOKENIZER.vocab_size, 320, 321, 2048])
def test_a_mask_has_a_bit_per_id_of_the_model(vocabulary: int) -> None:
    (mask,) = Grammars(TOKENIZER, vocabulary).start(EXAMPLES[0]).masks()
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-vocabulary // 32),)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(EXAMPLES), st.integers(0, 1000), st.integers(0, 4))
def test_masks_along_drafts_are_those_of_a_matcher_that_goes_there(
    grammar: Grammar, seed: int, wrong: int
) -> None:
    tokens = write(GRAMMARS.start(grammar), TOKENIZER, random.Random(seed), patience=5)
    if tokens is None:
        return
    matcher = GRAMMARS.start(grammar)
    twin = matcher.copy()
    place = 0
    while place < len(tokens) - 1:
        drafts = tokens[place : place + 4]
        bad = next(token for token in range(VOCABULARY) if token not in allowed(matcher.masks()[0]))
        if wrong < len(drafts):
            drafts[wrong:wrong] = [bad] if wrong == 0 else [TOKENIZER.eos_id + 1]
        before = matcher.masks()[0]
        masks = matcher.masks(drafts)
        step = twin.copy()
        expected = [step.masks()[0]]
        for draft in drafts:
            if draft == TOKENIZER.eos_id or draft not in allowed(expected[-1]):
                break
            step.accept(draft)
            expected.append(step.masks()[0])
        assert len(masks) == len(expected)
        assert all((mask == other).all() for mask, other in zip(masks, expected, strict=True))
        assert (matcher.masks()[0] == before).all()
        for each in (matcher, twin):
            each.accept(tokens[place])
        place += 1


def test_too_much_work_behind_a_draft_drops_the_draft_alone() -> None:
    matcher = start("lark", 'start: "x" DEEP | "y"\nDEEP: /.*a.{18}c/ & /.*b.{20}d/')
    x, y = TOKENIZER.encode("x")[0], TOKENIZER.encode("y")[0]
    with pytest.raises(InputError):
        after(matcher.copy(), "x")
    before = matcher.masks()[0]
    for drafts in ([x], [x, y], [x]):
        (mask,) = matcher.masks(drafts)
        assert (mask == before).all() and allowed(mask) == sorted((x, y))
    assert len(matcher.masks([y])) == 2
    matcher.accept(y)
    assert allowed(matcher.masks()[0]) == [TOKENIZER.eos_id]


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    with pytest.raises(InputError, match=r"grammar: after token"):
        start("regex", "ab").accept(TOKENIZER.encode("b")[0])


def test_copies_go_their_own_ways() -> None:
    matcher = start("regex", "ab|ac")
    matcher.accept(TOKENIZER.encode("a")[0])
    other = matcher.copy()
    other.accept(TOKENIZER.encode("b")[0])
    assert allowed(other.masks()[0]) == [TOKENIZER.eos_id]
    assert TOKENIZER.encode("c")[0] in allowed(matcher.masks()[0])


def test_every_thread_may_start_a_matcher() -> None:
    grammars = Grammars(TOKENIZER, VOCABULARY)

    def run(seed: int) -> list[int] | None:
        return write(grammars.start(EXAMPLES[seed % 3]), TOKENIZER, random.Random(seed), patience=5, limit=60)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(24))) == [run(seed) for seed in range(24)]


def test_the_cache_holds_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_grammar, "MAX_CACHED", 2)
    compiled: list[str] = []
    compile_one = Grammars._compile

    def counted(self: Grammars, grammar: Grammar) -> Any:
        compiled.append(grammar.text)
        return compile_one(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", counted)
    grammars = Grammars(TOKENIZER, VOCABULARY)
    for text in ("a", "b", "a", "c", "a", "b"):
        grammars.start(Grammar("regex", text))
    assert compiled == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        ("json_schema", '{"type": "frog"}', "frog"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"uniqueItems": true}', "uniqueItems"),
        ("json_schema", "{", "JSON"),
        ("json_schema", "[" * 100_000, "JSON"),
        ("json_schema", '{"type":"array","items":' * 500 + "{}" + "}" * 500, "deeper"),
        ("json_schema", '{"type": "integer", "multipleOf": 999983}', "multipleOf"),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', ""),
        ("json_schema", json.dumps({"enum": ["x" * 100] * 6000}), "262144"),
        (
            "json_schema",
            json.dumps({"patternProperties": {f"^{i}$": {} for i in range(300)}}),
            "patternProperties",
        ),
        ("json_schema", json.dumps({"anyOf": [{"const": i} for i in range(2000)]}), "anyOf"),
        ("regex", "(", "unclosed"),
        ("lark", "start: nothing", "nothing"),
        ("lark", "start: " + "(" * 50_000, "nested"),
    ],
)
def test_what_is_wrong_or_too_much_work_is_refused_in_one_line(kind: Any, text: str, named: str) -> None:
    with pytest.raises(InputError) as refused:
        start(kind, text)
    assert str(refused.value).startswith("grammar: ")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_model_must_have_room_for_the_tokenizer() -> None:
    with pytest.raises(InputError, match="vocab_size"):
        Grammars(TOKENIZER, TOKENIZER.vocab_size - 1)


def decode(matcher: Matcher, params: SamplingParams, limit: int) -> list[int]:
    """A random model's answer under masks, as an engine decodes it: one row of logits at a time."""
    model = small_model(max_positions=limit + 2)
    tokens = TOKENIZER.encode("Which file?")
    begin = len(tokens)
    while len(tokens) < limit and tokens[-1] != TOKENIZER.eos_id:
        with torch.no_grad():
            layout = PackedLayout.from_lengths([len(tokens)], model.config.block_size)
            logits = model.lm_head(model.forward_packed(torch.tensor(tokens), layout).hidden[-1:]).float()
        (mask,) = matcher.masks()
        bits = torch.from_numpy(
            np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.shape[1]].astype(bool)
        )
        if tokens[begin:] and bits[TOKENIZER.eos_id]:
            return [*tokens[begin:], TOKENIZER.eos_id]
        words = -(-logits.shape[1] // 32)
        (token,) = sample(logits, [Row(params, 7, len(tokens), mask=mask[:words])]).token_ids
        assert bits[token]
        matcher.accept(token)
        tokens.append(token)
    return tokens[begin:]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=1)])
def test_a_random_model_under_masks_calls_a_tool_as_its_schema_says(params: SamplingParams) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["file", "folder"]},
            "lines": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 99},
                "minItems": 1,
            },
            "deep": {"type": "boolean"},
        },
        "required": ["kind", "lines", "deep"],
    }
    schema["properties"]["lines"]["maxItems"] = 3
    tool = ToolSpec("look", "", schema)
    grammar = answer_grammar(
        Constraint("required", parallel=False), [tool], "m3", False, TOKENIZER, may_think=False
    )
    assert grammar is not None
    tokens = decode(GRAMMARS.start(grammar), params, limit=400)
    assert tokens[-1] == TOKENIZER.eos_id
    (call,) = parse(TOKENIZER.decode(tokens[:-1]), "m3", [tool]).tool_calls
    assert call.name == "look"
    assert not list(jsonschema_rs.iter_errors(schema, call.arguments))
