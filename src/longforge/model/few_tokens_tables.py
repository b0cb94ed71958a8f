"""A model as the tables that the compiled forward of a few tokens reads."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longforge.kernels.few_tokens.records import (
    DENSE,
    FULL,
    LAYER,
    MODEL,
    NORM_ALL,
    NORM_HEADS,
    NORM_NONE,
    SLIDING,
    SPARSE,
)
from longforge.kernels.few_tokens.rooms import pad
from longforge.kernels.few_tokens.tile_rows import fits_panels, in_panels
from longforge.kernels.rotary import frequencies
from longforge.model.attention import DenseAttention, SparseAttention
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM
from longforge.model.decoder import DecoderLayer
from longforge.model.experts import DenseFeedForward, MixtureOfExperts
from longforge.model.mtp import MTPModule
from longforge.model.norms import RMSNorm

__all__ = ["MOST_GUESSES", "Tables", "tables"]

MOST_GUESSES = 3
"""Passes of an MTP module that one step may take."""

MIXERS = {"full": FULL, "sliding": SLIDING, "sparse": SPARSE}
NORMS = {None: NORM_NONE, "per_head": NORM_HEADS, "per_layer": NORM_ALL}


class Tables(NamedTuple):
    """What one `refresh` reads of a model and a cache."""

    model: np.ndarray
    """MODEL [1]."""
    layers: np.ndarray
    """LAYER [layers + MTP modules with pages + MOST_GUESSES - 1 where there are any]: last comes the first
    module again, for its later passes of a step (`Rooms.experts` says why each has its own number)."""
    modules: int
    """MTP modules with pages."""
    scales: np.ndarray
    """fp32, the factors of all norms and the rotation's frequencies."""
    held: list[Tensor]
    """What addresses point to: kept alive."""
    work: int
    """Multiply-adds of a token in the decoder's matrices."""


ARENA = 1 << 28
"""Bytes of weights up to which they are copied side by side into huge pages: reading a small model's matrices
where they lie, from pages of 4 KiB here and there, takes a sixth longer."""


class _Writer:
    """Collects scales and addresses while the tables are filled."""

    def __init__(self, model: CausalLM) -> None:
        total = sum(w.numel() * w.element_size() for w in model.parameters())
        self.tiles = total <= ARENA and _fits_tiles(model)
        # numpy asks for huge pages.
        self.arena = torch.from_numpy(np.empty(total + (1 << 16) if total <= ARENA else 0, np.uint8))
        self._free = -self.arena.data_ptr() % 64
        self.scales: list[Tensor] = []
        self.held: list[Tensor] = []
        self._end = 0

    def scale(self, values: Tensor) -> int:
        place = self._end
        self.scales.append(values.detach().float())
        self._end += len(values)
        return place

    def norm(self, norm: RMSNorm) -> int:
        return self.scale(norm.scale())

    def tensor(self, tensor: Tensor | None) -> int:
        """Its address, in place."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous(), "the compiled forward reads tensors in place"
        self.held.append(tensor)
        return tensor.data_ptr()

    def matrix(self, weight: Tensor) -> int:
        """The address of a matrix [..., out, in], in panels for matrix tiles where the model fits these, else
        in rows."""
        weight = weight.detach()
        return self._copied(in_panels(weight)) if self.tiles else self.rows(weight)

    def rows(self, weight: Tensor) -> int:
        """The same in rows, padded where they have to be, for whatever multiplies it."""
        weight = weight.detach()
        missing = pad(weight.shape[-1]) - weight.shape[-1]
        padded = nn.functional.pad(weight, (0, missing)) if missing else weight.contiguous()
        return self._copied(padded)

    def _copied(self, matrix: Tensor) -> int:
        """Its address, in the arena while there is room."""
        size = matrix.numel() * matrix.element_size()
        if self._free + size > len(self.arena):
            return self.tensor(matrix)
        place = self.arena[self._free : self._free + size]
        place.copy_(matrix.view(-1).view(torch.uint8))
        self._free += -(-size // 64) * 64
        return self.tensor(place)


def _fits_tiles(model: CausalLM) -> bool:
    """Whether the layers' matrices are bf16 and of shapes for matrix tiles. Routers are read in rows."""
    others = (model.model.embed_tokens, *model.routers())
    read_in_rows = {id(model.head_weight), *(id(other.weight) for other in others)}
    matrices = [w for w in model.parameters() if w.dim() > 1 and id(w) not in read_in_rows]
    return all(w.dtype == torch.bfloat16 and fits_panels(*w.shape[-2:]) for w in matrices)


