"""Where the tests of Triton backends run: under the interpreter on the CPU, compiled on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import numpy
import pytest
import torch

from longforge.kernels.layout import PackedLayout
from longforge.kernels.msa_cases import Inputs

triton = pytest.importorskip("triton", reason="Triton is not installed")

__all__ = ["DEVICES", "build_problems", "need", "on"]

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def need(device: str) -> None:
    """Skips the test where kernels cannot run on this device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)")
    if device == "cpu" and version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter takes no tensor as the bound of a loop with numpy 2.4")


def version(module: ModuleType) -> tuple[int, ...]:
    """(major, minor)."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def on(device: str, inputs: Inputs) -> Inputs:
    """The same inputs on a device."""
    layout = inputs.layout
    moved = PackedLayout(
        *(x.to(device) for x in (layout.positions, layout.paths, layout.slots, layout.page_table)),
        layout.block_size,
    )
    tensors = {name: getattr(inputs, name).to(device) for name in ("index_q", "index_k", "q", "k", "v")}
    return replace(inputs, layout=moved, **tensors)


def build_problems(module: str) -> str:
    """What triton_build complains of in this module's specs; in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longforge.kernels.triton_build", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stderr if done.returncode else ""
