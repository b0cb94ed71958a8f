"""Our path, in parts, and every rival that this machine has, each as well as it can be run: dense attention,
and transformers' own MSA.

Rivals get the same keys and values with heads first and in order, which suits them best; making that copy is
not timed. In decode the query heads of a group are folded into query rows: with `enable_gqa` and one row
torch is many times slower on a CPU and would flatter us.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from longforge.bench.clock import Step
from longforge.bench.inputs import DTYPES, Inputs
from longforge.kernels.checks import backend_name
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.dense_attention.api import BACKENDS as DENSE_BACKENDS
from longforge.kernels.index_loss import index_loss
from longforge.kernels.select_blocks import (
    certified_select_blocks,
    cpu_tiles,
    lower_precision,
    select_blocks,
)
from longforge.kernels.select_blocks.api import CODED
from longforge.kernels.sparse_attention import sparse_attention

__all__ = ["INDEX_BYTES", "RIVALS", "Unusable", "our_parts", "selections"]


ROOM = {"cuda": 16 << 30, "cpu": 2 << 30}
"""Bytes that a rival may take for scores, masks and copies in one step."""
OLDEST_TRANSFORMERS = (5, 17)
"""The oldest whose selection and mask have been read and found the same as in the version the tests use."""


class Unusable(Exception):
    """This rival does not run here; the message says why."""


# --- ours ---------------------------------------------------------------------------------------------------


Select = Callable[[], Tensor]
"""Gives the selected blocks, int32 [n, Hkv, K]."""


def selections(i: Inputs) -> dict[str, Select]:
    """Index dtype -> selection over index keys that are kept in it."""
    name, top_k = next(name for name, dtype in DTYPES.items() if dtype == i.q.dtype), i.shape.top_k
    kinds: dict[str, Select] = {name: lambda: select_blocks(i.index_q, i.index_k_pages, i.layout, top_k)}
    code = {"cuda": "fp8", "cpu": "int8"}[i.device.type]
    if i.work.phase == "train" or backend_name("x", CODED, None, i.device, i.q.dtype) == "reference":
        return kinds
    low = lower_precision(i.index_k_pages, torch.float8_e4m3fn if code == "fp8" else torch.int8)
    kinds[code] = lambda: select_blocks(i.index_q, low.codes, i.layout, top_k, index_k_scales=low.scales)
    # Without tiles, or for the many queries of a chunk, certifying int8 codes on a CPU only costs time.
    if code == "fp8" or (i.work.phase == "decode" and cpu_tiles.fits(i.index_q, low.codes)):
        kinds[f"{code} certified"] = lambda: (
            certified_select_blocks(i.index_q, i.index_k_pages, low, i.layout, top_k).blocks
        )
    return kinds


INDEX_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "int8": 1, "fp8 certified": 1, "int8 certified": 1}
"""Bytes of one channel of an index key; of a certified selection, what it reads before it opens a block."""


def our_parts(i: Inputs, selection: Select) -> dict[str, Step]:
    """The whole step and its parts by themselves: "whole", "selection", "attention", and in training "index
    loss"; there the parts include their backward passes."""
    blocks = selection()
    if i.work.phase == "train":
        return {"selection": selection, **_training_parts(i, selection, blocks)}

    @torch.no_grad()
    def attention(chosen: Tensor = blocks) -> Tensor:
        return sparse_attention(i.q, i.k_pages, i.v_pages, chosen, i.layout)[0]

    return {"whole": lambda: attention(selection()), "selection": selection, "attention": attention}


