"""The picture of a run: success before and after, reward, staleness, speed, time per phase."""

from pathlib import Path
from typing import Any

__all__ = ["plot_run"]

BEFORE, AFTER, LINE, SOFT = "#8c959f", "#0969da", "#1f2328", "#d0d7de"


def plot_run(summary: dict[str, Any], steps: list[dict[str, Any]], path: Path) -> None:
    """Draws `summary.json` and the rows of `metrics.jsonl` that belong to training steps into one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    _success(axes[0, 0], summary)
    _curve(axes[0, 1], steps, "reward", "reward (mean of the step's episodes)", low=0.0, high=1.0)
    _curve(
        axes[0, 2], steps, "staleness_mean", "staleness (weights versions)", low=0.0, second="staleness_max"
    )
    _curve(
        axes[1, 0],
        steps,
        "train_tokens_per_second",
        "tokens per second",
        low=0.0,
        second="rollout_tokens_per_second",
    )
    _curve(axes[1, 1], steps, "entropy", "entropy of sampled tokens (nats)", low=0.0)
    _phases(axes[1, 2], summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def _success(axis: Any, summary: dict[str, Any]) -> None:
    for x, name, colour in ((0, "before", BEFORE), (1, "after", AFTER)):
        result = summary.get(name)
        if result is None:
            continue
        middle = result["success"]
        axis.bar(x, middle, color=colour, width=0.6)
        axis.errorbar(x, middle, [[middle - result["low"]], [result["high"] - middle]], color=LINE, capsize=6)
        axis.text(
            x,
            0.03,
            f"{middle:.0%}\nn = {result['n']}",
            ha="center",
            va="bottom",
            color="white",
            weight="bold",
        )
    axis.set(
        xticks=[0, 1], xticklabels=["before", "after"], ylim=(0, 1), title="held-out success, 95 % interval"
    )
    _tidy(axis)


def _curve(
    axis: Any,
    steps: list[dict[str, Any]],
    key: str,
    title: str,
    *,
    low: float,
    high: float | None = None,
    second: str = "",
) -> None:
    for name, colour in ((key, AFTER), (second, BEFORE)):
        points = [(row["step"], row[name]) for row in steps if row.get(name) is not None]
        if name and points:
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                color=colour,
                label=name.replace("_", " "),
            )
    if second and axis.lines:
        axis.legend(frameon=False, fontsize=8)
    axis.set(title=title, xlabel="step")
    axis.set_ylim(bottom=low, top=high)
    _tidy(axis)


def _phases(axis: Any, summary: dict[str, Any]) -> None:
    phases = summary.get("phase_seconds", {})
    names = list(phases)
    axis.barh(names, [phases[name] for name in names], color=AFTER)
    for row, name in enumerate(names):
        axis.text(phases[name], row, f" {phases[name]:.0f} s", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_title("time per phase")
    _tidy(axis)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.title.set_fontsize(10)
    axis.grid(axis="y", color=SOFT, linewidth=0.5)
    axis.set_axisbelow(True)
