"""The forward of a few tokens on a CPU: one compiled call instead of hundreds of operators.

Decoding runs a token or a few per sequence through the model; there torch spends ten times longer on starting
operators than on the arithmetic. This is the same forward (`CausalLM.forward_packed` and `MTPModule` are its
specification) with activations in fp32 whatever the weights' dtype. Each row is computed on its own in a
fixed order: its bits depend on its path's keys and its position, not on the other rows or their number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from longforge.errors import InputError
from longforge.kernels.few_tokens.heads import head, head_alone
from longforge.kernels.few_tokens.orders import Pass, order_of
from longforge.kernels.few_tokens.rooms import pad, places_of, rooms_for
from longforge.kernels.few_tokens.step import step, step_alone
from longforge.kernels.numba_host import SMALL, parallel_region
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM
from longforge.model.few_tokens_scratch import Scratch, sizes_of
from longforge.model.few_tokens_tables import MOST_GUESSES, tables

__all__ = ["FewTokens", "Heads"]

DTYPES = (torch.float32, torch.bfloat16)
CONFIG: Any = numba.config  # its attributes come from the environment, unseen by type checkers
ALONE = 1 << 20
"""Multiply-adds up to which one thread works alone. On free cores two are faster from one row of the shipped
model on (`kernels/few_tokens/NOTES.md`); where cores are not free, `longforge serve` takes one thread."""


_NO_HIDDEN = np.empty((0, 0), np.float32)


class Heads(NamedTuple):
    """What one pass of the MTP module is asked."""

    end: int
    """Its rows end here; they begin where those of the pass before end."""
    rows: list[tuple[int, int]]
    """Rows that guess a token, each with the later row that goes on from there, or -1."""


class FewTokens:
    """Steps of up to `max_tokens` tokens through a model over a cache, both used where they are.

    Weights are copied where they are small enough (`few_tokens_tables.ARENA`): after they changed, call
    `refresh()`. Not for two threads at once. A step holds Python's lock.
    """

    def __init__(self, model: CausalLM, cache: KVCache, max_tokens: int = 64) -> None:
        """Raises InputError for what `supports` refuses, and a cache of another dtype than fp32 or bf16."""
        if not self.supports(model):
            raise InputError(
                "few tokens: a CPU model in float32 or bfloat16 without Lightning layers expected, got "
                f"{model.dtype} on {model.device}"
            )
        held = next(k for k in cache.k if k is not None)
        if held.dtype not in DTYPES or held.device.type != "cpu":
            raise InputError(
                f"few tokens: a cache in float32 or bfloat16 on the CPU expected, got {held.dtype} on "
                f"{held.device}"
            )
        self.model, self.cache, self.max_tokens = model, cache, max_tokens
        self._sizes = sizes_of(model.config)
        self._scratch = Scratch(self._sizes)
        with parallel_region(SMALL + 1):  # starts the threads
            self._in_turns = numba.threading_layer() == "workqueue"
        self._weight_kind, self._cache_kind = _kind(model.dtype), _kind(held.dtype)
        self._head_kind = _kind(model.head_weight.dtype)
        self.refresh()
        sparse = 1 + max(int(n) for n in self._tables.layers["sparse_number"])
        layers = len(self._tables.layers)
        self._rooms = rooms_for(
            self._tables.model, max_tokens, model.config.experts, layers, sparse, CONFIG.NUMBA_NUM_THREADS
        )
        self._places = places_of(self._rooms)

    @staticmethod
    def supports(model: CausalLM) -> bool:
        """Whether this model can be run so: on a CPU, fp32 or bf16, no Lightning layers."""
        # Routers and the head may be wider than the rest.
        wide = {id(model.head_weight), *(id(router.weight) for router in model.routers())}
        return (
            not model.config.has("lightning")
            and model.dtype in DTYPES
            and all(w.device.type == "cpu" and w.dtype in DTYPES for w in model.parameters())
            and all(w.dtype == model.dtype or id(w) in wide for w in model.parameters())
        )

    def refresh(self) -> None:
        """Looks at the weights again: after any change of theirs, in place or not."""
        self._tables = tables(self.model, self.cache)
        self._model_at, self._layers_at = self._tables.model.ctypes.data, self._tables.layers.ctypes.data

    @property
    def selected(self) -> np.ndarray:
        """int32 [sparse layers (the MTP modules' last), max_tokens, Hkv, K]: what the last step's tokens
        selected, as `select_blocks` tells it. The next step writes over it."""
        return self._rooms.blocks

    def hidden(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        paths: np.ndarray,
        slots: np.ndarray,
        page_table: np.ndarray,
    ) -> Tensor:
        """ids int64 [N] and a layout as in `PackedLayout` (int64 [N], page_table int32 [P, M]) -> fp32 [N, d]
        after the final norm. Writes keys, values and index keys into the cache, as `forward_packed` does.

        Raises InputError for no token, or more than max_tokens.
        """
        rows = [x.tolist() for x in (ids, positions, paths, slots)]
        return self.step(rows, page_table, ())[0]

    def step(
        self, rows: Sequence[list[int]], page_table: np.ndarray, heads: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states fp32 [N, d], and logits fp32 [len(heads), V] of some of them, as one compiled call.

        rows: ids, positions, paths and slots; heads: different rows; otherwise like `hidden` and `logits`.
        The next `step`, or `guesses`, writes over the logits. Raises InputError for more heads than rows.
        """
        n = len(rows[0])
        if len(heads) > n:
            raise InputError(f"heads: up to {n} different rows expected, got {len(heads)}")
        passes = [(0, len(self.model.config.layers), 0, n, 0, len(heads))]
        heads_only = [(row, -1) for row in heads]
        return self._run(passes, rows, heads_only, n, n * self._tables.work, page_table, _NO_HIDDEN)[1:]

    def mtp(
        self,
        module: int,
        hidden: Tensor,
        ids: np.ndarray,
        positions: np.ndarray,
        paths: np.ndarray,
        slots: np.ndarray,
        page_table: np.ndarray,
    ) -> Tensor:
        """One MTP module: hidden fp32 [N, d] and the ids of the tokens one further -> fp32 [N, d].

        Its keys are in the cache's entries behind the layers'. Raises InputError where the model has no such
        module or the cache no entry for it.
        """
        layers = len(self.model.config.layers)
        self._check_module(module)
        rows, n = [x.tolist() for x in (ids, positions, paths, slots)], len(ids)
        _check_states(len(hidden), n)
        passes = [(layers + module, layers + module + 1, 0, n, 0, 0)]
        given = hidden.detach().float().contiguous().numpy()
        return self._run(passes, rows, [], n, n * self._tables.work // layers, page_table, given)[1]

    def guesses(
        self,
        before: Sequence[Tensor],
        rows: Sequence[list[int]],
        page_table: np.ndarray,
        passes: Sequence[Heads],
    ) -> list[list[int]]:
        """Tokens that the first MTP module guesses, of up to MOST_GUESSES passes as one compiled call.

        A pass takes adjacent rows; each of its heads is a row and the later row that goes on from there: with
        the guessed token as its id and the module's output as its hidden state. -1: none does.

        before: hidden states [., d] of the first pass's rows, one after the other; rows as in `step`, ids
        behind the first pass do not matter. Returns the tokens of each pass. Raises InputError for more
        passes, other than one hidden state for each row of the first, and where `mtp` has no first module.
        """
        self._check_module(0)
        if not 0 < len(passes) <= MOST_GUESSES:
            raise InputError(f"passes: from 1 to {MOST_GUESSES} expected, got {len(passes)}")
        _check_states(sum(map(len, before)), passes[0].end)
        layers, d, total = len(self.model.config.layers), self.model.config.hidden_size, len(rows[0])
        hidden, known = np.empty((total, d), np.float32), 0
        for states in before:
            hidden[known : known + len(states)] = states.float().numpy()
            known += len(states)
        table, heads, begin, most = list[Pass](), list[tuple[int, int]](), 0, 0
        for number, (end, more) in enumerate(passes):
            layer = layers if number == 0 else layers + self._tables.modules + number - 1
            table.append((layer, layer + 1, begin, end, len(heads), len(heads) + len(more)))
            heads += more
            begin, most = end, max(most, end - begin)
        work = total * self._tables.work // layers
        order, *_ = self._run(table, rows, heads, most, work, page_table, hidden)
        tokens = order[len(order) - len(heads) :].tolist()
        return [tokens[a:b] for *_, a, b in table]

    def likeliest(self, hidden: Tensor) -> list[int]:
        """The token of the highest logit for each row of hidden [B, d]; ties to the lower id."""
        return self._logits(hidden).argmax(axis=1).tolist()

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [B, V] of hidden [B, d], as `CausalLM.logits`."""
        return torch.from_numpy(self._logits(hidden))

    def _logits(self, hidden: Tensor) -> np.ndarray:
        m, vocab, d = self._tables, self.model.config.vocab_size, self.model.config.hidden_size
        x = hidden.detach().float().contiguous()
        if pad(d) > d:
            x = nn.functional.pad(x, (0, pad(d) - d))
        out = np.empty((len(hidden), vocab), np.float32)
        arguments = m.model.ctypes.data, self._head_kind, x.numpy(), np.arange(len(hidden)), out
        if self._threads(out.size * d) == 1:
            head_alone(*arguments)
        else:
            with parallel_region(out.size * d):
                head(max(1, min(4 * numba.get_num_threads(), vocab // 8)), *arguments)
        return out

    def _run(
        self,
        passes: Sequence[Pass],
        rows: Sequence[list[int]],
        heads: Sequence[tuple[int, int]],
        most: int,
        work: int,
        page_table: np.ndarray,
        hidden: np.ndarray,
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """The order as it was carried out (`kernels/few_tokens/orders.py`), hidden states and logits.

        most: rows of the largest pass; work: multiply-adds of all of them, without heads.
        """
        s = self._sizes
        if not 0 < most <= self.max_tokens:
            raise InputError(f"few tokens: from 1 to {self.max_tokens} tokens expected, got {most}")
        order, out = order_of(passes, rows, heads), np.empty((len(rows[0]), s.padded), np.float32)
        if s.padded > s.hidden:
            out[:] = 0
        work += len(heads) * s.vocab * s.hidden
        threads = self._threads(work)
        spans, maxima, parts = self._scratch.of(most, max(rows[1]) // s.block_size + 1)
        turns, (logits, told) = self._scratch.turns(passes, threads), self._scratch.logits(len(heads))
        arguments = (
            order, self._model_at, self._layers_at, self._tables.scales, self._weight_kind, self._cache_kind,
            self._head_kind, page_table, hidden, self._places, spans, maxima, parts, turns, out, logits,
        )  # fmt: skip
        if threads == 1:
            step_alone(*arguments)
        elif self._in_turns:
            with parallel_region(work):
                step(threads, *arguments)
        else:  # what parallel_region does beside this costs a twentieth of a step
            numba.set_num_threads(threads)
            step(threads, *arguments)
        states = torch.from_numpy(out)
        return order, states if s.padded == s.hidden else states[:, : s.hidden], told

    def _check_module(self, module: int) -> None:
        if not 0 <= module < self._tables.modules:
            raise InputError(
                f"module: one of the model's {len(self.model.mtp)} MTP modules with pages in the cache "
                f"expected, got {module}"
            )

    @staticmethod
    def _threads(work: int) -> int:
        """Threads for this many multiply-adds."""
        return min(torch.get_num_threads(), CONFIG.NUMBA_NUM_THREADS) if work > ALONE else 1


def _check_states(given: int, rows: int) -> None:
    if given != rows:  # compiled code would read on behind them
        raise InputError(f"hidden states: one for each of {rows} tokens expected, got {given}")


def _kind(dtype: torch.dtype) -> np.ndarray:
    """An array of the element type that compiled code reads: bf16 as its bits."""
    return np.empty(0, np.uint16 if dtype == torch.bfloat16 else np.float32)