def _training_parts(i: Inputs, selection: Select, blocks: Tensor) -> dict[str, Step]:
    q, k, v, index_q, index_k = (
        x.clone().requires_grad_() for x in (i.q, i.k_pages, i.v_pages, i.index_q, i.index_k_pages)
    )
    cotangent = torch.randn_like(i.q)

    def attend(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, k, v, chosen, i.layout)

    def loss(chosen: Tensor, lse: Tensor) -> Tensor:
        return index_loss(index_q, index_k, q, k, chosen, i.layout, lse=lse)

    sums = attend(blocks)[1]

    def whole() -> object:
        chosen = selection()
        out, lse = attend(chosen)
        divergence = loss(chosen, lse)
        return torch.autograd.grad(
            (out, divergence), (q, k, v, index_q, index_k), (cotangent, torch.ones_like(divergence))
        )

    return {
        "whole": whole,
        "attention": lambda: torch.autograd.grad(attend(blocks)[0], (q, k, v), cotangent),
        "index loss": lambda: torch.autograd.grad(loss(blocks, sums), (index_q, index_k)),
    }


# --- rivals -------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, i: Inputs) -> Step:
    if i.device.type != "cuda" and backend not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        raise Unusable("CUDA only")
    if backend == SDPBackend.MATH:
        _room_for_scores(i)
    if i.work.phase == "prefill" and i.work.first and backend == SDPBackend.CUDNN_ATTENTION:
        raise Unusable("no causal mask aligned to the last key")
    k, v = i.k_by_head, i.v_by_head
    if i.work.phase == "decode":
        rows = i.q.view(1, i.shape.groups, -1, i.shape.dim)
        step = _forward(lambda: F.scaled_dot_product_attention(rows, k, v))
    else:
        step = _causal_sdpa(i, k, v, gqa=i.device.type == "cuda")

    def under_this_backend() -> object:
        with sdpa_kernel(backend):
            return step()

    return under_this_backend


def _causal_sdpa(i: Inputs, k: Tensor, v: Tensor, gqa: bool) -> Step:
    """Causal attention of a chunk or of all tokens. `gqa`: the kernel itself shares keys among heads; where
    it does not, groups become the batch and keys are expanded without a copy."""
    groups, per_group = i.shape.groups, i.shape.heads // i.shape.groups
    q = i.q.transpose(0, 1)[None].contiguous()
    if not gqa:
        q = q[0].unflatten(0, (groups, per_group))
        k, v = k[0][:, None], v[0][:, None]
    mask: Any = causal_lower_right(i.work.queries, i.work.keys) if i.work.first else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not gqa:
            k, v = (x.expand(-1, per_group, -1, -1) for x in (k, v))
        options: dict[str, Any] = {"enable_gqa": True} if gqa else {}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)

    return _with_backward(i, attend, q, k, v)


