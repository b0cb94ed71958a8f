"""Text survives the way to ids and back, names are the same pieces everywhere, markers are markup only."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.chat import StreamDecoder, Tokenizer, train_tokenizer
from longforge.chat.tokens import SPECIAL_TOKENS
from longforge.errors import CheckpointError, InputError

# Any unicode text, and text in which markers and pieces of markers are likely.
texts = st.text() | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "]~", "b]", "<mm:", "é", "🎉", "Foo", "_", " ", "\n"])
).map("".join)


@given(text=texts, special=st.booleans())
@settings(max_examples=150)
def test_decoding_gives_back_every_text(tokenizer: Tokenizer, text: str, special: bool) -> None:
    assert tokenizer.decode(tokenizer.encode(text, special=special)) == text


@given(ids=st.lists(st.integers(0, 1100), max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=200)
def test_streamed_decoding_equals_decoding_at_once(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    """Random ids are mostly broken UTF-8, and some lie beyond the vocabulary."""
    decoder = StreamDecoder(tokenizer)
    borders = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    pushed = [decoder.push(ids[a:b]) for a, b in itertools.pairwise(borders)]
    assert "".join(pushed) + decoder.flush() == tokenizer.decode(ids)


def test_no_half_character_is_ever_streamed(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push([i]) for i in tokenizer.encode("né日🎉.")]
    assert [text for text in pushed if text] == ["n", "é", "日", "🎉", "."]


@pytest.mark.parametrize("name", ["Foo", "HTTPServer", "parse_known_args", "__init__", "Base64Codec", "日本"])
def test_a_name_is_the_same_pieces_wherever_it_stands(tokenizer: Tokenizer, name: str) -> None:
    befores = ["", " ", "(", ".", "\n", "    ", '"', "[", "<", ">", ": ", "::", "/"]
    afters = ["", " ", "(", ".", ")", "\n", '"', "]", "<", "</", ":\n", "/"]
    for before, after in itertools.product(befores, afters):
        parts = [tokenizer.encode(part) for part in (before, name, after)]
        assert tokenizer.encode(before + name + after) == [i for part in parts for i in part]


def test_a_camel_case_name_falls_into_its_words(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("HTTPServer") == tokenizer.encode("HTTP") + tokenizer.encode("Server")
    assert tokenizer.encode("v12") == tokenizer.encode("v") + tokenizer.encode("1") + tokenizer.encode("2")


def test_special_tokens_are_the_last_ids_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    first = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    assert tokenizer.vocab_size == 1024
    assert [tokenizer.token_id(name) for name in SPECIAL_TOKENS] == list(range(first, 1024))
    assert tokenizer.eos_id == tokenizer.token_id("[e~[")
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_marker_is_one_id_only_where_markers_are_allowed(tokenizer: Tokenizer, name: str) -> None:
    marker = tokenizer.token_id(name)
    assert tokenizer.encode(f"a{name}b") == [*tokenizer.encode("a"), marker, *tokenizer.encode("b")]
    assert marker not in tokenizer.encode(f"a{name}b", special=False)


def test_no_piece_is_learnt_from_a_marker_in_the_training_text() -> None:
    with_markers = train_tokenizer(["]~b]user\n[e~[\n" * 50 + "word"], 300)
    without = train_tokenizer(["user\n", "\n"] * 50 + ["word"], 300)
    assert with_markers.encode("]~b][e~[", special=False) == without.encode("]~b][e~[", special=False)


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    corpus = ["def f(x): return x\n" * 3, "class Foo(Bar):\n    pass\n"] * 4
    one, two = (train_tokenizer(corpus, 290) for _ in range(2))
    assert one.encode(corpus[1]) == two.encode(corpus[1])
    assert one.vocab_size == two.vocab_size <= 290


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    text = "]~b]user\nclass Foo(Bar):  # é\n[e~["
    file = tokenizer.save(tmp_path / "model")
    for place in (file, file.parent):
        loaded = Tokenizer.load(place)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text, special=False) == tokenizer.encode(text, special=False)
        assert loaded.vocab_size == tokenizer.vocab_size
    assert [entry.name for entry in file.parent.iterdir()] == ["tokenizer.json"]


def test_an_unknown_special_token_is_named_with_those_that_exist(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"special token '<eot>'.*\[e~\[") as caught:
        tokenizer.token_id("<eot>")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        tokenizer.token_id("a")  # a piece, but not a special token


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"model": {"type": "BPE"}})])
def test_a_broken_tokenizer_file_is_one_line(tmp_path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_file_is_one_line(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, tokenizer: Tokenizer) -> None:
    body = json.loads(tokenizer.save(tmp_path).read_text())
    body["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.load(tmp_path)


def test_half_a_character_from_json_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode(json.loads(r'"\ud83c"'))


def test_a_vocabulary_too_small_for_bytes_and_markers_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size"):
        train_tokenizer(["text"], 260)
