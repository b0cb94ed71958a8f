"""The bar a person watches: loss, speed, how even the experts' loads are, time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longforge.training.pretrain import StepReport

__all__ = ["TrainingBar"]


class TrainingBar:
    """Shows each `StepReport` on standard error; use it as a context manager.

    The numbers are means over about the last thirty steps. Where standard error is no terminal, a line is
    printed every fifty steps instead.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.fields[stage]:<16}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, stage="", numbers="")
        self._means: dict[str, float] = {}

    def __enter__(self) -> "TrainingBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, report: StepReport) -> None:
        stage = report.phase if report.mtp_loss is None else f"{report.phase} + MTP"
        numbers = (
            f"loss {self._mean('lm', report.lm_loss):.3f}  "
            f"index {self._mean('index', report.index_loss):.3f}  "
            f"{self._mean('speed', report.tokens_per_second):,.0f} tokens/s  "
            f"fullest expert {self._mean('load', _fullest(report)):.2f}x"
        )
        self._progress.update(
            self._task, completed=report.step, total=report.planned, stage=stage, numbers=numbers
        )
        if not self._console.is_terminal and report.step % 50 == 0:
            self._console.print(
                f"step {report.step}/{report.planned}  {stage}  {numbers}  {report.seconds / 60:.1f} min"
            )

    def _mean(self, name: str, value: float) -> float:
        self._means[name] = 0.97 * self._means.get(name, value) + 0.03 * value
        return self._means[name]


def _fullest(report: StepReport) -> float:
    """The fullest expert's load in multiples of the mean, over all layers; 1 without experts."""
    return max((max(loads) * len(loads) for loads in report.expert_loads), default=1.0)