@torch.no_grad()
def tables(model: CausalLM, cache: KVCache) -> Tables:
    """Reads addresses and norms of a model and its cache."""
    c, write = model.config, _Writer(model)
    modules = [m for m in model.mtp if isinstance(m, MTPModule)]
    modules = modules[: max(0, len(cache.k) - len(c.layers))]
    layers = np.zeros(len(c.layers) + len(modules), LAYER)
    kinds = [*c.layers, *[c.mtp_spec] * len(modules)]
    blocks = [*model.model.layers, *[m.transformer_layer for m in modules]]
    for i, (spec, block) in enumerate(zip(kinds, blocks, strict=True)):
        assert isinstance(block, DecoderLayer)
        row = layers[i]
        row["number"] = i
        row["mixer"] = MIXERS[spec.mixer]
        row["window"] = c.window if spec.mixer == "sliding" else np.iinfo(np.int64).max // 2
        before = sum(kind.mixer == "sparse" for kind in kinds[:i])
        row["sparse_number"] = before if spec.mixer == "sparse" else -1
        _attention(row, block, i, cache, write)
        _feed_forward(row, block.mlp, write)
    for row, module in zip(layers[len(c.layers) :], modules, strict=True):
        row["eh_proj"] = write.matrix(module.eh_proj.weight)
        row["embed_norm"], row["hidden_norm"] = write.norm(module.enorm), write.norm(module.hnorm)
        row["final_norm"] = write.norm(module.final_layernorm)
    if modules:
        layers = np.concatenate([layers, *[layers[len(c.layers) : len(c.layers) + 1]] * (MOST_GUESSES - 1)])
        layers["number"] = np.arange(len(layers))
    record = _record(model, write)
    scales = torch.cat(write.scales).numpy()
    return Tables(record, layers, len(modules), scales, write.held, _work(model))


def _attention(row: np.void, block: DecoderLayer, layer: int, cache: KVCache, write: _Writer) -> None:
    mixer = block.self_attn
    assert isinstance(mixer, DenseAttention)
    row["input_norm"], row["post_norm"] = (
        write.norm(block.input_layernorm),
        write.norm(block.post_attention_layernorm),
    )
    row["qkv"], row["o"] = write.matrix(mixer.qkv_proj.weight), write.matrix(mixer.o_proj.weight)
    if mixer.config.qk_norm is not None:
        row["q_norm"], row["k_norm"] = write.norm(mixer.q_norm), write.norm(mixer.k_norm)
    row["k_cache"], row["v_cache"] = write.tensor(cache.k[layer]), write.tensor(cache.v[layer])
    if isinstance(mixer, SparseAttention):
        row["index"] = write.matrix(mixer.index_proj.weight)
        row["index_q_norm"] = write.norm(mixer.index_q_norm)
        row["index_k_norm"] = write.norm(mixer.index_k_norm)
        row["index_cache"] = write.tensor(cache.index_k[layer])


def _feed_forward(row: np.void, mlp: nn.Module, write: _Writer) -> None:
    row["experts"] = DENSE
    shared = mlp
    if isinstance(mlp, MixtureOfExperts):
        row["experts"] = len(mlp.gate.weight)
        row["router"] = write.rows(mlp.gate.weight.float())
        row["bias"] = write.tensor(mlp.gate.e_score_correction_bias)
        row["gate_up"] = write.matrix(mlp.experts.gate_up_proj)
        row["down"] = write.matrix(mlp.experts.down_proj)
        shared = mlp.shared_experts
    if isinstance(shared, DenseFeedForward):
        row["shared_size"] = shared.down_proj.weight.shape[1]
        row["shared_gate_up"] = write.matrix(shared.gate_up_proj.weight)
        row["shared_down"] = write.matrix(shared.down_proj.weight)


def _record(model: CausalLM, write: _Writer) -> np.ndarray:
    c, record = model.config, np.zeros(1, MODEL)
    swiglu = c.activation == "swiglu_oai"
    values = {
        "hidden": c.hidden_size,
        "vocab": c.vocab_size,
        "layers": len(c.layers),
        "heads": c.heads,
        "kv_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "half_rotary": c.rotary_dim // 2,
        "index_dim": c.index_dim,
        "block_size": c.block_size,
        "top_k": c.top_k_blocks,
        "chosen": c.experts_per_token,
        "expert_size": c.expert_size,
        "widest": max(c.expert_size, c.shared_expert_size, c.dense_size),
        "qk_norm": NORMS[c.qk_norm],
        "embed": write.tensor(model.model.embed_tokens.weight.detach()),
        "head": write.rows(model.head_weight),
        "final_norm": write.norm(model.model.norm),
        "frequencies": write.scale(
            frequencies(c.rotary_dim, c.rope_theta, torch.device("cpu"), torch.float32)
        ),
        "eps": c.norm_eps,
        "scale": c.head_dim**-0.5,
        "alpha": c.swiglu_alpha if swiglu else 1.0,
        "limit": c.swiglu_limit if swiglu else np.inf,
        "shift": 1.0 if swiglu else 0.0,
        "routed_scale": c.routed_scale,
        "tiles": write.tiles,
    }
    for name, value in values.items():
        record[name] = value
    return record


def _work(model: CausalLM) -> int:
    c = model.config
    total = 0
    for block in model.model.layers:
        for name, weight in block.named_parameters():
            if weight.dim() > 1:
                share = c.experts_per_token / c.experts if name.startswith("mlp.experts") else 1
                total += int(weight.numel() * share)
    return total
