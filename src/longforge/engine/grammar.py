"""Which tokens a grammar allows next, as bit masks over the model's vocabulary."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import llguidance
import numpy as np

from longforge.chat import Tokenizer
from longforge.chat.schema_limits import check_limits
from longforge.errors import InputError
from longforge.protocol import Grammar

__all__ = ["Grammars", "Matcher"]

MAX_TEXT = 256 * 1024
"""Characters of a grammar."""
MAX_CACHED_TEXT = 16 * 1024 * 1024
"""Characters of all compiled grammars that are kept."""
MAX_CACHED = 256

# Some tens of milliseconds of work each: to compile a grammar, and to compute one mask. See the library's
# documentation of LLParserLimits for what the numbers count.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=500_000,
    step_max_items=100_000,
    max_items_in_row=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Grammars:
    """Compiles grammars for one tokenizer and one model. Every method may be called from any thread.

    vocab_size: the model's; ids that the tokenizer does not have are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if vocab_size < tokenizer.vocab_size:
            raise InputError(
                f"vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, got {vocab_size}"
            )
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(tokenizer.stop_ids)
        self._tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)),
            n_vocab=vocab_size,
            eos_token=list(tokenizer.stop_ids),
        )
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._cached_text = 0

    def start(self, grammar: Grammar) -> "Matcher":
        """A matcher that has seen nothing yet. The compiled grammar is kept for the next request.

        What JSON schemas embedded in Lark may be is up to who wrote the Lark (`chat/schema_limits.py`).

        Errors: InputError for a grammar that is invalid, uses what is not supported, or is too large.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return self._matcher(compiled)
        compiled = self._compile(grammar)
        with self._lock:
            matcher = self._matcher(compiled)
            self._keep(grammar, compiled)
        return matcher

    def _matcher(self, compiled: llguidance.LLMatcher) -> "Matcher":
        return Matcher(compiled.deep_copy(), self._vocab_size, self._stop_ids)

    def _keep(self, grammar: Grammar, compiled: llguidance.LLMatcher) -> None:
        if grammar not in self._compiled:
            self._cached_text += len(grammar.text)
        self._compiled[grammar] = compiled
        while len(self._compiled) > MAX_CACHED or self._cached_text > MAX_CACHED_TEXT:
            oldest, _ = self._compiled.popitem(last=False)
            self._cached_text -= len(oldest.text)

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if len(grammar.text) > MAX_TEXT:
            raise InputError(f"grammar: at most {MAX_TEXT} characters, got {len(grammar.text)}")
        try:
            matcher = llguidance.LLMatcher(self._tokens, _source(grammar), log_level=0, limits=_LIMITS)
        except ValueError as error:
            raise InputError(f"grammar: {_one_line(str(error))}") from error
        if not matcher.is_error():
            # Only the first mask shows some grammars to be too much work.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InputError(f"grammar: {_one_line(matcher.get_error())}")
        return matcher


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids

    def masks(self, drafts: Sequence[int] = ()) -> list[np.ndarray]:
        """Allowed tokens of the next place, then after each draft as long as the drafts are allowed and what
        follows them is not too much work.

        Bit t % 32 of word t // 32 stands for token t: uint32 [ceil(V / 32)] each, 1 to len(drafts) + 1 of
        them. A stop token is allowed when the answer is complete; nothing comes after it. The matcher stays
        where it is. Errors: InputError when the next place is too much work; the matcher is of no use then.
        """
        masks = [self._mask()]
        ahead = self.copy() if drafts else self  # of the two, too much work spoils only the copy
        for draft in drafts:
            if draft in self._stop_ids or not _has(masks[-1], draft):
                break
            try:
                ahead.accept(draft)
                masks.append(ahead._mask())
            except InputError:
                break
        return masks

    def accept(self, token: int) -> None:
        """Goes on by one token, which must be allowed. Errors: as `masks`, and InputError if it is not."""
        if not self._matcher.consume_token(token):
            raise InputError(f"grammar: after token {token}: {self._problem()}")

    def copy(self) -> "Matcher":
        """A matcher at the same place that goes its own way."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._stop_ids)

    def _mask(self) -> np.ndarray:
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        if self._matcher.is_error():
            raise InputError(f"grammar: {self._problem()}")
        # The library's masks have room for one id more than the vocabulary.
        mask = words[: (self._vocab_size + 31) // 32].copy()
        if self._vocab_size % 32:
            mask[-1] &= np.uint32((1 << self._vocab_size % 32) - 1)
        return mask

    def _problem(self) -> str:
        return _one_line(self._matcher.get_error())


class _Vocabulary:
    """A tokenizer as the library asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.tokens = tokenizer.pieces(vocab_size)
        self.special_token_ids = list(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8"), special=False)


def _source(grammar: Grammar) -> str:
    make = {
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "lark": llguidance.LLMatcher.grammar_from_lark,
    }
    if grammar.kind == "json_schema":
        try:
            schema = json.loads(grammar.text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"grammar: not a JSON schema ({_one_line(str(error))})") from error
        check_limits(schema, "grammar")
    return make[grammar.kind](grammar.text)


def _has(mask: np.ndarray, token: int) -> bool:
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def _one_line(message: str) -> str:
    """The part of the library's message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip(" ^")]
    return " ".join(lines)[:300] if lines else "unknown error"
