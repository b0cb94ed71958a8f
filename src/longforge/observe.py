"""What a run says about itself: where it ran, its metrics, its progress. Only the standard
library is loaded until something else is used.

Everything for people goes to stderr; stdout belongs to results.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = [
    "MetricsLog",
    "Progress",
    "Task",
    "passport",
    "read_metrics",
    "write_json_atomic",
    "write_text_atomic",
]

METRICS_FILE = "metrics.jsonl"
PACKAGES = ("longforge", "torch", "numba", "numpy", "tokenizers", "triton")


# --- where it ran -------------------------------------------------------------------------------------------


def passport(device: str | None = None) -> dict[str, Any]:
    """What a measurement needs beside it to mean something; plain values, ready for JSON.

    Keys: utc, device, cpu, cores (that this process may use), memory_bytes, system, python, versions
    (package -> version or None), commit and dirty (of the checkout this package is imported from; None
    outside one). `device` is for who computes elsewhere: the accelerator's name; without it, it is the
    CPU's model.
    """
    cpu = _cpu_model()
    commit, dirty = _git_state(Path(__file__).resolve().parents[2])
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device or cpu,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit,
        "dirty": dirty,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root`, and whether tracked files differ from it; (None, None) elsewhere."""
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout


# --- files --------------------------------------------------------------------------------------------------


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as one indented JSON document, atomically. Numbers that JSON cannot hold become null."""
    write_text_atomic(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """NaN and infinities as None, which is what JSON has for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


# --- metrics ------------------------------------------------------------------------------------------------


class MetricsLog:
    """Metrics of a run, one line of JSON a step, and the same numbers as TensorBoard events.

    Lines are on disk when `write` returns. A run that resumes gives `first_step`, the step it does next:
    what an interrupted run wrote for that step and later ones is dropped, so that no step is there twice.
    """

    def __init__(
        self, directory: str | Path, *, first_step: int | None = None, tensorboard: bool = True
    ) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / METRICS_FILE
        if file.is_file():
            kept = [row for row in read_metrics(directory) if first_step is None or row["step"] < first_step]
            write_text_atomic(file, "".join(_line(row) for row in kept))
        self._file = file.open("a", encoding="utf-8")
        self._events = _TensorBoard(self._directory / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One step's metrics, name -> value. Numbers go to TensorBoard too; the rest to the line alone."""
        now = time.time()
        self._file.write(_line({"step": step, "time": round(now, 3), **values}))
        self._file.flush()
        if self._events is not None:
            self._events.write(step, now, values)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics. A last line that a crash cut off is left out."""
    file = Path(directory) / METRICS_FILE
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.is_file() else ""
    return [json.loads(line) for line in whole.split("\n") if line]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


class _TensorBoard:
    """Scalars as event files, through the tensorboard package alone."""

    def __init__(self, directory: Path, first_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events: Any = event_pb2  # its classes are made when it is imported, out of a checker's sight
        summaries: Any = summary_pb2
        self._event = events.Event
        self._summary = summaries.Summary
        self._writer = EventFileWriter(str(directory))
        if first_step is not None:
            # TensorBoard forgets what it read for this step and later ones.
            restart = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=restart))

    def write(self, step: int, now: float, values: Mapping[str, Any]) -> None:
        scalars = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        self._writer.add_event(self._event(wall_time=now, step=step, summary=self._summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


# --- progress -----------------------------------------------------------------------------------------------


class Task:
    """One bar. Made by `Progress.task`."""

    def __init__(self, progress: "Progress", name: str, total: int | None) -> None:
        self._progress = progress
        self.name = name
        self.total = total
        self.done = 0
        self.note = ""
        self._said = time.monotonic()
        bars = progress.bars
        self._bar = None if bars is None else bars.add_task(name, total=total, note="")

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """`steps` more are done; `note` is a short text beside the bar, kept until the next one."""
        self.done += steps
        self.note = self.note if note is None else note
        if self._progress.bars is not None and self._bar is not None:
            self._progress.bars.update(self._bar, advance=steps, note=self.note)
            return
        finished = self.total is not None and self.done >= self.total
        if finished or time.monotonic() - self._said >= self._progress.every:
            self._said = time.monotonic()
            self._progress.say(
                f"{self.name}: {self.done}{f'/{self.total}' if self.total else ''} {self.note}"
            )


class Progress:
    """Progress bars on a terminal, a plain line every `every` seconds elsewhere; stderr in both cases."""

    def __init__(self, *, every: float = 10.0, terminal: bool | None = None) -> None:
        self.every = every
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self.bars = self._rich_bars() if self._terminal else None

    def task(self, name: str, total: int | None = None) -> Task:
        """A new bar; `total` None when the end is not known."""
        return Task(self, name, total)

    def say(self, text: str) -> None:
        """One line for the person who watches, above the bars."""
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False)
        else:
            print(text.rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    @staticmethod
    def _rich_bars() -> Any:
        from rich import progress
        from rich.console import Console

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
