"""Stop strings: the same cut for every split of the text."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from longforge.server.stops import StopStrings


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    watcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += watcher.push(piece)
        if watcher.found:
            return text, True
    return text + watcher.finish(), False


def plain_cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The obvious way: look again after each character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=5),
)
@example("xabcd", ["abcd", "bc"], [])
@example("aab", ["ab"], [2])
def test_any_split_equals_character_by_character(text: str, stops: list[str], cuts: list[int]):
    places = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert cut(pieces, stops) == plain_cut(text, stops)


def test_text_that_cannot_be_a_stop_is_not_held_back():
    watcher = StopStrings(["\nUser:"])
    assert watcher.push("hello\n") == "hello"
    assert watcher.push("Us") == ""
    assert watcher.push("a") == "\nUsa"
