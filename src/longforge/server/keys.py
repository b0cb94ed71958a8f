"""API keys: who may ask, and whose cache a request may use."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longforge.errors import ConfigError
from longforge.server.service import Caller

__all__ = ["ADMIN", "ApiKeys"]

ADMIN = "admin"
"""Name of the key that may change the server's state."""

SHORTEST_KEY = 8


@dataclass(frozen=True)
class ApiKeys:
    """Keys by the name of their holder. Without any, everyone may ask.

    Only digests of keys are kept.
    """

    digests: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.digests)

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> "ApiKeys":
        """Keys as they are, by name. ConfigError for one that is too short or that two names share."""
        for name, key in keys.items():
            if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()):
                raise ConfigError(f"API key {name!r}: expected at least {SHORTEST_KEY} characters of ASCII")
        if len(set(keys.values())) < len(keys):
            raise ConfigError("API keys: expected a key of its own for each name, got the same key twice")
        return cls({name: _digest(key) for name, key in keys.items()})

    @classmethod
    def load(cls, file: Path | None, single: str | None = None) -> "ApiKeys":
        """Keys of a file with lines `name:key` (empty lines and lines that begin with # are skipped) and
        `single`, a key without a file, whose name is "default".

        Errors: ConfigError naming the line, never the key.
        """
        keys = {"default": single} if single else {}
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{file}: expected a text file of API keys ({type(error).__name__})"
                ) from error
            for number, line in enumerate(lines, 1):
                if not line.strip() or line.startswith("#"):
                    continue
                name, colon, key = (part.strip() for part in line.partition(":"))
                if not (name and colon and key):
                    raise ConfigError(f"{file} line {number}: expected name:key")
                if name in keys:
                    raise ConfigError(f"{file} line {number}: the name {name!r} has a key already")
                keys[name] = key
            if not keys:
                raise ConfigError(f"{file}: expected lines name:key, got none; without keys, name no file")
        return cls.of(keys)

    def caller(self, key: str) -> Caller | None:
        """Who holds a key, or None. The time it takes says nothing about the keys."""
        asked = _digest(key)
        found: str | None = None
        for name, digest in self.digests.items():
            if hmac.compare_digest(asked, digest):
                found = name
        return None if found is None else Caller(tenant=found, admin=found == ADMIN)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()
