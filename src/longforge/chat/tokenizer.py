"""Text to token ids and back: a byte-level BPE with M3's special tokens, in the `tokenizers` format."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longforge.chat.tokens import EOS, SPECIAL_TOKENS
from longforge.errors import CheckpointError, ContextOverflow, InputError
from longforge.observe import write_text_atomic

__all__ = ["LONG_TEXT", "StreamDecoder", "Tokenizer", "train_tokenizer"]

FILE_NAME = "tokenizer.json"

LONG_TEXT = 4096
"""Characters from which on a text is encoded without the interpreter's lock; below, it takes a millisecond or
two."""

# One alternative per kind of piece. A name is cut at its own seams only, and nothing outside it is ever glued
# to it, so `Foo` is the same ids at a line's start, after a space, after "(" and after ".". Angle brackets
# are atoms so that a value which begins or ends with punctuation cannot merge with the tag beside it.
PIECES = (
    r"\p{Lu}+(?!\p{Ll})"  # HTTP of HTTPServer
    r"|\p{Lu}?\p{Ll}+"  # Server, server
    r"|[\p{Lt}\p{Lm}\p{Lo}\p{M}]+"  # letters without case, and marks
    r"|\p{N}"  # one digit
    r"|_"
    r"|\s+"
    r"|</|[<>]"
    r"|[^\s\p{L}\p{M}\p{N}_<>]+"  # other punctuation, symbols
)


class Tokenizer:
    """A byte-level BPE and its special tokens.

    `decode(encode(text)) == text` for every text. Text that comes from outside is encoded with
    `special=False`: then a marker spelled in it becomes ordinary pieces and can never steer the conversation.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._with_specials = backend
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self._specials = {
            token.content: i
            for i, token in sorted(backend.get_added_tokens_decoder().items())
            if token.special
        }

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` from a model folder, or the file itself.

        Raises CheckpointError when it is missing, is not JSON or is not a byte-level tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise CheckpointError(f"{file}: no tokenizer there; a model folder needs a {FILE_NAME}")
        try:
            kind = (json.loads(file.read_text(encoding="utf-8")).get("decoder") or {}).get("type")
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise CheckpointError(
                f"{file}: not a tokenizer of the tokenizers library ({_one_line(error)})"
            ) from error
        if kind != "ByteLevel":
            raise CheckpointError(
                f"{file}: expected a byte-level tokenizer (decoder ByteLevel), got decoder {kind}"
            )
        return cls(backend)

    def save(self, directory: str | Path) -> Path:
        """Write `tokenizer.json` into `directory` (made if missing) and return its path."""
        file = Path(directory) / FILE_NAME
        write_text_atomic(file, self._with_specials.to_str(pretty=False))
        return file

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`. With `special=False` a special token's name in it is encoded as plain text."""
        backend = self._with_specials if special else self._plain
        try:
            if len(text) < LONG_TEXT:
                return backend.encode(text, add_special_tokens=False).ids
            # Unlike `encode` it lets other threads run meanwhile; and it leaves the offsets out.
            return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"text: expected valid unicode, got {_surrogate_or_type(text)}") from error

    def check_fits(self, texts: Iterable[str], context: int) -> None:
        """ContextOverflow for texts so long that they have more than `context` tokens, whatever they say.

        Encoding takes seconds for a few megabytes; this takes no time.
        """
        fewest = -(-sum(map(len, texts)) // self._longest)
        if fewest > context:
            raise ContextOverflow(fewest, context, at_least=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out.

        Bytes that are not UTF-8, and ids without a piece (a model's embedding table may be padded beyond the
        vocabulary), become U+FFFD.
        """
        return b"".join(map(self.piece_bytes, ids)).decode("utf-8", errors="replace")

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for."""
        return self._bytes.get(token_id, b"\xef\xbf\xbd")

    def token_id(self, name: str) -> int:
        """The id of a special token. Raises InputError when there is none of that name."""
        if name not in self._specials:
            known = " ".join(self._specials) or "none"
            raise InputError(f"special token {name!r}: not in this tokenizer, which has {known}")
        return self._specials[name]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens."""
        return tuple(self._specials.values())

    def pieces(self, size: int) -> list[bytes]:
        """The bytes of the ids from 0 to `size` - 1; empty for an id that stands for nothing."""
        return [self._bytes.get(token_id, b"") for token_id in range(size)]

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._with_specials.get_vocab_size(with_added_tokens=True)

    @property
    def eos_id(self) -> int:
        """The id that ends a turn."""
        return self.token_id(EOS)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which a generation stops."""
        return (self.eos_id,)

    @cached_property
    def _longest(self) -> int:
        """Most bytes of a token, hence most characters."""
        return max(map(len, self._bytes.values()))

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Bytes of every id. The BPE writes a byte as one printable character; added tokens are text."""
        byte_of = _byte_alphabet()
        added = self._with_specials.get_added_tokens_decoder()
        table = {i: token.content.encode("utf-8") for i, token in added.items()}
        for piece, i in self._with_specials.get_vocab(with_added_tokens=False).items():
            if i not in table:
                table[i] = bytes(byte_of[character] for character in piece)
        return table


class StreamDecoder:
    """Decode ids as they come, never half a character.

    All pushes and the flush together give exactly `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        return self._utf8.decode(b"".join(map(self._tokenizer.piece_bytes, ids)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, or nothing."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids; the special tokens take the last ones.

    The same texts in the same order give the same tokenizer. Special tokens that are spelled in `texts` are
    cut out first, so that no merge is learnt from them. Fewer ids come out when the texts have no more pairs
    to merge.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size: at least {smallest} (256 bytes and the special tokens), got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue] - a setter
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] - a setter
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        initial_alphabet=sorted(_byte_alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(_without(texts, special_tokens), trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in special_tokens]
    )
    return Tokenizer(backend)


def _without(texts: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    if not names:
        yield from texts
        return
    marker = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    for text in texts:
        yield from marker.split(text)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 is itself, the rest from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


def _surrogate_or_type(text: object) -> str:
    return "a lone surrogate (half of a character)" if isinstance(text, str) else type(text).__name__


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
