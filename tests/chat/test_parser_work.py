"""The parser's work grows with the length of the text, however it comes and whatever it is."""

import time
from typing import Any

import pytest

from longforge.chat import ChatParser
from longforge.chat.scanner import Scanner
from small_chat import M2_OPEN, NS, OPEN, WRITE


def _work(family: Any, text: str, size: int) -> float:
    """Processor seconds for a text in pieces of `size`, the best of three."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        parser = ChatParser(family, [WRITE])
        for place in range(0, len(text), size):
            parser.push(text[place : place + size])
        parser.finish()
        best = min(best, time.process_time() - started)
    return best


M3_BEGUN, M2_BEGUN = f'{OPEN}{NS}<invoke name="write">', f'{M2_OPEN}<invoke name="write">'
STRING = '<parameter name="path">'


@pytest.mark.parametrize(
    ("family", "start", "repeated"),
    [
        ("m3", f"{M3_BEGUN}{NS}<path>", "word "),
        ("m3", f"{M3_BEGUN}{NS}<line>", "12345"),
        ("m3", M3_BEGUN, "</b> a"),
        ("m3", f"{M3_BEGUN}{NS}<path>x{NS}</invoke>", "word "),
        ("m3", f"{M3_BEGUN}{NS}<path>", f"{NS}</b>{NS}<b>"),
        ("m3", M3_BEGUN, f"{NS}<a>"),
        ("m3", f"{M3_BEGUN}{NS}<names>", f"{NS}<item>a{NS}</item>"),
        ("m3", OPEN, "  \n  "),
        ("m3", "", f"{OPEN}{NS}<"),
        ("m3", "", f'{NS}invoke name="f">'),
        ("m3", OPEN, f'{NS}<invoke name="f">{NS}<a>x{NS}</invoke>'),
        ("m3", "", "<mm:th"),
        ("m2", f"{M2_BEGUN}{STRING}", "\n\n\n\n"),
        ("m2", f"{M2_BEGUN}{STRING}x</parameter>", "word "),
        ("m2", f"{M2_BEGUN}{STRING}", "a</parameter>b"),
        ("m2", f"{M2_BEGUN}{STRING}", "</invoke> a"),
        ("m2", M2_BEGUN, "<parameter name='x'>"),
        ("m2", M2_BEGUN, f"{STRING}x</parameter>"),
    ],
)
@pytest.mark.parametrize("piece", [1, 10**9])
def test_time_grows_with_the_length_only(family: Any, start: str, repeated: str, piece: int) -> None:
    """Eight times the text takes no 64 times the time."""
    count = (3_000 if piece == 1 else 20_000) // len(repeated)
    short = _work(family, start + repeated * count, piece)
    assert _work(family, start + repeated * (8 * count), piece) < 24 * short


def test_a_long_argument_leaves_nothing_behind_that_is_searched_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Character by character: each is looked at a bounded number of times."""
    searched = 0
    push = Scanner.push

    def counted(scanner: Scanner, text: str) -> None:
        nonlocal searched
        push(scanner, text)
        searched += len(scanner.text)

    monkeypatch.setattr(Scanner, "push", counted)
    for begun in (M2_BEGUN + STRING, f"{M2_BEGUN}{STRING}x</parameter>", f"{M3_BEGUN}{NS}<path>"):
        searched = 0
        parser = ChatParser("m2" if begun.startswith(M2_OPEN) else "m3", [WRITE])
        parser.push(begun)
        for _ in range(2**17 // 16):
            for character in "a < b ]<]mini \n\n":
                parser.push(character)
        assert searched < 4 * 2**17
