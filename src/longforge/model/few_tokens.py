"""The forward of a few tokens on a CPU: one compiled call instead of hundreds of operators.

Decoding runs a token or a few per sequence through the model; there torch spends ten times longer on starting
operators than on the arithmetic. This is the same forward (`CausalLM.forward_packed` and `MTPModule` are its
specification) with activations in fp32 whatever the weights' dtype. Each row is computed on its own in a
fixed order: its bits depend on its path's keys and its position, not on the other rows or their number.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from longforge.errors import InputError
from longforge.kernels.few_tokens.attention import CHUNK, SPANS
from longforge.kernels.few_tokens.rooms import pad, rooms_for
from longforge.kernels.few_tokens.step import (
    PHASES_OF_LAYER,
    PHASES_OF_STEP,
    head,
    head_alone,
    step,
    step_alone,
)
from longforge.kernels.numba_host import parallel_region
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM
from longforge.model.few_tokens_tables import tables

__all__ = ["FewTokens"]

DTYPES = (torch.float32, torch.bfloat16)
CONFIG: Any = numba.config  # its attributes come from the environment, unseen by type checkers
ALONE = 1 << 20
"""Multiply-adds up to which one thread works alone. On free cores two are faster from one row of the shipped
model on (`kernels/few_tokens/NOTES.md`); where cores are not free, `longforge serve` takes one thread."""


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
        self._weight_kind, self._cache_kind = _kind(model.dtype), _kind(held.dtype)
        self._head_kind = _kind(model.head_weight.dtype)
        self.refresh()
        sparse = 1 + max(int(n) for n in self._tables.layers["sparse_number"])
        layers = len(self._tables.layers)
        self._rooms = rooms_for(
            self._tables.model, max_tokens, model.config.experts, layers, sparse, CONFIG.NUMBA_NUM_THREADS
        )

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
        return self._step(-1, ids, (positions, paths, slots, page_table), np.empty((0, 0), np.float32))

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
        held = len(self.model.config.layers) + module
        if not 0 <= module < len(self.model.mtp) or held >= len(self.cache.k):
            raise InputError(
                f"module: one of the model's {len(self.model.mtp)} MTP modules with pages in the cache "
                f"expected, got {module}"
            )
        given = hidden.detach().float().contiguous().numpy()
        return self._step(module, ids, (positions, paths, slots, page_table), given)

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

    def _step(
        self, module: int, ids: np.ndarray, layout: tuple[np.ndarray, ...], hidden: np.ndarray
    ) -> Tensor:
        c, n = self.model.config, len(ids)
        if not 0 < n <= self.max_tokens:
            raise InputError(f"few tokens: from 1 to {self.max_tokens} tokens expected, got {n}")
        t = self._tables
        last = int(layout[0].max())
        blocks = last // c.block_size + 1
        # Spans grow with the prefix: the row with most of them need not be the last, see `spans_of`.
        spans = min(SPANS, -(-blocks // max(1, CHUNK // c.block_size)))
        ranked = c.has("sparse") and blocks > c.top_k_blocks
        maxima = np.empty((n, c.kv_heads, blocks if ranked else 0), np.float32)
        parts = np.empty(n * c.heads * spans * (c.head_dim + 2), np.float32)
        out = np.empty((n, c.hidden_size), np.float32)
        threads = self._threads(n * t.work)
        turns = np.zeros((PHASES_OF_LAYER * len(t.layers) + PHASES_OF_STEP, threads + 1, 8), np.int64)
        arguments = (
            module, t.model.ctypes.data, t.layers.ctypes.data, t.scales, self._weight_kind, self._cache_kind,
            ids, layout, hidden, self._rooms, spans, maxima, parts, turns, out,
        )  # fmt: skip
        if threads == 1:
            step_alone(*arguments)
        else:
            with parallel_region(n * t.work):
                step(threads, *arguments)
        return torch.from_numpy(out)

    @staticmethod
    def _threads(work: int) -> int:
        """Threads for this many multiply-adds."""
        return min(torch.get_num_threads(), CONFIG.NUMBA_NUM_THREADS) if work > ALONE else 1


def _kind(dtype: torch.dtype) -> np.ndarray:
    """An array of the element type that compiled code reads: bf16 as its bits."""
    return np.empty(0, np.uint16 if dtype == torch.bfloat16 else np.float32)
