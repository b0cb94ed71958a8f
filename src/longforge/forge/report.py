"""report.html and plot.png of a run, from the run folder's files alone.

The page is one file without network: the plot is inside it, and every held-out question stands there with the
agent's thinking and tool calls before and after training.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from longforge.errors import RunError
from longforge.forge.evaluation import SUCCESS
from longforge.forge.plots import plot_run
from longforge.observe import read_metrics, write_text_atomic

__all__ = ["write_report"]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
FILTERS = (
    ("learnt", "wrong, then right"),
    ("lost", "right, then wrong"),
    ("same", "unchanged"),
    ("alone", "one side"),
)
SIDES = ("before", "after")


def write_report(run: Path) -> Path:
    """Writes plot.png and report.html into the run folder and gives the page's path.

    Raises:
        RunError: the folder has no summary.json.
    """
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"run folder {run}: expected summary.json, found none; finish the run first") from None
    plot_run(summary, read_metrics(run), run / "plot.png")
    pairs = _pairs(_episodes(run / "episodes"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=summary["name"],
        headline=_headline(summary),
        summary=summary,
        kinds=_kinds(summary),
        plot=base64.b64encode((run / "plot.png").read_bytes()).decode("ascii"),
        pairs=pairs,
        filters=FILTERS,
        passport=json.dumps(summary["passport"], indent=1),
        config=(run / "config.toml").read_text(encoding="utf-8"),
    )
    # Half a surrogate pair, which an agent may write, cannot be UTF-8.
    write_text_atomic(run / "report.html", page.encode("utf-8", "replace").decode("utf-8"))
    return run / "report.html"


def _episodes(folder: Path) -> list[dict[str, Any]]:
    """Episodes of both evaluations, in the order of their names."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return [episode for episode in found if episode["phase"] in SIDES]


def _pairs(episodes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per question, learnt ones first."""
    rows: dict[str, dict[str, Any]] = {}
    for episode in episodes:
        row = rows.setdefault(
            episode["question"], {"question": episode["question"], "before": None, "after": None}
        )
        row[episode["phase"]] = _shown(episode)
    for row in rows.values():
        row["change"] = _change(row["before"], row["after"])
    order = [key for key, _ in FILTERS]
    return sorted(rows.values(), key=lambda row: (order.index(row["change"]), row["question"]))


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    if before is None or after is None:
        return "alone"
    if before["right"] == after["right"]:
        return "same"
    return "learnt" if after["right"] else "lost"


def _shown(episode: Mapping[str, Any]) -> dict[str, Any]:
    versions = sorted(set(episode.get("versions") or [])) or ["?"]
    return {
        "right": (episode["reward"] or 0.0) >= SUCCESS,
        "outcome": episode["outcome"],
        "answer": episode["answer"],
        "expected": episode["expected"],
        "versions": ", ".join(map(str, versions)),
        "messages": [_message(message) for message in episode.get("messages") or []],
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return {
        "role": message["role"],
        "thinking": message.get("reasoning_content"),
        "content": message.get("content"),
        "calls": [f"{call['name']}({call['arguments']})" for call in calls],
    }


def _kinds(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    found = {side: (summary[side] or {}).get("kinds", {}) for side in SIDES}
    names = sorted(set(found["before"]) | set(found["after"]))
    return [(name, {side: _rate(found[side].get(name)) for side in SIDES}) for name in names]


def _rate(result: Mapping[str, Any] | None) -> str:
    return f"{100 * result['success']:.0f} % of {result['n']}" if result else "-"


def _headline(summary: Mapping[str, Any]) -> str:
    state = "finished" if summary["finished"] else "not finished"
    return f"{state}; {summary['steps']} training steps, {summary['seconds'] / 60:.1f} minutes"
