"""The choice among the processor's instructions, made at import: each case in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longforge.kernels.tiles.engine import CHOICE, TILE_ENGINE

HERE = Path(__file__).parent
FITS = """
import torch
from longforge.kernels.index_loss.cpu_tiles import fits as loss_fits
from longforge.kernels.select_blocks.cpu_tiles import fits as scan_fits
from longforge.kernels.tiles.attention import fits as attention_fits
from longforge.kernels.tiles.engine import TILE_ENGINE
q, index_q = torch.zeros(3, 8, 64).bfloat16(), torch.zeros(3, 2, 64).bfloat16()
pages, index_pages = torch.zeros(2, 32, 2, 64).bfloat16(), torch.zeros(2, 32, 64).bfloat16()
fits = [scan_fits(index_q, index_pages), scan_fits(index_q, index_pages.to(torch.int8))]
fits += [attention_fits(q, pages), loss_fits(index_q, q, pages)]
print(TILE_ENGINE, *fits)
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def test_none_turns_tiles_off_for_every_operation():
    assert last_line(run("-c", FITS, **{CHOICE: "none"})) == "None False False False False"


def test_the_best_there_is_takes_every_operation():
    assert last_line(run("-c", FITS, **{CHOICE: ""})).split()[1:] == [str(TILE_ENGINE is not None)] * 4


def test_an_unknown_choice_is_refused_in_one_line():
    done = run("-c", FITS, **{CHOICE: "neon"})
    assert done.returncode != 0
    assert (
        last_line(done) == f"longforge.errors.InputError: {CHOICE}: amx, avx512 or none expected, got 'neon'"
    )


@pytest.mark.parametrize("wish", ["amx", "avx512"])
def test_what_the_processor_lacks_is_refused_in_one_line(wish: str):
    """numba compiling for another processor stands for another processor."""
    done = run("-c", FITS, **{CHOICE: wish, "NUMBA_CPU_NAME": "generic"})
    assert done.returncode != 0
    wanted = f"{CHOICE}: none, what this processor has, expected, got {wish!r}"
    assert last_line(done) == f"longforge.errors.InputError: {wanted}"


@pytest.mark.skipif(TILE_ENGINE != "amx", reason="the other tests run on what there is")
def test_vectors_keep_the_same_promises_where_matrix_registers_are_the_choice():
    chosen = (
        "matrix_product or own_column or subnormal_numbers_count or least_normal or to_the_bit_as_the_whole"
        " or several_paths or decode or are_float64s and D128"
    )
    files = [str(HERE / name) for name in ("test_tiles.py", "test_cpu_tiles.py")]
    done = run("-m", "pytest", "-k", chosen, *files, **{CHOICE: "avx512"})
    assert done.returncode == 0, done.stdout
    assert "passed" in last_line(done) and "skipped" not in last_line(done)
