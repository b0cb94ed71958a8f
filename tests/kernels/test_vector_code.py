"""The compiled building blocks against numpy in float64, at sizes that leave remainders."""

import re
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from longforge.kernels import numba_host, vector_code

PRODUCTS = {"fused": vector_code.product, "in order": vector_code.product_in_order}
SIZES = [(1, 1, 1), (2, 3, 16), (7, 5, 37), (4, 33, 48), (3, 0, 20)]


def numbers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    "product", [vector_code.product, vector_code.product_in_order], ids=["any", "in order"]
)
@pytest.mark.parametrize("rows,inner,columns", SIZES)
@pytest.mark.parametrize("add", [False, True])
def test_product_is_the_matrix_product(product, rows: int, inner: int, columns: int, add: bool):
    a, b, out = numbers(rows, inner), numbers(inner, columns), numbers(rows, columns)
    wanted = a.astype(np.float64) @ b + (out if add else 0)
    flat = out.reshape(-1)
    product(
        flat, 0, columns, a.reshape(-1), 0, inner, 1, b.reshape(-1), 0, columns, rows, inner, columns, add
    )  # fmt: skip
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows,columns", [(1, 1), (16, 16), (37, 18), (5, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transpose_moves_every_number(rows: int, columns: int, dtype: torch.dtype):
    a = torch.from_numpy(numbers(rows, columns)).to(dtype)
    out = np.zeros(columns * rows, np.float32)
    vector_code.transpose(out, 0, rows, numba_host.raw_array(a).reshape(-1), 0, columns, rows, columns)
    assert np.array_equal(out.reshape(columns, rows), a.float().numpy().T)


def test_exponential_is_right_to_the_last_bits_and_hides_no_nan():
    x = -np.concatenate([np.linspace(0, 86, 10_001), [86.9, 88.0, 1e4, np.inf]]).astype(np.float32)
    y = x.copy()
    vector_code.exponentials(y, 0, len(y), np.float32(0))
    exact = np.exp(x.astype(np.float64))
    kept = x > -87
    assert float(np.max(np.abs(y - exact)[kept] / exact[kept])) < 1.5e-7
    assert not y[~kept].any()
    nan = np.full(20, np.nan, np.float32)
    vector_code.exponentials(nan, 0, 20, np.float32(0))
    assert np.isnan(nan).all()


def test_compiling_leaves_the_users_own_numba_cache_alone():
    before = numba_host.CONFIG.CACHE_DIR

    @numba_host.compiled()
    def twice(x):
        return 2 * x

    assert twice(3) == 6
    assert before == numba_host.CONFIG.CACHE_DIR
    assert numba.njit(lambda x: x)(1) == 1


def test_small_work_runs_on_one_thread_and_torch_keeps_its_number():
    threads = torch.get_num_threads()
    with numba_host.parallel_region(0):
        assert numba.get_num_threads() == 1
        assert torch.get_num_threads() == threads
    with numba_host.parallel_region(1 << 40):
        assert numba.get_num_threads() == min(threads, numba_host.CONFIG.NUMBA_NUM_THREADS)
    assert torch.get_num_threads() == threads


def test_the_cache_knows_every_room_whose_compiled_code_others_call():
    """Else machine code of an older file would stay in use after an edit."""
    kernels = Path(numba_host.__file__).parent
    called = set()
    for file in kernels.glob("*/*.py"):
        for room, module in re.findall(r"from longforge\.kernels\.(\w+)\.(\w+) import", file.read_text()):
            source = (kernels / room / f"{module}.py").read_text()
            if room != file.parent.name and ("@compiled" in source or "@intrinsic" in source):
                called.add(room)
    assert called and called <= set(numba_host.CALLED_ROOMS)
