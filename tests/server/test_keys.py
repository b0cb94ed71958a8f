"""API keys: who holds which, and files that are wrong."""

from pathlib import Path

import pytest

from longforge.errors import ConfigError
from longforge.server.keys import ApiKeys


def test_a_key_tells_its_holder_and_only_admin_is_admin(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# people\n\nann: key-of-ann-1\nadmin:root-key-9\n")
    keys = ApiKeys.load(file, "single-key")
    for key, name, admin in [
        ("key-of-ann-1", "ann", False),
        ("root-key-9", "admin", True),
        ("single-key", "default", False),
    ]:
        caller = keys.caller(key)
        assert caller is not None and (caller.tenant, caller.admin) == (name, admin)
    for wrong in ("", "key-of-ann-", "key-of-ann-11", "ann", "KEY-OF-ANN-1", "schlüssel"):
        assert keys.caller(wrong) is None


def test_without_keys_there_are_none():
    assert not ApiKeys.load(None, None) and not ApiKeys.load(None, "")


def test_the_keys_themselves_are_not_kept():
    assert "key-of-ann-1" not in repr(ApiKeys.of({"ann": "key-of-ann-1"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ann key-of-ann-1", "line 1: expected name:key"),
        ("ann:", "line 1: expected name:key"),
        ("ann:key-of-ann-1\nann:key-of-ann-2", "line 2: the name 'ann' has a key already"),
        ("ann:key-of-ann-1\nbob:key-of-ann-1", "same key twice"),
        ("ann:short", "'ann': expected at least 8 characters"),
        ("ann:schlüssel-1", "'ann': expected at least 8 characters of ASCII"),
        ("# nobody\n", "expected lines name:key, got none"),
    ],
)
def test_a_wrong_file_is_one_line_without_the_key(tmp_path: Path, text: str, words: str):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        ApiKeys.load(file)
    message = str(caught.value)
    assert "\n" not in message and "key-of-ann" not in message and "schlüssel" not in message


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere: expected a text file of API keys"):
        ApiKeys.load(tmp_path / "nowhere")
