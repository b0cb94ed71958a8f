"""Long texts do not hold up the others' answers, and those that are far too long cost the server nothing."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from longforge.chat import Tokenizer
from longforge.errors import ContextOverflow
from small_model import small_tokenizer
from small_server import HTTP, Served

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


LONG = "Which file defines the class? " * 150
SHORT = "Which file?"


@pytest.mark.parametrize("text", [LONG, SHORT])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", lambda text: {"prompt": text, "max_tokens": 1}),
        ("chat/completions", lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        ("responses", lambda text: {"input": text, "max_output_tokens": 1}),
        ("messages", lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        ("messages/count_tokens", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ],
)
def test_only_short_texts_are_encoded_where_the_others_wait(
    served: Served, path: str, fields: Callable[[str], Any], text: str, monkeypatch: pytest.MonkeyPatch
):
    encode, threads = Tokenizer.encode, set[str]()

    def noted(self: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        threads.add(threading.current_thread().name)
        return encode(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    reply = HTTP.post(f"{served.url}/v1/{path}", json={"model": "small"} | fields(text))
    assert reply.status_code == 200 or "fit the context" in reply.text, reply.text
    assert threads and (threads == {"http"}) == (text is SHORT)


def test_a_long_text_has_the_ids_of_its_parts():
    tokenizer, part = small_tokenizer(), "Which file defines the class? "
    for special in (True, False):
        assert tokenizer.encode(part * 1000, special=special) == tokenizer.encode(part) * 1000


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer, text = small_tokenizer(), "Which file defines the class? " * 20_000
    assert any(longest_pause_while(lambda: tokenizer.encode(text)) < 0.5 for _ in range(5))


def longest_pause_while(work: Callable[[], object]) -> float:
    """The longest time in which another thread did not run, as a share of the time that `work` took."""
    ticks, done = list[float](), threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticking = threading.Thread(target=tick)
    ticking.start()
    begin = time.perf_counter()
    work()
    end = time.perf_counter()
    done.set()
    ticking.join()
    during = [begin, *(at for at in ticks if begin < at < end), end]
    return max(after - before for before, after in itertools.pairwise(during)) / (end - begin)


def test_what_might_fit_is_never_refused_by_its_length():
    tokenizer = small_tokenizer()
    for text in ("Which file", "字" * 40, "]<]minimax[>[" * 30, " " * 50, ""):
        tokenizer.check_fits([text], len(tokenizer.encode(text)))
    with pytest.raises(ContextOverflow, match="got at least"):
        tokenizer.check_fits(["a" * 10_000], 10)
