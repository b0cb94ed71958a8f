"""What a grammar of an answer allows is what the parser reads as such an answer."""

import json
import random
from typing import Any

import jsonschema_rs
import pytest
from constrained import write
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import small_tokenizer

from longforge.chat import Tokenizer, parse, train_tokenizer
from longforge.chat.constraint import Constraint, answer_grammar
from longforge.chat.tokens import EOS, Family
from longforge.engine.grammar import Grammars
from longforge.errors import InputError
from longforge.protocol import Message, ToolSpec

TOKENIZERS = {
    "special tags": small_tokenizer(),
    "tags in plain text": train_tokenizer(["some <text> of </tags>"], 280, special_tokens=(EOS,)),
}
GRAMMARS = {name: Grammars(tokenizer, 321) for name, tokenizer in TOKENIZERS.items()}

NUMBERS = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "integer", "minimum": 3, "maximum": 12},
        {"type": "number", "exclusiveMinimum": -1.5},
    ]
)
STRINGS = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": r"^[a-c]\d{2}$"},
        {"type": "string", "pattern": "x|/y"},
    ]
)
SCALARS = st.one_of(
    NUMBERS,
    STRINGS,
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": ["string", "null"]},
            {"type": ["integer", "boolean", "null"]},
            {"type": ["string", "integer"]},
            {"enum": ["a", "null", "1", 5, True, "\n", "two words"]},
            {"const": "x<y"},
            {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
            {},
            {"type": "object"},
            {"type": "array"},
        ]
    ),
)
NAMES = st.sampled_from(["a", "b", "item", "path", "x y", "é"])


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], some: list[str]) -> dict[str, Any]:
        required = [name for name in properties if name in some]
        return {"type": "object", "properties": properties, "required": required}

    return st.builds(build, st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES))


def arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


VALUES = st.recursive(SCALARS, lambda inner: st.one_of(objects(inner), arrays(inner)), max_leaves=5)
PARAMETERS = objects(
    st.one_of(VALUES, st.builds(lambda part: {"anyOf": [part, {"type": "string"}]}, objects(SCALARS)))
)


def answer(
    constraint: Constraint,
    tools: list[ToolSpec],
    family: Family,
    thinking_open: bool,
    seed: int,
    kind: str = "special tags",
) -> Message | None:
    tokenizer: Tokenizer = TOKENIZERS[kind]
    grammar = answer_grammar(constraint, tools, family, thinking_open, tokenizer)
    assert grammar is not None
    tokens = write(GRAMMARS[kind].start(grammar), tokenizer, random.Random(seed))
    return None if tokens is None else parse(tokenizer.decode(tokens[:-1]), family, tools, thinking_open)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(PARAMETERS, min_size=1, max_size=2),
    st.sampled_from(["m2", "m3"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(0, 99),
)
def test_whatever_is_written_under_required_calls_is_read_as_calls_of_the_schemas(
    schemas: list[dict[str, Any]], family: Family, thinking_open: bool, parallel: bool, kind: str, seed: int
) -> None:
    tools = [ToolSpec(f"tool_{place}", "", schema) for place, schema in enumerate(schemas)]
    message = answer(Constraint("required", None, parallel), tools, family, thinking_open, seed, kind)
    if message is None:
        return
    assert message.content == ""
    assert len(message.tool_calls) >= 1
    assert parallel or len(message.tool_calls) == 1
    by_name = {tool.name: tool.parameters for tool in tools}
    for call in message.tool_calls:
        problems = list(jsonschema_rs.iter_errors(by_name[call.name], call.arguments))
        assert not problems, (call, problems)
        assert call.arguments.keys() <= by_name[call.name]["properties"].keys()
