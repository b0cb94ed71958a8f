"""Rows times bf16 panels on matrix tiles: as exact as they say, and the same bits in any company."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from longforge.kernels.few_tokens.tile_rows import (
    fits_panels,
    in_panels,
    multiply_halves,
    scratch_for,
    split_rows,
)
from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles

with_tiles = pytest.mark.skipif(TILE_ENGINE != "amx", reason="this processor has no matrix tiles")


@compiled()
def multiply(settings, out, o, o_row, to, x, x_row, of, count, w, w0, rows, inner, halves, sums):
    begin_tiles(settings)
    split_rows(halves, x, x_row, of, count, inner)
    multiply_halves(out, o, o_row, to, count, halves, w, w0, rows, inner, sums)
    end_tiles()


def product(x: torch.Tensor, w: torch.Tensor, of: list[int], first: int, rows: int) -> torch.Tensor:
    """w[first : first + rows] times x[of], with marks around it that must stay."""
    panels = in_panels(w).view(torch.uint16).numpy().reshape(-1)
    halves, sums = scratch_for(1, len(of), x.shape[1])
    halves[:], sums[:] = 0x7FC0, np.nan  # what earlier products left behind
    out = np.full((len(of), rows + 5), 7.0, np.float32)
    to = np.arange(len(of))[::-1].copy()
    multiply(
        TILE_SETTINGS, out.reshape(-1), 3, rows + 5, to, x.numpy().reshape(-1), x.shape[1], np.array(of),
        len(of), panels, first * x.shape[1], rows, x.shape[1], halves[0], sums[0],
    )  # fmt: skip
    assert (out[:, :3] == 7).all() and (out[:, rows + 3 :] == 7).all()
    return torch.from_numpy(out[::-1, 3 : rows + 3].copy())


@with_tiles
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("rows,inner,first", [(16, 32, 0), (48, 96, 16), (80, 512, 32)])
def test_a_product_is_that_of_the_rows_but_for_2_to_the_minus_16(
    tokens: int, rows: int, inner: int, first: int
):
    torch.manual_seed(tokens)
    x, w = torch.randn(70, inner) * torch.logspace(-3, 3, inner), torch.randn(128, inner).bfloat16()
    of = torch.randperm(70)[:tokens].tolist()
    wanted = x[of].double() @ w[first : first + rows].double().T
    size = x[of].double().abs() @ w[first : first + rows].double().abs().T
    got = product(x, w, of, first, rows)
    assert float(((got - wanted).abs() / size).max()) < 2**-16


@with_tiles
def test_a_row_has_the_same_bits_alone_and_wherever_it_stands():
    torch.manual_seed(0)
    x, w = torch.randn(64, 192), torch.randn(64, 192).bfloat16()
    together = product(x, w, list(range(64)), 0, 64)
    for i in (0, 7, 8, 31, 63):
        assert torch.equal(product(x, w, [i], 0, 64)[0], together[i])
        assert torch.equal(product(x, w, [3, i, 5], 16, 32)[1], together[i, 16:48])


def test_shapes_that_do_not_fill_tiles_are_left_to_rows():
    assert fits_panels(48, 96) == (TILE_ENGINE == "amx")
    assert not fits_panels(40, 96) and not fits_panels(48, 80)


def test_panels_hold_sixteen_rows_with_neighbours_side_by_side():
    w = torch.arange(2 * 32 * 64).view(2, 32, 64)
    panels = in_panels(w)
    assert panels.shape == (2, 2, 32, 16, 2)
    assert int(panels[1, 1, 5, 3, 1]) == int(w[1, 16 + 3, 2 * 5 + 1])


WITHOUT_BF16 = """
import numpy as np
from longforge.kernels.few_tokens.tile_rows import split_rows
from longforge.kernels.tiles.engine import TILE_ENGINE
assert TILE_ENGINE is None
split_rows(np.zeros(64, np.uint16), np.ones(32, np.float32), 32, np.arange(1), 1, 32)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an x86 processor")
def test_a_processor_that_knows_no_bf16_can_compile_what_it_will_not_use():
    """Rounding to bf16 there would be a call of a function that nobody links: the process dies of it."""
    others = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "LONGFORGE_CPU_TILES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_BF16], env=os.environ | others, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
