"""The command: quick help, one line for a mistake, JSON on stdout and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longforge import __version__
from longforge.chat import train_tokenizer
from longforge.cli import main
from longforge.forge.loop import Interrupted


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["longforge", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_help_names_the_verbs_and_takes_little_time():
    command = [sys.executable, "-m", "longforge.cli", "--help"]
    times = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(times) < 0.5
    for verb in ("chat", "serve", "info", "doctor", "verify", "train", "forge", "bench"):
        assert f"\n  {verb} " in done.stdout


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"longforge {__version__}\n"


@pytest.mark.parametrize(
    ("preset", "facts"),
    [
        ("m2", {"total_parameters": 228_689_764_864, "active_parameters_without_tables": 9_801_359_872}),
        (
            "m3",
            {
                "total_parameters": 426_174_572_928,
                "kv_bytes_per_token": 122_880,
                "index_bytes_per_token": 14_592,
            },
        ),
    ],
)
def test_info_json_is_one_object_with_the_published_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str, facts: dict[str, int]
):
    assert run(monkeypatch, "info", preset, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert {key: printed[key] for key in facts} == facts
    assert printed["active_parameters"] > printed["active_parameters_without_tables"]


def test_info_of_a_folder_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
):
    assert run(monkeypatch, "info", str(folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("context") and line.endswith("1,024") for line in lines)
    assert any(line.startswith("mixers") and "2 sparse" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "m9"], "m9"),
        (["serve", "/nowhere"], "/nowhere: expected a model folder"),
        (["chat", "/nowhere"], "/nowhere: expected a model folder"),
        (["chat", "--url", "http://127.0.0.1:9"], "127.0.0.1:9/v1: expected a model server"),
        (["chat", "somewhere", "--url", "http://127.0.0.1:9"], "got both"),
        (["chat", "--thinking", "hard"], "got 'hard'"),
        (["chat", "--tools", "/nowhere.json"], "/nowhere.json: expected a JSON file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("longforge: ") and printed.err.count("\n") == 1 and said in printed.err


@pytest.mark.parametrize("verb", [["serve", "--port", "0"], ["chat"]])
def test_a_tokenizer_without_the_end_marker_is_refused_before_anything_is_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: list[str]
):
    train_tokenizer(["words"], 300, special_tokens=()).save(tmp_path)
    assert run(monkeypatch, *verb, str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"longforge: {tmp_path}: special token '[e~['") and said.count("\n") == 1


def test_a_pool_larger_than_the_machine_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
):
    assert run(monkeypatch, "serve", str(folder), "--port", "0", "--pages", str(10**12)) == 2
    said = capsys.readouterr().err
    assert said.startswith("longforge: pages: expected at most ") and said.count("\n") == 1


def test_a_wrong_option_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "serve", "--prot", "80") == 2
    assert "--prot" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longforge.model.info.find_config", interrupted)
    assert run(monkeypatch, "info", "m2") == 130


def test_a_stopped_run_is_told_with_the_command_that_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr("longforge.forge.loop.resume_run", stopped)
    monkeypatch.setattr(sys, "argv", [".venv/bin/longforge", "forge", "resume", "runs/demo"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "longforge: stopped; go on with: .venv/bin/longforge forge resume runs/demo\n"
    )


def test_no_shipped_model_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr("longforge.model.shipped.__file__", str(tmp_path / "__init__.py"))
    assert run(monkeypatch, "info") == 2
    assert "make base-model" in capsys.readouterr().err
