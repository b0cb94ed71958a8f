"""Where the tests of Triton backends run: under the interpreter on the CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch

from longforge.kernels.layout import PackedLayout
from longforge.kernels.msa_cases import Inputs

triton = pytest.importorskip("triton", reason="Triton is not installed")

__all__ = ["DEVICES", "need", "on"]

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def need(device: str) -> None:
    """Skips the test where kernels cannot run on this device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)")


def on(device: str, inputs: Inputs) -> Inputs:
    """The same inputs on a device."""
    layout = inputs.layout
    moved = PackedLayout(
        *(x.to(device) for x in (layout.positions, layout.paths, layout.slots, layout.page_table)),
        layout.block_size,
    )
    tensors = {name: getattr(inputs, name).to(device) for name in ("index_q", "index_k", "q", "k", "v")}
    return replace(inputs, layout=moved, **tensors)
