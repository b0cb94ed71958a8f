"""`longforge verify` as a program: on the shipped model, its JSON, its exit codes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longforge.cli import main
from longforge.errors import CheckpointError, InputError
from longforge.model import shipped
from longforge.server.placement import choose_placement
from longforge.verify import verification
from longforge.verify.check import Check
from longforge.verify.subject import Subject, open_subject
from longforge.verify.verification import CHECKS
from small_model import write_small_checkpoint

COMMAND = [sys.executable, "-m", "longforge.cli", "verify"]


def test_the_shipped_model_passes_and_json_has_its_shape():
    done = subprocess.run(
        [*COMMAND, "--json", "--device", "cpu"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"passed", "checks", "model", "device", "dtype", "versions", "commit", "dirty"}
    assert told["passed"] is True and told["model"] == "micro"
    assert told["dtype"] == str(choose_placement(shipped.path(), "cpu").dtype).removeprefix("torch.")
    assert told["device"].startswith("cpu: ") and told["versions"]["torch"]
    assert [check["name"] for check in told["checks"]] == [check.__name__ for check in CHECKS]
    for check in told["checks"]:
        assert set(check) == {"name", "passed", "detail"} and check["passed"] is True and check["detail"]
    details = {check["name"]: check["detail"] for check in told["checks"]}
    assert "1 calls" in details["dialects_agree"], "the shipped model calls a tool when asked"
    assert len(done.stderr.splitlines()) == len(CHECKS), "a line per check, nothing else"


def test_ctrl_c_ends_it_with_130_and_without_a_trace():
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ok")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors


def test_a_failed_check_ends_it_with_1_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def some_check(subject: Subject) -> Check:
        return Check("some_check", False, f"{subject.name}: 3 and 4 differ")

    folder = write_small_checkpoint(tmp_path / "small")
    monkeypatch.setattr(verification, "CHECKS", (verification.selection_is_exact, some_check))
    for rest in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["longforge", "verify", str(folder), *rest])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        told = capsys.readouterr()
        if rest:
            document = json.loads(told.out)
            assert [check["passed"] for check in document["checks"]] == [True, False]
            assert document["passed"] is False and len(told.err.splitlines()) == 2
        else:
            first, second, last = told.out.splitlines()
            assert first.startswith("ok") and second.startswith("FAIL") and not told.err
            assert "small: 3 and 4 differ" in second and last == "failed: some_check"


def test_a_mistake_of_the_user_is_one_line(tmp_path: Path):
    done = subprocess.run([*COMMAND, "--dtype", "float16"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    with pytest.raises(CheckpointError, match="expected a model folder"):
        open_subject(tmp_path / "nowhere")
    with pytest.raises(InputError, match="device: expected"):
        open_subject(None, device="abacus")
    with pytest.raises(InputError, match="a context of at least 32 tokens"):
        open_subject(write_small_checkpoint(tmp_path / "short", max_positions=24))