def _with_backward(i: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> Step:
    """A step of the phase: forward, in training forward and backward."""
    if i.work.phase != "train":
        return _forward(lambda: attend(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    cotangent = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, cotangent)


def _forward(step: Callable[[], Any]) -> Step:
    return torch.no_grad()(step)


def _room_for_scores(i: Inputs) -> None:
    """The math backend holds all scores, and on a CPU wider copies of keys and values."""
    scores = 8 * i.shape.heads * i.work.queries * i.work.keys
    copies = 8 * i.shape.heads * i.shape.dim * i.work.keys
    _room(i, max(scores, copies), "scores or copies")


def _room(i: Inputs, needed: int, what: str) -> None:
    most = ROOM[i.device.type]
    if needed > most:
        raise Unusable(f"needs more than {most >> 30} GiB for {what}")


def _own_dense(i: Inputs) -> Step:
    chosen = backend_name("dense_attention", DENSE_BACKENDS, None, i.device, i.q.dtype)
    if chosen == "reference":
        raise Unusable("only the reference runs on this device")
    return _with_backward(i, lambda q, k, v: dense_attention(q, k, v, i.layout)[0], i.q, i.k_pages, i.v_pages)


def _flex(i: Inputs) -> Step:
    """Compiled FlexAttention: its split decode kernel for one query, a causal block mask otherwise."""
    if i.device.type != "cuda":
        raise Unusable("CUDA only: no backward and no decode kernel on a CPU")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    k, v = i.k_by_head, i.v_by_head
    q = i.q.transpose(0, 1)[None].contiguous()
    if i.work.phase == "decode":
        return _forward(lambda: compiled(q, k, v, enable_gqa=True))
    size, first = 128, i.work.first
    if first % size or i.work.queries % size:
        raise Unusable(f"chunks that start at multiples of {size} only")
    rows = torch.arange(i.work.queries // size, device=i.device, dtype=torch.int32)
    columns = torch.arange(i.work.keys // size, device=i.device, dtype=torch.int32)
    whole = rows + first // size  # full tiles before the diagonal one
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(rows)[None, None],
        torch.where(columns == 0, whole[:, None], columns)[None, None].int(),
        whole[None, None],
        columns.expand(len(rows), -1)[None, None].contiguous(),
        BLOCK_SIZE=size,
        mask_mod=lambda b, h, row, column: row + first >= column,
        seq_lengths=(i.work.queries, i.work.keys),
    )
    return _with_backward(i, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), q, k, v)


def _flash_infer(i: Inputs) -> Step:
    flashinfer = _package(i, "flashinfer")
    if i.work.phase == "train":
        raise Unusable("forward only")
    k, v = i.k_by_head[0], i.v_by_head[0]
    if i.work.phase == "decode":
        return _forward(
            lambda: flashinfer.single_decode_with_kv_cache(
                i.q[0], k, v, kv_layout="HND", use_tensor_cores=True
            )
        )
    return _forward(lambda: flashinfer.single_prefill_with_kv_cache(i.q, k, v, causal=True, kv_layout="HND"))


def _flash_attn(i: Inputs) -> Step:
    flash_attn = _package(i, "flash_attn")
    k, v = i.k_by_head.transpose(1, 2), i.v_by_head.transpose(1, 2)
    if i.work.phase == "decode":
        return _forward(lambda: flash_attn.flash_attn_with_kvcache(i.q[None], k, v, causal=True))
    return _with_backward(
        i, lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True), i.q[None], k, v
    )


def _package(i: Inputs, name: str) -> Any:
    if i.device.type != "cuda":
        raise Unusable("CUDA only")
    if find_spec(name) is None:
        raise Unusable("not installed")
    from importlib import import_module

    return import_module(name)


def _transformers_msa(i: Inputs) -> Step:
    """Selection and attention, forward only: see transformers_path.py for what is timed."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise Unusable("not installed") from None
    release = tuple(int(part) for part in found.split(".")[:2])
    if release < OLDEST_TRANSFORMERS:
        raise Unusable(f"transformers 5.17 or later expected, {found} found")
    if i.work.phase == "train":
        raise Unusable("forward only: it gives the index branch no gradient")
    shape, work, width = i.shape, i.work, i.q.itemsize
    pairs = work.queries * work.keys
    # Three boolean masks and two of the queries' dtype at once for each head, before that two sets of scores.
    masks = (3 + 2 * width) * shape.heads * pairs
    scores = 8 * shape.groups * pairs + 4 * shape.index_dim * work.keys
    # Keys and values are repeated for each head, but for a single query in newer versions.
    repeated = work.queries > 1 or release < (5, 23)
    copies = 2 * width * shape.heads * shape.dim * work.keys if repeated else 0
    _room(i, max(scores, masks + copies), "masks, scores or copies")
    from longforge.bench.transformers_path import TransformersMsa

    return TransformersMsa(i)


RIVALS: dict[str, Callable[[Inputs], Step]] = {
    "sdpa-flash": lambda i: _sdpa(SDPBackend.FLASH_ATTENTION, i),
    "sdpa-cudnn": lambda i: _sdpa(SDPBackend.CUDNN_ATTENTION, i),
    "sdpa-math": lambda i: _sdpa(SDPBackend.MATH, i),
    "flex": _flex,
    "flashinfer": _flash_infer,
    "flash-attn": _flash_attn,
    "longforge-dense": _own_dense,
    "transformers-msa": _transformers_msa,
}
"""Name -> what builds its step; a builder raises Unusable."""
