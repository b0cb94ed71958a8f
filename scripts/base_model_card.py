"""The model card, filled from the run's own numbers, and the picture of its loss."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_OPTIMISERS = {"adamw": "AdamW", "muon": "Muon for matrices and AdamW for the rest"}
CARD = Path(__file__).with_suffix(".md")
DRAFTS_CARD = CARD.with_name("draft_module_card.md")


def write_card(out: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes MODEL_CARD.md, training.json (result and curve) and loss_curve.png into `out`."""
    result = {**result, "machine": _machine()}
    steps = [row for row in rows if "lm_loss" in row]
    scores = [row for row in rows if "held_out" in row]
    curve = {
        "steps": [_rounded({k: v for k, v in row.items() if k != "expert_loads"}) for row in steps],
        "held_out": [_rounded({"step": row["step"], **row["held_out"]}) for row in scores],
        "expert_loads_at_the_end": steps[-1]["expert_loads"],
    }
    _plot(out / "loss_curve.png", steps, scores)
    _write_texts(out, {**result, "curve": curve})


def add_draft_module(out: Path, draft_module: Mapping[str, Any]) -> None:
    """Adds what `draft_module.py` made and measured to the training.json and the card in `out`."""
    result = json.loads((out / "training.json").read_text(encoding="utf-8"))
    _write_texts(out, {**result, "draft_module": {**draft_module, "machine": _machine()}})


def _write_texts(out: Path, result: Mapping[str, Any]) -> None:
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    drafts = result.get("draft_module")
    section = (
        "" if drafts is None else DRAFTS_CARD.read_text(encoding="utf-8").format(**_draft_fields(drafts))
    )
    card = CARD.read_text(encoding="utf-8").format(**_fields(result), draft_module=section)
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _fields(result: Mapping[str, Any]) -> dict[str, Any]:
    config, shape, scores = result["config"], result["model"], result["teacher_forced"]
    data, schedule = config["data"], config["schedule"]
    return {
        **{key: result[key] for key in ("command", "steps", "minutes", "made", "traces_right")},
        "parameters": result["parameters"] / 1e6,
        "tokens": result["tokens"] / 1e6,
        "seed": config["seed"],
        **{
            key: data[key]
            for key in ("openings", "text_share", "background_weight", "tokens_per_step", "max_tokens")
        },
        **{key: schedule[key] for key in ("warmup_steps", "dense_share", "mtp_share")},
        "mtp_first": schedule["mtp_weight"][0],
        "mtp_last": schedule["mtp_weight"][1],
        "lr": config["optimiser"]["lr"],
        "optimiser": _OPTIMISERS[config["optimiser"]["matrices"]],
        "bias_rate": config["optimiser"]["bias_rate"],
        "products": "bf16" if config["optimiser"]["bf16"] else "fp32",
        "vocab": shape["vocab_size"],
        "top_k": shape["top_k_blocks"],
        "block": shape["block_size"],
        "positions": shape["max_positions"],
        **result["machine"],
        "loss": scores["loss"],
        "token_share": scores["tokens"],
        "answers": scores["answers"],
        "recall": ", ".join(f"{value:.3f}" for value in result["selection_recall"]),
        "table": _table(result["held_out"]),
    }


def _table(held_out: Mapping[str, Mapping[str, Any]]) -> str:
    kinds = list(next(iter(held_out.values()))["by_kind"])
    lines = [
        "| | all | " + " | ".join(f"`{kind}`" for kind in kinds) + " | tool calls |",
        "|---|---|" + "---|" * (len(kinds) + 1),
    ]
    for name, scores in held_out.items():
        cells = [f"{right}/{asked}" for right, asked in (scores["by_kind"][kind] for kind in kinds)]
        total = f"{scores['success']:.1%} ± {scores['half_width']:.1%} of {scores['n']}"
        lines.append(f"| {name} | {total} | " + " | ".join(cells) + f" | {scores['calls']:.2f} |")
    return "\n".join(lines)


def _draft_fields(drafts: Mapping[str, Any]) -> dict[str, Any]:
    data, optimiser = drafts["config"]["data"], drafts["config"]["optimiser"]
    return {
        **{key: drafts[key] for key in ("command", "steps", "minutes", "made")},
        "tokens": drafts["tokens"] / 1e6,
        "seed": drafts["config"]["seed"],
        "tokens_per_step": data["tokens_per_step"],
        "weights": ", ".join(f"{weight:g}" for weight in drafts["pass_weights"]),
        "optimiser": _OPTIMISERS[optimiser["matrices"]],
        "lr": optimiser["lr"],
        "threads": drafts["machine"]["threads"],
        **{f"{side}_turns": drafts["after"][side]["turns"] for side in ("bench", "held_out")},
        "table": _draft_table(drafts),
    }


def _draft_table(drafts: Mapping[str, Any]) -> str:
    lines = ["| | guess 1 | guess 2 | guess 3 | tokens a step |", "|---|---|---|---|---|"]
    for side, name in (("bench", "`longforge bench serve`"), ("held_out", "held-out classes")):
        for when in ("before", "after"):
            seen = drafts[when][side]
            cells = [f"{right / max(asked, 1):.1%} of {asked}" for right, asked in seen["guesses"]]
            lines.append(f"| {name}, {when} | " + " | ".join(cells) + f" | {seen['tokens_per_step']:.2f} |")
    return "\n".join(lines)


def _plot(path: Path, steps: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    tokens = [row["tokens"] / 1e6 for row in steps]
    left.plot(tokens, [row["lm_loss"] for row in steps], lw=0.8, label="language model, training")
    left.plot(tokens, [row["index_loss"] for row in steps], lw=0.8, label="index (sum over layers)")
    mtp = [(row["tokens"] / 1e6, row["mtp_loss"]) for row in steps if row["mtp_loss"] is not None]
    if mtp:
        left.plot(*zip(*mtp, strict=True), lw=0.8, label="multi-token prediction")
    sparse = [row["tokens"] / 1e6 for row in steps if row["phase"] == "sparse"]
    if sparse:
        for axis in (left, right):
            axis.axvline(sparse[0], color="grey", ls=":", lw=1)
        left.text(sparse[0], left.get_ylim()[1], " sparse from here", va="top", fontsize=8, color="grey")
    left.set(xlabel="million tokens", ylabel="nats", yscale="log")
    left.legend(fontsize=8)
    at = [row["tokens"] / 1e6 for row in scores]
    for key, label in (("tokens", "assistant tokens"), ("answers", "whole last answers")):
        right.plot(at, [row["held_out"][key] for row in scores], marker=".", label=f"{label}, true history")
    loop = [
        (t, row["held_out"]["success"])
        for t, row in zip(at, scores, strict=True)
        if "success" in row["held_out"]
    ]
    if loop:
        right.plot(*zip(*loop, strict=True), marker="o", label="real tools, temperature 1")
    right.set(xlabel="million tokens", ylabel="share right, held-out", ylim=(0, 1))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def _machine() -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
