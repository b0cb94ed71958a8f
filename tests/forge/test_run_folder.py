"""The run folder: whole files, one user at a time, nothing of somebody else's is removed."""

import errno
import json
import multiprocessing
from pathlib import Path

import pytest

from longforge.errors import RunError
from longforge.forge import run_folder
from longforge.forge.config import ForgeConfig
from longforge.forge.run_folder import RunFolder, full_disk_told

CONFIG = ForgeConfig(name="mine", seed=3)


def test_a_run_opens_as_it_was_left(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    folder.state.evaluations["before"] = {"success": 0.25, "seconds": 3.0}
    folder.state.phase_seconds["start"] = 1.5
    folder.save_state()
    folder.write_episode("before-00001/0", {"answer": "ü"})
    folder.write_episode("before-00001/1", {"answer": "half a pair: \ud800"})
    folder.write_summary({"seconds": float("nan"), "before": None})
    folder.close()
    again = RunFolder.open(tmp_path / "run")
    assert again.config == CONFIG and again.state == folder.state
    assert again.has_episode("before-00001/0") and not again.has_episode("before-00002/0")
    assert json.loads((again.episodes / "before-00001-0.json").read_text()) == {"answer": "ü"}
    half = (again.episodes / "before-00001-1.json").read_text(encoding="utf-8")
    assert json.loads(half) == {"answer": "half a pair: \ud800"}
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
    with pytest.raises(RunError, match="it cannot be made"):
        RunFolder.create(mine / "letter.txt" / "run", CONFIG)


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


@pytest.mark.parametrize("removed", range(5))
def test_a_replacement_that_is_killed_can_be_made_again_and_is_no_run(tmp_path, monkeypatch, removed):
    path = tmp_path / "run"
    folder = RunFolder.create(path, CONFIG)
    folder.checkpoint.mkdir()
    folder.log("engine").write_text("ready")
    folder.close()
    left = [removed]
    remove = run_folder._remove

    def killed(entry: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(entry)

    def killed_late(self: RunFolder) -> None:
        assert removed == 4, "state.json, checkpoint, engine.log and episodes are to go"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_remove", killed)
        patch.setattr(RunFolder, "save_state", killed_late)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.create(path, CONFIG, replace=True)
    if removed:
        with pytest.raises(RunError, match="expected a run"):
            RunFolder.open(path)
    RunFolder.create(path, ForgeConfig(name="new"), replace=True).close()
    assert RunFolder.open(path).config.name == "new"


def test_a_full_disk_is_one_line(tmp_path):
    words = "no space left on the disk; free some and go on with"
    with pytest.raises(RunError, match=words), full_disk_told(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), full_disk_told(tmp_path):
        (tmp_path / "none").read_text()


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
