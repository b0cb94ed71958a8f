"""Texts that are far too long cost the server nothing: the others' answers do not wait for them."""

from typing import Any

import pytest

from longforge.chat import Tokenizer
from longforge.errors import ContextOverflow
from small_model import small_tokenizer
from small_server import HTTP

HUGE = "Which file defines the class? " * 30_000


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"prompt": HUGE}),
        ("completions", {"prompt": ["a", HUGE]}),
        ("chat/completions", {"messages": [{"role": "user", "content": HUGE}]}),
        ("responses", {"input": HUGE}),
        ("messages", {"messages": [{"role": "user", "content": HUGE}], "max_tokens": 5}),
    ],
)
def test_a_text_that_cannot_fit_is_refused_without_being_encoded(
    served: Any, path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    encode, encoded = Tokenizer.encode, []

    def counted(self: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    reply = HTTP.post(f"{served.url}/v1/{path}", json={"model": "small"} | fields)
    assert reply.status_code == 400
    assert "at most 1024 tokens fit the context, got at least" in reply.json()["error"]["message"]
    assert max(encoded, default=0) < 1000
    assert served.loop.open_requests == 0


def test_what_might_fit_is_never_refused_by_its_length():
    tokenizer = small_tokenizer()
    for text in ("Which file", "字" * 40, "]<]minimax[>[" * 30, " " * 50, ""):
        tokenizer.check_fits([text], len(tokenizer.encode(text)))
    with pytest.raises(ContextOverflow, match="got at least"):
        tokenizer.check_fits(["a" * 10_000], 10)
