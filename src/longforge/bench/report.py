"""The rows of the attention benchmark as a table and as a picture."""

from pathlib import Path
from typing import Any

__all__ = ["fastest", "plot", "table"]

Row = dict[str, Any]
COLUMNS = (
    ("phase", "phase", "{}"),
    ("length", "tokens", "{:,}"),
    ("index_dtype", "index", "{}"),
    ("ms", "msa ms", "{:.3g}"),
    ("spread", "spread", "{}"),
    ("selection_ms", "select", "{:.3g}"),
    ("attention_ms", "attend", "{:.3g}"),
    ("combine_ms", "combine", "{:.3g}"),
    ("rival", "fastest rival", "{}"),
    ("rival_ms", "ms", "{:.3g}"),
    ("speedup", "speed-up", "{:.2f}x"),
    ("limit", "limit", "{:.1f}x"),
    ("bandwidth_fraction", "of bandwidth", "{:.0%}"),
    ("matmul_fraction", "of matmul", "{:.0%}"),
)


def fastest(rows: list[Row]) -> list[Row]:
    """Of each phase, length and index dtype the row with the fastest rival, in the order of `rows`."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["phase"], row["length"], row["index_dtype"])
        if key not in best or row["rival_ms"] < best[key]["rival_ms"]:
            best[key] = row
    return list(best.values())


def table(rows: list[Row]) -> str:
    """One line for each phase and length, against the fastest rival there."""
    if not rows:
        return "nothing was measured"
    lines = [[title for _, title, _ in COLUMNS]]
    for row in fastest(rows):
        spread = f"{row['ms_low']:.3g}-{row['ms_high']:.3g}"
        cells = {**row, "spread": spread}
        lines.append([_cell(cells[key], form) for key, _, form in COLUMNS])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    first = rows[0]
    head = (
        f"{first['device']}, {first['dtype']}, layer {first['shape']}, backend {first['backend']}, "
        f"torch {first['torch']}, commit {(first['commit'] or 'none')[:9]}{'+' if first['dirty'] else ''}"
    )
    return "\n".join([head, *text])


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def plot(rows: list[Row], path: str | Path) -> None:
    """Speed-up over the fastest rival against length, its limit dashed; PNG, SVG or PDF by the suffix."""
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    best = fastest(rows)
    kinds = list(dict.fromkeys((row["phase"], row["index_dtype"]) for row in best))
    for number, (phase, index_dtype) in enumerate(kinds):
        mine = sorted(
            (row for row in best if (row["phase"], row["index_dtype"]) == (phase, index_dtype)),
            key=lambda row: row["length"],
        )
        lengths = [row["length"] for row in mine]
        speedups = [row["speedup"] for row in mine]
        low = [s - row["rival_ms_low"] / row["ms_high"] for s, row in zip(speedups, mine, strict=True)]
        high = [row["rival_ms_high"] / row["ms_low"] - s for s, row in zip(speedups, mine, strict=True)]
        colour = f"C{number}"
        name = f"{phase}, {index_dtype} index keys"
        axis.errorbar(lengths, speedups, [low, high], marker="o", capsize=3, color=colour, label=name)
        axis.plot(lengths, [row["limit"] for row in mine], "--", color=colour, linewidth=1)
    axis.axhline(1.0, color="#8c959f", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row["length"] for row in best})
    axis.set_xticks(ticks, [f"{t >> 20}M" if t >= 1 << 20 else f"{t / 1024:g}K" for t in ticks])
    axis.set(
        xlabel="context, tokens",
        ylabel="speed-up over the fastest rival",
        title=f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['shape']}\n(dashed: limit)",
    )
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(path)
