"""`longforge doctor`: this machine in lines or JSON, exit codes, and kernels compiled ahead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longforge.cli import main

NAMES = {
    "Python",
    "torch",
    "numba",
    "triton",
    "processor",
    "cores",
    "memory",
    "GPU",
    "kernel cache",
    "sandbox",
    "Chromium",
    "PostgreSQL",
    "port 8000",
    "shipped model",
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["longforge", "doctor", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_json_is_one_document_with_every_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code = run(monkeypatch, "--json")
    document = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in document["checks"]}
    assert set(checks) == NAMES
    assert document["healthy"] is (code == 0)
    assert checks["shipped model"]["status"] == "ok"
    assert all(check["fix"] for check in checks.values() if check["status"] == "fail")


def test_a_model_that_does_not_load_is_a_failure_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr("longforge.model.shipped.__file__", str(tmp_path / "__init__.py"))
    assert run(monkeypatch) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fail  shipped model") for line in lines)
    assert any("make base-model" in line for line in lines)


def test_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "--compile", "--dtype", "int4") == 2
    assert "dtype: expected auto, bfloat16 or float32, got 'int4'" in capsys.readouterr().err


SERVE = """
from longforge.engine import GenerationRequest
from longforge.protocol import SamplingParams
from longforge.server.launch import load
from longforge.server.settings import ServeSettings
engine = load(ServeSettings(dtype="float32", threads=2, max_running=8))[0].engine
for place, (prompt, answer) in enumerate(((5, 20), (40, 30), (3000, 5), (2, 9))):
    sampling = SamplingParams(max_tokens=answer, temperature=0.7, seed=1)
    engine.submit(GenerationRequest(str(place), (7,) * prompt, sampling))
while engine.has_work:
    engine.step()
"""


@pytest.mark.slow
def test_after_compiling_ahead_serving_compiles_nothing(tmp_path: Path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    compile_all = [sys.executable, "-m", "longforge.cli", "doctor", "--compile", "--dtype", "float32"]
    subprocess.run(compile_all, env=environment, check=True, timeout=250, capture_output=True)
    compiled = sorted(tmp_path.rglob("*.nbc"))
    assert compiled
    subprocess.run([sys.executable, "-c", SERVE], env=environment, check=True, timeout=250)
    assert sorted(tmp_path.rglob("*.nbc")) == compiled
