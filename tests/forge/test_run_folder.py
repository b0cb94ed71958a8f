"""The run folder: whole files, one user at a time, nothing of somebody else's is removed."""

import json
import multiprocessing
from pathlib import Path

import pytest

from longforge.errors import RunError
from longforge.forge.config import ForgeConfig
from longforge.forge.run_folder import RunFolder

CONFIG = ForgeConfig(name="mine", seed=3)


def test_a_run_opens_as_it_was_left(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    folder.state.evaluations["before"] = {"success": 0.25, "seconds": 3.0}
    folder.state.phase_seconds["start"] = 1.5
    folder.save_state()
    folder.write_episode("before-00001/0", {"answer": "ü"})
    folder.write_summary({"seconds": float("nan"), "before": None})
    folder.close()
    again = RunFolder.open(tmp_path / "run")
    assert again.config == CONFIG and again.state == folder.state
    assert again.has_episode("before-00001/0") and not again.has_episode("before-00002/0")
    assert json.loads((again.episodes / "before-00001-0.json").read_text()) == {"answer": "ü"}
    assert again.read_summary() == {"seconds": None, "before": None}
    again.close()


def test_a_folder_in_use_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    other = multiprocessing.get_context("spawn").Pool(1)
    with other:
        assert "is using it" in other.apply(_try_to_open, (tmp_path / "run",))
        assert "is using it" in other.apply(_try_to_replace, (tmp_path / "run",))
        folder.close()
        assert other.apply(_try_to_open, (tmp_path / "run",)) == "opened"


def _try_to_open(path: Path) -> str:
    try:
        RunFolder.open(path).close()
    except RunError as error:
        return str(error)
    return "opened"


def _try_to_replace(path: Path) -> str:
    try:
        RunFolder.create(path, CONFIG, replace=True).close()
    except RunError as error:
        return str(error)
    return "replaced"


def test_only_a_run_is_replaced_and_only_when_asked(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder.create(path, CONFIG)
    folder.write_episode("before-00001/0", {})
    folder.close()
    with pytest.raises(RunError, match=r"expected a new or empty folder, found config\.toml"):
        RunFolder.create(path, CONFIG)
    assert RunFolder.open(path).has_episode("before-00001/0")
    mine = tmp_path / "documents"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="it holds no run"):
        RunFolder.create(mine, CONFIG, replace=True)
    assert (mine / "letter.txt").exists()
    with pytest.raises(RunError, match="found a file"):
        RunFolder.create(mine / "letter.txt", CONFIG, replace=True)


def test_replacing_leaves_nothing_of_the_old_run(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder.create(path, CONFIG)
    folder.write_episode("before-00001/0", {})
    folder.weights.mkdir()
    folder.close()
    new = RunFolder.create(path, ForgeConfig(name="new"), replace=True)
    assert not new.has_episode("before-00001/0") and not new.weights.exists()
    new.close()
    assert RunFolder.open(path).config.name == "new"


@pytest.mark.parametrize("broken", ["nothing", "empty", "state"])
def test_what_is_no_run_is_one_line(tmp_path, broken):
    path = tmp_path / "run"
    if broken != "nothing":
        path.mkdir()
    if broken == "state":
        RunFolder.create(path, CONFIG).close()
        (path / "state.json").write_text('{"finished": tr')
    with pytest.raises(RunError) as error:
        RunFolder.open(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
