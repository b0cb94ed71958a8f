"""Compiles into the cache what serving needs, so that no request waits for it."""

from dataclasses import replace

import torch

from longforge.engine import Engine, GenerationRequest
from longforge.errors import InputError
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.model import CausalLM, LayerSpec
from longforge.model.presets import PRESETS
from longforge.protocol import SamplingParams
from longforge.server.placement import DTYPES

__all__ = ["compile_kernels"]

LAYERS = (
    LayerSpec("full", "dense"),
    LayerSpec("sliding", "moe"),
    LayerSpec("lightning", "moe"),
    LayerSpec("sparse", "moe"),
)
"""One layer of each kind."""
LONG = 700
"""Tokens of a prompt that takes more than one chunk, and whose sparse layers leave blocks out."""


def compile_kernels(dtype: str = "auto") -> None:
    """Runs a small model of every mixer through every kind of step: kernels are compiled per dtype, not per
    size.

    dtype: float32 or bfloat16; auto is each that serving may choose on this processor. InputError for
    another word.
    """
    if dtype == "auto":
        names = ["float32"] if TILE_ENGINE is None else ["float32", "bfloat16"]
    elif dtype in DTYPES:
        names = [dtype]
    else:
        raise InputError(f"dtype: expected auto, {' or '.join(DTYPES)}, got {dtype!r}")
    for name in names:
        _run(DTYPES[name])


def _run(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = replace(PRESETS["micro"], layers=LAYERS, window=64, mtp_modules=0)
    model = CausalLM(config).eval()
    if dtype is not torch.float32:
        _narrow(model, dtype)
    pages = 4 * -(-LONG // config.block_size)
    engine = Engine(model, pages=pages, max_running=4, max_batch_tokens=512)
    # A long prompt in chunks, beside it short ones that decode already; in the end one alone.
    for place, (prompt, answer) in enumerate(((8, 12), (9, 8), (LONG, 3))):
        engine.submit(
            GenerationRequest(f"{place}", (1,) * prompt, SamplingParams(max_tokens=answer, temperature=0.0))
        )
    while engine.has_work:
        engine.step()


def _narrow(model: CausalLM, dtype: torch.dtype) -> None:
    """As a checkpoint is read in a narrower dtype: routers and the head stay fp32."""
    wide = {id(weight) for router in model.routers() for weight in router.parameters()}
    wide.add(id(model.head_weight))
    for weight in model.parameters():
        if id(weight) not in wide:
            weight.data = weight.data.to(dtype)
