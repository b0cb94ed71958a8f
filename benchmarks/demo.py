"""The demo over several seeds: what `make demo` promises, measured.

    .venv/bin/python benchmarks/demo.py             writes benchmarks/results/demo.json and demo.png

Each seed is one real `longforge forge run` of the shipped configuration with another `seed` (other held-out
questions, other training tasks, other samples), after each other, nothing else running. Run again after
Ctrl-C, and it goes on with the run that was stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from longforge.forge.config import dump_config, load_config
from longforge.observe import passport, write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "src" / "longforge" / "forge" / "configs" / "demo.toml"
RESULTS = ROOT / "benchmarks" / "results"
KEPT = ("before", "after", "seconds", "steps", "reward", "staleness", "tokens_per_second", "phase_seconds")
"""What a seed's row holds of its run's summary."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "demo-runs", help="folder of the runs")
    options = parser.parse_args()
    rows = [{"seed": seed, **_run(seed, options.runs)} for seed in options.seeds]
    result = {
        "command": ".venv/bin/python benchmarks/demo.py --seeds " + " ".join(map(str, options.seeds)),
        "passport": passport(),
        "success_before": _spread([row["before"]["success"] for row in rows]),
        "success_after": _spread([row["after"]["success"] for row in rows]),
        "gain": _spread([row["after"]["success"] - row["before"]["success"] for row in rows]),
        "intervals_separate": [row["before"]["high"] < row["after"]["low"] for row in rows],
        "seconds": _spread([row["seconds"] for row in rows]),
        "runs": rows,
    }
    write_json_atomic(RESULTS / "demo.json", result)
    _plot(rows, RESULTS / "demo.png")
    print(f"wrote {RESULTS / 'demo.json'} and demo.png")


def _run(seed: int, runs: Path) -> dict[str, Any]:
    """One seed's run, from nothing or from where it was stopped; what is kept of its summary."""
    folder = runs / f"seed-{seed}"
    if (folder / "state.json").exists():
        command = ["resume", str(folder)]
    else:
        runs.mkdir(parents=True, exist_ok=True)
        config = runs / f"seed-{seed}.toml"
        config.write_text(dump_config(replace(load_config(CONFIG), seed=seed)), encoding="utf-8")
        command = ["run", str(config), "--out", str(folder)]
    if subprocess.run([sys.executable, "-m", "longforge.cli", "forge", *command], check=False).returncode:
        sys.exit(f"demo: seed {seed} did not finish; run the same command to go on")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {name: summary[name] for name in KEPT}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Success before and after with 95 % intervals, and the reward of every step, a colour for each seed."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    success, reward = figure.subplots(1, 2, width_ratios=(1, 2))
    for number, row in enumerate(rows):
        colour, shift = f"C{number}", 0.06 * (number - (len(rows) - 1) / 2)
        ends = [row["before"], row["after"]]
        places = [shift, 1 + shift]
        middles = [end["success"] for end in ends]
        errors = [
            [middle - end["low"] for middle, end in zip(middles, ends, strict=True)],
            [end["high"] - middle for middle, end in zip(middles, ends, strict=True)],
        ]
        success.errorbar(places, middles, errors, color=colour, marker="o", capsize=3)
        curve = row["reward"]["by_step"]
        reward.plot(range(1, len(curve) + 1), curve, color=colour, label=f"seed {row['seed']}")
    success.set(xticks=[0, 1], xticklabels=["before", "after"], xlim=(-0.4, 1.4), ylim=(0, 1))
    success.set_title("held-out success, 95 % interval", fontsize=10)
    reward.set(ylim=(0, 1), xlabel="training step")
    reward.set_title("mean reward of the step's episodes", fontsize=10)
    reward.legend(frameon=False, fontsize=8)
    for axis in (success, reward):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.5, color="#d0d7de")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
