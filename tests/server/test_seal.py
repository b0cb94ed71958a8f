"""Marks on thinking: own text is known again, everything else is told apart and never refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longforge.server.seal import Echo, Seal, echo_headers

SEAL = Seal("small", b"secret")
TEXT = st.text(st.characters(), max_size=40)


@given(TEXT, st.integers(0, 10**6))
def test_a_marked_text_is_known_again(text: str, version: int):
    assert SEAL.read(text, SEAL.sign(text, version)) == Echo(text, "verified")
    assert SEAL.read("", SEAL.wrap(text, version)) == Echo(text, "verified")


@given(TEXT, TEXT.filter(bool))
def test_another_text_is_not(text: str, other: str):
    for mark in (SEAL.sign(text, 1), SEAL.wrap(text, 1)):
        assert SEAL.read(other, mark) == Echo(other, "verified" if other == text else "unverified")


@given(TEXT, TEXT)
def test_anything_may_come_as_a_mark(text: str, mark: str):
    for candidate in (mark, f"lf1.{mark}", f"lf1.1.{mark}", f"lf1.1.x.{mark}"):
        assert SEAL.read(text, candidate).verdict != "verified"


@pytest.mark.parametrize("other", [Seal("small", b"other"), Seal("large", b"secret"), Seal("small")])
def test_another_server_or_model_is_told_apart(other: Seal):
    assert SEAL.read("hm", other.sign("hm", 1)) == Echo("hm", "unverified")
    assert SEAL.read("", other.wrap("hm", 1)) == Echo(None, "unreadable")


def test_the_version_belongs_to_the_mark():
    assert SEAL.read("hm", SEAL.sign("hm", 1).replace(".1.", ".2.")).verdict == "unverified"


def test_the_header_counts_and_is_silent_where_nothing_came():
    assert echo_headers({}) == {}
    assert echo_headers({"verified": 2, "unreadable": 1}) == {
        "longforge-thinking": "verified=2, unverified=0, unreadable=1"
    }
