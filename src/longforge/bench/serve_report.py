"""The rows of the serving benchmark as a table and as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longforge.bench.serve_rows import Row

__all__ = ["plot", "table"]

TITLES = (
    "measure",
    "batch",
    "tokens",
    "dtype",
    "ours",
    "spread",
    "rival",
    "its",
    "spread",
    "unit",
    "ratio",
    "",
)


def table(rows: list[Row]) -> str:
    """A line for each row; a star marks the headline, each side in its fastest dtype."""
    if not rows:
        return "nothing was measured"
    lines = [TITLES, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(TITLES))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    first = rows[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items() if number)
    head = (
        f"{first['model']}, {first['device']}, {first['threads']} threads, {versions}, "
        f"commit {(first['commit'] or 'none')[:9]}{'+' if first['dirty'] else ''}"
    )
    notes = list(dict.fromkeys(f"{row['measure']}: {row['note']}" for row in rows if row["note"]))
    return "\n".join([head, *text, *notes])


def _cells(row: Row) -> tuple[str, ...]:
    measure = row["measure"] + (f", {row['drafts']} drafts" if "drafts" in row else "")
    if row.get("acceptance") is not None:
        measure += f" ({row['acceptance']:.0%} right)"
    mixed = row["dtype"] != row["rival_dtype"]
    lengths = "-" if row["prompt_tokens"] is None else f"{row['prompt_tokens']:,}+{row['new_tokens']}"
    return (
        measure,
        str(row["batch"]),
        lengths,
        f"{row['dtype']}/{row['rival_dtype']}" if mixed else row["dtype"],
        _number(row["ours"]),
        f"{_number(row['ours_low'])}-{_number(row['ours_high'])}",
        row["rival"] if row["rival_value"] is not None else f"({row['rival']})",
        _number(row["rival_value"]),
        f"{_number(row['rival_low'])}-{_number(row['rival_high'])}"
        if row["rival_value"] is not None
        else "-",
        row["unit"],
        _ratio(row),
        "*" if row["headline"] else "",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return "-"
    return f"{row['ratio']:.1%}" if row["unit"] == "ms" else f"{row['ratio']:.2f}x"


def plot(rows: list[Row], path: str | Path) -> None:
    """Rates of both sides: a panel for each batch size, one for prefill; quartiles as bars. The form by the
    suffix: PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    path = Path(path)
    panels = _panels(rows)
    figure = Figure(figsize=(2.6 * max(2, len(panels) + 1), 4.2), layout="constrained")
    widths = [max(1, len(lengths)) for _, lengths, _ in panels] or [1]
    axes: Any = figure.subplots(1, max(1, len(panels)), squeeze=False, width_ratios=widths)[0]
    names: dict[str, Any] = {}
    for axis, (title, lengths, series) in zip(axes, panels, strict=False):
        names |= _draw(axis, lengths, series)
        axis.set(title=title, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.5, color="#d0d7de")
        axis.set_axisbelow(True)
    if rows:
        first = rows[0]
        figure.suptitle(
            f"{first['model']}, {first['device']}, {first['threads']} threads: tokens/s", fontsize=10
        )
        figure.legend(
            list(names.values()), list(names), loc="outside lower center", ncols=3, frameon=False, fontsize=8
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(path)


Bars = dict[str, list[tuple[int, float, float, float]]]
"""Name of a series -> place, value and its quartiles."""


def _panels(rows: list[Row]) -> list[tuple[str, list[str], Bars]]:
    """Title, what stands below the groups of bars, and the bars."""
    same = [row for row in rows if row["dtype"] == row["rival_dtype"]]
    panels = []
    for batch in dict.fromkeys(row["batch"] for row in same if row["measure"].startswith("decode")):
        here = [row for row in same if row["batch"] == batch and row["measure"].startswith("decode")]
        title = "decode, " + ("1 request" if batch == 1 else f"{batch} requests")
        panels.append((title, [""], _bars(here, lambda row: 0)))
    prompts = [row for row in same if row["measure"] == "prefill"]
    lengths = sorted({row["prompt_tokens"] for row in prompts})
    if prompts:
        names = [f"{length:,}" for length in lengths]
        panels.append(
            (
                "prefill, by prompt length",
                names,
                _bars(prompts, lambda row: lengths.index(row["prompt_tokens"])),
            )
        )
    return panels


def _bars(rows: list[Row], place: Callable[[Row], int]) -> Bars:
    bars: Bars = {}
    for row in rows:
        through = ", through HTTP" if row["measure"].endswith("HTTP") else ""
        mine = (place(row), row["ours"], row["ours_low"], row["ours_high"])
        bars.setdefault(f"ours, {row['dtype']}{through}", []).append(mine)
        if row["rival_value"] is not None and not through:
            theirs = (place(row), row["rival_value"], row["rival_low"], row["rival_high"])
            bars.setdefault(f"transformers, {row['dtype']}", []).append(theirs)
    return dict(sorted(bars.items()))


def _draw(axis: Any, groups: list[str], bars: Bars) -> dict[str, Any]:
    """Draws the bars; returns what stands for each name in a legend."""
    width, drawn = 0.8 / max(1, len(bars)), {}
    for number, (name, points) in enumerate(bars.items()):
        shift = (number - (len(bars) - 1) / 2) * width
        values = [value for _, value, _, _ in points]
        errors = [
            [value - low for _, value, low, _ in points],
            [high - value for _, value, _, high in points],
        ]
        drawn[name] = axis.bar(
            [at + shift for at, *_ in points],
            values,
            width * 0.92,
            color=_colour(name),
            yerr=errors,
            capsize=2,
        )
    axis.set_xticks(range(len(groups)), groups)
    return drawn


def _colour(name: str) -> str:
    if name.endswith("HTTP"):
        return "#45818e"
    dark = "fp32" in name
    if name.startswith("ours"):
        return "#0b5394" if dark else "#6fa8dc"
    return "#b45f06" if dark else "#f6b26b"
