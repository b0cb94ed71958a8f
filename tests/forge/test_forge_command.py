"""`longforge forge`: a user's mistake is one line, exit code 2, and leaves nothing behind."""

import json
import sys

import pytest

from longforge.cli import main
from longforge.forge.config import ForgeConfig
from longforge.forge.run_folder import RunFolder
from longforge.forge.summary import summary_table, text_plot
from small_model import write_small_checkpoint


@pytest.fixture
def forge(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longforge", "forge", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def refused(answer, words: str) -> None:
    code, out, err = answer
    assert code == 2 and out == "", (code, out)
    assert words in err and err.startswith("longforge: ") and err.count("\n") == 1, err


def test_wrong_configuration_or_model_or_tree_costs_no_run(forge, tmp_path):
    out, config = tmp_path / "run", tmp_path / "mine.toml"
    refused(forge("run", config, "--out", out), "expected a TOML file, found none")
    config.write_text("[trainer]\nstep = 3\n")
    refused(
        forge("run", config, "--out", out), "unknown key trainer.step; the nearest known one is trainer.steps"
    )
    config.write_text('model = "nowhere"\n')
    refused(forge("run", config, "--out", out), "nowhere: expected a model folder, there is none")
    write_small_checkpoint(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    config.write_text('model = "model"\n[environment]\ntree = "notes"\n')
    refused(forge("run", config, "--out", out), "expected Python files below")
    config.write_text('model = "model"\n[environment]\ntree = "none"\n')
    refused(forge("run", config, "--out", out), "expected a folder of Python files")
    assert not out.exists()


def test_a_run_that_is_there_survives_a_mistake_made_with_replace(forge, tmp_path):
    out, config = tmp_path / "run", tmp_path / "mine.toml"
    RunFolder.create(out, ForgeConfig(name="precious")).close()
    config.write_text('model = "nowhere"\n')
    refused(forge("run", config, "--out", out), "expected a new or empty folder")
    refused(forge("run", config, "--out", out, "--replace"), "nowhere: expected a model folder")
    assert RunFolder.open(out).config.name == "precious"
    model = write_small_checkpoint(tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    config.write_text('model = "model"\n')
    refused(forge("run", config, "--out", out, "--replace"), "model.safetensors")


def test_what_is_no_run_cannot_be_resumed(forge, tmp_path):
    refused(
        forge("resume", tmp_path / "nothing"), "expected a run with config.toml and state.json, found none"
    )


def finished_run(path):
    folder = RunFolder.create(path, ForgeConfig(name="done"))
    result = {"success": 0.5, "low": 0.3, "high": 0.7, "n": 20, "seconds": 1.0, "kinds": {}, "outcomes": {}}
    folder.state.evaluations = {
        "before": result,
        "after": result | {"success": 0.9, "low": 0.7, "high": 0.97},
    }
    folder.state.finished = True
    folder.save_state()
    summary = {
        "name": "done",
        "finished": True,
        **folder.state.evaluations,
        "seconds": 12.0,
        "steps": 0,
        "reward": {"first": 0.2, "last": 0.9, "by_step": [0.0, 0.25, 1.0]},
        "staleness": {"mean": None, "max": None, "age_max": None, "age_bound": 2},
        "tokens_per_second": {"rollout": None, "train": None},
        "phase_seconds": {"train": 3.0},
        "groups": {},
        "environment": {},
        "passport": {},
    }
    folder.write_summary(summary)
    folder.close()
    return summary


def test_resuming_a_finished_run_shows_it_again(forge, tmp_path):
    finished_run(tmp_path / "run")
    code, out, _ = forge("resume", tmp_path / "run")
    assert code == 0 and "50.0 % (30.0 to 70.0, n = 20)" in out and "90.0 %" in out
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "plot.png").exists()
    code, out, _ = forge("resume", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["after"]["success"] == 0.9


def test_the_table_tells_what_was_not_measured(tmp_path):
    summary = finished_run(tmp_path / "run") | {"after": None}
    assert dict(summary_table(summary))["held-out success after"] == "not measured"


def test_the_plot_in_characters_shows_intervals_and_every_step(tmp_path):
    before, after, rewards = text_plot(finished_run(tmp_path / "run")).splitlines()
    assert before == f"        before {'█' * 15}{'▒' * 20}{'·' * 15}  50.0 %"
    assert after.count("█") == 35 and after.endswith(" 90.0 %")
    assert rewards == "reward by step ▁▃█ 0.00 → 1.00"
