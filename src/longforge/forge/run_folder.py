"""A run on disk: everything that explains it, and everything from which it goes on.

    config.toml     resolved configuration
    state.json      what is done, for resuming
    pool.sqlite     groups, episodes, calls, batches
    checkpoint/     the trainer's latest whole state
    weights/        last two published model folders
    summary.json    results, complete or so far
    metrics.jsonl   one line per training step; tensorboard/ has the same
    episodes/       every episode as readable JSON
    report.html     and plot.png
    *.log           what the children wrote

Single files appear whole (written beside their place, then renamed). One process uses a run at a time: it
holds a lock that ends with it, however it ends.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from longforge.errors import RunError
from longforge.forge.config import ForgeConfig, dump_config, load_config
from longforge.observe import write_json_atomic, write_text_atomic

__all__ = ["RunFolder", "RunState", "full_disk_told"]

LOCK = "run.lock"
CONFIG = "config.toml"
STATE = "state.json"
SUMMARY = "summary.json"


@dataclass
class RunState:
    """What a resumed run must know beyond pool and checkpoint."""

    finished: bool = False
    seconds: float = 0.0
    """Time spent so far, over all resumes."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    training_done: bool = False
    """No further training step will be taken."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of evaluations that are complete: before, after."""


class RunFolder:
    """An open run. Made by `create` or `open`; closing it frees the lock."""

    def __init__(self, path: Path, config: ForgeConfig, state: RunState, lock: IO[str]) -> None:
        self.path = path
        self.config = config
        self.state = state
        self._lock = lock

    @staticmethod
    def check_place(path: Path, *, replace: bool) -> list[str]:
        """What `create` would remove. Errors: RunError where it would refuse (but for a run in use)."""
        try:
            if path.exists() and not path.is_dir():
                raise RunError(f"run folder {path}: expected a folder or nothing, found a file")
            found = sorted(p.name for p in path.iterdir() if p.name != LOCK) if path.exists() else []
        except OSError as error:
            raise RunError(f"run folder {path}: it cannot be read ({error.strerror})") from None
        if found and not replace:
            ways = f"name another one, add --replace, or continue it: longforge forge resume {path}"
            raise RunError(f"run folder {path}: expected a new or empty folder, found {found[0]}; {ways}")
        if found and not (path / CONFIG).is_file():
            raise RunError(f"run folder {path}: it holds no run ({CONFIG} is missing), so it is not replaced")
        return found

    @staticmethod
    def create(path: Path, config: ForgeConfig, *, replace: bool = False) -> "RunFolder":
        """A new run in a new or empty folder; with `replace`, in place of the run that is there.

        Errors: RunError where something else is there, or a process is using it. Then nothing is removed.
        """
        found = RunFolder.check_place(path, replace=replace)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
        except OSError as error:
            raise RunError(f"run folder {path}: it cannot be made ({error.strerror})") from None
        # Killed at any place, this leaves what is no run to resume (its state goes first and comes last) and
        # what may be replaced (a configuration is always there).
        folder = RunFolder(path, config, RunState(), lock)
        try:
            for name in sorted(found, key=lambda name: name != STATE):
                if name != CONFIG:
                    _remove(path / name)
            write_text_atomic(path / CONFIG, dump_config(config))
            folder.episodes.mkdir()
            folder.save_state()
        except BaseException:
            folder.close()
            raise
        return folder

    @staticmethod
    def open(path: Path) -> "RunFolder":
        """A run to go on with. Errors: RunError where there is none, or a process is using it."""
        if not (path / CONFIG).is_file() or not (path / STATE).is_file():
            raise RunError(f"run folder {path}: expected a run with {CONFIG} and {STATE}, found none")
        lock = _take_lock(path)
        try:
            state = RunState(**json.loads((path / STATE).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(f"run folder {path}: {STATE} is not readable ({error})") from error
        return RunFolder(path, load_config(path / CONFIG), state, lock)

    @property
    def pool(self) -> Path:
        """The pool's file."""
        return self.path / "pool.sqlite"

    @property
    def checkpoint(self) -> Path:
        """Folder of the trainer's state."""
        return self.path / "checkpoint"

    @property
    def weights(self) -> Path:
        """Folder of published versions."""
        return self.path / "weights"

    @property
    def episodes(self) -> Path:
        """Folder of readable episodes."""
        return self.path / "episodes"

    def log(self, name: str) -> Path:
        """File for what a child process writes."""
        return self.path / f"{name}.log"

    def save_state(self) -> None:
        """Puts `state` on disk."""
        write_json_atomic(self.path / STATE, asdict(self.state))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces summary.json."""
        write_json_atomic(self.path / SUMMARY, summary)

    def read_summary(self) -> dict[str, Any]:
        """What was written last."""
        return json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))

    def write_episode(self, episode_id: str, episode: dict[str, Any]) -> None:
        """One episode for people to read. Not forced to disk: the pool has it too."""
        file = self._episode_file(episode_id)
        partial = file.with_name(f".{file.name}.partial")
        text = json.dumps(episode, indent=1, ensure_ascii=False) + "\n"
        # Half a surrogate pair, which an agent may write, cannot be UTF-8; its escape is JSON.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(file)

    def has_episode(self, episode_id: str) -> bool:
        """Whether it was written."""
        return self._episode_file(episode_id).exists()

    def _episode_file(self, episode_id: str) -> Path:
        return self.episodes / (episode_id.replace("/", "-") + ".json")

    def close(self) -> None:
        """Frees the lock."""
        self._lock.close()


@contextmanager
def full_disk_told(run: Path) -> Iterator[None]:
    """Makes one line of a full disk. What the run had is whole: files are written beside their place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            ways = f"free some and go on with: longforge forge resume {run}"
            raise RunError(f"run folder {run}: no space left on the disk; {ways}") from error
        raise


def _take_lock(path: Path) -> IO[str]:
    lock = (path / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise RunError(f"run folder {path}: process {owner} is using it; wait for it or stop it") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
