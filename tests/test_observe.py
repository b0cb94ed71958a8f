"""Passport, metrics and progress: what a run leaves for people and programs to read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longforge.observe import (
    MetricsLog,
    Progress,
    _git_state,
    passport,
    read_metrics,
    write_json_atomic,
    write_text_atomic,
)


def test_the_passport_names_machine_versions_and_time() -> None:
    found = passport()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**28
    assert found["device"] == found["cpu"] != ""
    assert found["versions"]["torch"] and found["versions"]["tokenizers"]
    assert found["utc"].endswith("+00:00")
    assert passport("NVIDIA H200")["device"] == "NVIDIA H200"


def test_the_commit_is_known_in_a_checkout_only(tmp_path: Path) -> None:
    assert _git_state(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit, dirty = _git_state(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "file").write_text("two")
    assert _git_state(tmp_path) == (commit, True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "summary.json"
    write_json_atomic(file, {"success": 0.5, "loss": float("nan"), "parts": (1, float("inf"))})
    assert json.loads(file.read_text()) == {"success": 0.5, "loss": None, "parts": [1, None]}
    with pytest.raises(TypeError):
        write_json_atomic(file, {"not json": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(file, "half a character: \ud800")
    assert json.loads(file.read_text())["success"] == 0.5
    assert [entry.name for entry in file.parent.iterdir()] == ["summary.json"]


def test_metrics_are_on_disk_at_once_and_appended_to(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(0, {"loss": 2.5, "phase": "warmup"})
        assert read_metrics(tmp_path)[0]["loss"] == 2.5
        log.write(1, {"loss": float("nan")})
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(2, {"loss": 1.5})
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 2.5), (1, None), (2, 1.5)]
    assert rows[0]["phase"] == "warmup"


def test_a_resumed_run_has_no_step_twice_and_no_half_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(4):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
    with MetricsLog(tmp_path, first_step=2, tensorboard=False) as log:
        log.write(2, {"loss": 20.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        for step in range(3):
            log.write(step, {"train/loss": 2.0 - step, "phase": "sparse"})
    with MetricsLog(tmp_path, first_step=2) as log:
        log.write(2, {"train/loss": 9.0})
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in accumulator.Scalars("train/loss")] == [
        (0, 2.0),
        (1, 1.0),
        (2, 9.0),
    ]


def test_progress_without_a_terminal_is_plain_lines_on_stderr(capsys) -> None:
    with Progress(every=0.0, terminal=False) as progress:
        task = progress.task("training", total=2)
        task.advance(note="loss 2.0")
        progress.say("half way")
        task.advance()
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["training: 1/2 loss 2.0", "half way", "training: 2/2 loss 2.0"]
    assert shown.out == ""


def test_progress_lines_are_rare_but_the_last_one_always_comes(capsys) -> None:
    with Progress(every=3600.0, terminal=False) as progress:
        task = progress.task("questions", total=100)
        for _ in range(100):
            task.advance()
    assert capsys.readouterr().err.splitlines() == ["questions: 100/100"]


def test_progress_on_a_terminal_draws_bars_on_stderr_only() -> None:
    code = (
        "from longforge.observe import Progress\n"
        "with Progress(terminal=True) as p:\n"
        "    t = p.task('training', total=3)\n"
        "    t.advance(2, note='[reward] 0.5')\n"
        "    p.say('a [line]')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    assert "a [line]" in done.stderr and "training" in done.stderr and "2/3" in done.stderr
