"""The language model: decoder, fp32 head, multi-token prediction, and the one forward over packed tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longforge.errors import ContextOverflow, InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.rotary import rotary_table
from longforge.model.cache import KVCache
from longforge.model.config import ModelConfig
from longforge.model.decoder import Decoder
from longforge.model.experts import Experts, Router
from longforge.model.mtp import MTPModule
from longforge.model.norms import RMSNorm
from longforge.model.step import Phase, Step

__all__ = ["CausalLM", "PackedOutput"]


class PackedOutput(NamedTuple):
    """What a forward over packed tokens gives."""

    hidden: Tensor
    """[N, d] after the final norm."""
    index_loss: Tensor | None
    """Scalar: the sum over sparse layers; None unless asked for, or where there is no sparse layer."""
    expert_loads: list[Tensor]
    """int64 [E] per expert layer: how many (token, slot) choices fell on each expert."""


class CausalLM(nn.Module):
    """A decoder of the M2 or M3 family with its output head.

    `version` counts published weights; whoever swaps them sets it. `backend` names the kernels' backend; None
    is the fastest for the device.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.version = 0
        self.backend: str | None = None
        self.source_config: dict[str, Any] | None = None
        """The config.json that the weights came with: what else it says is kept on saving."""
        self.model = Decoder(config)
        self.mtp = nn.ModuleList(MTPModule(config, i) for i in range(config.mtp_modules))
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        if not self.model.embed_tokens.weight.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws every weight anew: normal with `initializer_range`; norms at one, biases at zero."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(self.config.norm_start)
            elif isinstance(module, nn.Linear | nn.Embedding | Router | Experts):
                for weight in module.parameters(recurse=False):
                    weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits fp32 [B, T, V] of ids [B, T]. `lengths` [B]: rows are padded on the right (logits 0 there).

        Raises InputError for ids of another shape, an empty row or a length over T; ContextOverflow.
        """
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise InputError(f"input_ids: shape [batch, tokens] is needed, got {list(input_ids.shape)}")
        low, high = (int(t) for t in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"input_ids: ids from 0 to {self.config.vocab_size - 1} are needed, got {low} to {high}"
            )
        batch, tokens = input_ids.shape
        if tokens > self.config.max_positions:
            raise ContextOverflow(tokens, self.config.max_positions)
        sizes = [tokens] * batch if lengths is None else [int(n) for n in lengths]
        if len(sizes) != batch or not all(1 <= n <= tokens for n in sizes):
            raise InputError(f"lengths: {batch} numbers from 1 to {tokens} are needed, got {sizes}")
        layout = PackedLayout.from_lengths(sizes, self.config.block_size, input_ids.device)
        real = torch.arange(tokens) < torch.tensor(sizes)[:, None]
        real = real.to(input_ids.device)
        logits = self.logits(self.forward_packed(input_ids[real], layout, expert_loads=False).hidden)
        if lengths is None:
            return logits.view(batch, tokens, -1)
        return logits.new_zeros(batch, tokens, logits.shape[-1]).masked_scatter(real[..., None], logits)

    def forward_packed(
        self,
        ids: Tensor,
        layout: PackedLayout,
        cache: KVCache | None = None,
        *,
        phase: Phase = "sparse",
        index_loss: bool = False,
        index_weights: Tensor | None = None,
        expert_loads: bool = True,
        blocks: list[Tensor] | None = None,
    ) -> PackedOutput:
        """Hidden states of packed tokens (ids int64 [N]); the one forward of training, prefill and decode.

        With a cache, new keys and values are written to it in place at `layout.slots`, and each token attends
        to what its path's pages hold; call it under `torch.no_grad()`. Without one, the layout's own tokens
        fill the pages: a path starts at position 0, or behind whole pages of another path in the layout.
        phase          "warmup": sparse layers attend to the whole prefix, and so does the index loss
        index_loss     whether to compute it; `index_weights` [N] weigh its tokens
        expert_loads   whether to count what each expert gets
        blocks         gets the blocks that each sparse layer selects, [N, Hkv, K]
        """
        self._check(ids, layout, cache)
        step = self._step(layout, cache, phase, index_loss, index_weights, expert_loads)
        step.blocks = blocks
        hidden = self.model(ids, step)
        return _output(hidden, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [..., V] of hidden [..., d]. The head runs in fp32 (MiniMax-M1, arXiv 2506.13585:
        otherwise sampling and training disagree about probabilities); fp64 for an fp64 model.
        """
        weight = self.head_weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            if _multiplied_wide(hidden, weight):
                return torch.mm(hidden, weight.t(), out_dtype=wide)
            return F.linear(hidden.to(wide), weight.to(wide))

    def mtp_packed(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        layout: PackedLayout,
        module: int = 0,
        *,
        cache: KVCache | None = None,
        phase: Phase = "sparse",
        index_loss: bool = False,
        index_weights: Tensor | None = None,
    ) -> PackedOutput:
        """One MTP module over packed tokens: teacher-forced, for training; with a cache, for drafting (there
        the layout's positions are those of `next_ids`, see `KVCache`).

        hidden [N, d] of the main model (module 0) or of the module before; next_ids int64 [N] holds, for
        module i, the token i+1 further than each position (any valid id where the path has ended: give those
        rows no loss). `logits(output.hidden)` then predicts the token i+2 further.
        """
        if not 0 <= module < len(self.mtp):
            raise InputError(f"module: the model has {len(self.mtp)} MTP modules, got index {module}")
        self._check(next_ids, layout, cache)
        step = self._step(layout, cache, phase, index_loss, index_weights, count_loads=cache is None)
        return _output(self.mtp[module](hidden, self.model.embed_tokens(next_ids), step), step)

    def mtp_hidden(self, hidden: Tensor, next_ids: Tensor, layout: PackedLayout, module: int = 0) -> Tensor:
        """`mtp_packed` without its side outputs: [N, d]."""
        return self.mtp_packed(hidden, next_ids, layout, module).hidden

    @torch.no_grad()
    def selection_recall(self, ids: Tensor, layout: PackedLayout) -> list[float]:
        """The share of full attention's mass inside the selected blocks, per sparse layer (1 = nothing lost).

        Scores whole prefixes: a measurement, quadratic in length.
        """
        self._check(ids, layout, None)
        step = self._step(layout, None, "sparse", False, None, count_loads=False)
        step.measure_recall = True
        self.model(ids, step)
        return step.recalls

    def routers(self) -> list[Router]:
        """The routers of the decoder in order, then those of the MTP modules."""
        return [m for part in (self.model, self.mtp) for m in part.modules() if isinstance(m, Router)]

    @torch.no_grad()
    def update_expert_bias(self, loads: Sequence[Tensor], rate: float) -> None:
        """Moves each router's selection bias by the sign rule, b_e += rate * sign(mean load - load_e).

        loads: int64 [E] per router in the order of `routers()`; the MTP modules' may be left out.
        """
        routers = self.routers()
        decoder_only = sum(layer.feed_forward == "moe" for layer in self.config.layers)
        if len(loads) not in (decoder_only, len(routers)):
            raise InputError(f"loads: one per expert layer, {decoder_only}, is needed, got {len(loads)}")
        for router, load in zip(routers, loads, strict=False):
            router.update_bias(load, rate)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, d]: its own, or the embedding table where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, and of a cache that fits this model."""
        return self.model.embed_tokens.weight.dtype

    @staticmethod
    def from_pretrained(
        folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "CausalLM":
        """Reads a model folder in the released format (see `checkpoint.load_model`)."""
        from longforge.model.checkpoint import load_model

        return load_model(folder, dtype, device)

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Writes config.json and safetensors under the released names (see `checkpoint.save_model`)."""
        from longforge.model.checkpoint import save_model

        save_model(self, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)

    def _step(
        self,
        layout: PackedLayout,
        cache: KVCache | None,
        phase: Phase,
        index_loss: bool,
        index_weights: Tensor | None,
        count_loads: bool,
    ) -> Step:
        if phase not in ("sparse", "warmup"):
            raise InputError(f"phase: sparse or warmup is needed, got {phase}")
        c = self.config
        rotary = rotary_table(layout.positions, c.rotary_dim, c.rope_theta, self.dtype)
        return Step(
            layout, rotary, cache, phase, index_loss, index_weights, count_loads, backend=self.backend
        )

    def _check(self, ids: Tensor, layout: PackedLayout, cache: KVCache | None) -> None:
        if ids.shape != layout.positions.shape:
            raise InputError(f"ids: shape {list(layout.positions.shape)} is needed, got {list(ids.shape)}")
        if layout.block_size != self.config.block_size:
            raise InputError(
                f"layout: the model's block size {self.config.block_size} is needed, got {layout.block_size}"
            )
        if cache is not None and torch.is_grad_enabled():
            raise InputError(
                "cache: it is written in place and carries no gradient; call under torch.no_grad()"
            )


def _multiplied_wide(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a GPU multiplies both as they are, with products and sums in fp32: no copy of the head in fp32
    is made."""
    halves = hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16)
    return halves and hidden.is_cuda and hidden.dim() == 2 and not torch.is_grad_enabled()


def _output(hidden: Tensor, step: Step) -> PackedOutput:
    losses = step.index_losses
    return PackedOutput(hidden, torch.stack(losses).sum() if losses else None, step.expert_loads)
