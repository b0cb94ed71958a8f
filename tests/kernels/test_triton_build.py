"""Kernels compiled ahead for GPUs that are not there, in a process of its own without the interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from longforge.errors import InputError
from longforge.kernels.triton_build import BuildRow, build, faults, table

ROW = BuildRow("k", 90, 4, 3, 200, 0, 0, 0, 1000, 0, {"HGMMA.64x128x16": 8}, "", "")
SELECTION = """
from longforge.kernels.select_blocks.triton_specs import specs
from longforge.kernels.triton_build import build, faults, table
wanted = {"prefill bf16", "decode bf16", "verify 8 bf16", "certified open bf16", "decode fp32"}
rows = {row.name: row for row in build(s for s in specs() if s.name in wanted and s.targets == (90,))}
assert rows.keys() == wanted and not faults(rows.values()), faults(rows.values())
kinds = {kind for name in wanted - {"decode fp32"} for kind in rows[name].tensor}
assert kinds == {"HGMMA.64x128x16"}, f"one instruction computes every score of bf16 keys: {kinds}"
exact = rows["decode fp32"]
assert not exact.tensor and "fma.rn.f32" in exact.ptx and "mul.f32" not in exact.ptx
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_selection_computes_every_score_by_one_matrix_instruction_and_fp32_without():
    done = run("-c", SELECTION)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_every_launch_of_selection_compiles_without_a_fault():
    done = run("-m", "longforge.kernels.triton_build", "longforge.kernels.select_blocks.triton_specs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| sm_90 |") >= 10


def test_faults_are_spills_without_a_reason_and_too_much_shared_memory():
    spilt = {**ROW.__dict__, "spill_stores": 8, "spill_loads": 4}
    assert faults([ROW]) == []
    assert faults([BuildRow(**spilt)]) == ["k for sm_90: no spill expected, got 8 + 4 bytes"]
    excused = BuildRow(**{**spilt, "excused": "rare shape"})
    assert faults([excused]) == []
    assert "| 12 * |" in table([excused]) and r"\* k: rare shape" in table([excused])
    assert "232448 bytes of shared memory" in faults([BuildRow(**{**ROW.__dict__, "shared": 300_000})])[0]


def test_the_interpreters_process_refuses_to_compile():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off")
    with pytest.raises(InputError, match="a process without TRITON_INTERPRET expected"):
        build([])
