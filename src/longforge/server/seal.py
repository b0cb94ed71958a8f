"""Thinking that leaves the server and comes back: a mark by which it is known again.

A mark is an HMAC-SHA256 over the model's name, the weights version and the text, with a secret that lives as
long as the process. It says that this server wrote exactly this text. A sealed text carries the text itself,
readable to anyone but not changeable; it is what the dialects hand out where thinking is asked for without
being shown.

What marks are for: thinking that comes without its text is taken only from a mark that holds; and a header of
the reply says how much of the conversation's thinking is this model's own, unchanged. Thinking in plain text
is taken whatever its mark says: agents change models in a conversation, and servers restart.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["ECHO_HEADER", "Echo", "Seal", "echo_headers"]

PREFIX = "lf1"
ECHO_HEADER = "longforge-thinking"
"""Reply header that counts the thinking of the conversation by what its marks say."""

Verdict = Literal["verified", "unverified", "unreadable"]


@dataclass(frozen=True)
class Echo:
    """Thinking as a client sent it back.

    verified: this server's own, unchanged. unverified: taken as it is, whoever wrote it. unreadable: sealed
    by somebody else, so its text (None) is not known and cannot be shown to the model.
    """

    text: str | None
    verdict: Verdict


class Seal:
    """Makes and reads marks of one served model."""

    def __init__(self, model_name: str, secret: bytes | None = None) -> None:
        self._model = model_name
        self._secret = secret or secrets.token_bytes(32)

    def sign(self, text: str, version: int) -> str:
        """The mark of a text that weights of `version` wrote."""
        # The length of the name keeps (name, text) pairs apart; lone surrogates are a client's to send.
        whole = f"{len(self._model)}:{self._model}:{version}:{text}".encode("utf-8", "surrogatepass")
        mac = hmac.new(self._secret, whole, hashlib.sha256).digest()
        return f"{PREFIX}.{version}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

    def wrap(self, text: str, version: int) -> str:
        """The mark and the text in it."""
        inner = base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode()
        return f"{self.sign(text, version)}.{inner}"

    def read(self, text: str, mark: str) -> Echo:
        """What came back: a text with its mark, or no text and a mark that carries it."""
        parts = mark.split(".")
        carried = _decoded(parts[3]) if len(parts) == 4 else None
        known = text or carried or ""
        if parts[0] == PREFIX and len(parts) >= 3 and parts[1].isdecimal() and len(parts[1]) < 20:
            expected = self.sign(known, int(parts[1]))
            given = ".".join(parts[:3])
            if hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode()):
                return Echo(known, "verified")
        if text or not mark:
            return Echo(text, "unverified")
        return Echo(None, "unreadable")


def echo_headers(echoes: Mapping[Verdict, int]) -> dict[str, str]:
    """The header for these counts; none where no thinking came back."""
    if not any(echoes.values()):
        return {}
    names: tuple[Verdict, ...] = ("verified", "unverified", "unreadable")
    return {ECHO_HEADER: ", ".join(f"{name}={echoes.get(name, 0)}" for name in names)}


def _decoded(inner: str) -> str | None:
    try:
        return base64.urlsafe_b64decode(inner).decode("utf-8", "surrogatepass")
    except (binascii.Error, ValueError):
        return None
