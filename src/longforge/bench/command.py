"""What `longforge bench attention` and `python -m longforge.bench attention` both do with their options."""

import inspect
import json
import sys
from typing import Any

from longforge.bench.attention import Options, bench_attention, device_of
from longforge.bench.inputs import DTYPES
from longforge.bench.report import plot as draw
from longforge.bench.report import table
from longforge.bench.work import Shape, parse_length, parse_phases
from longforge.errors import InputError
from longforge.observe import write_json_atomic

__all__ = ["attention", "defaults"]


def attention(
    *,
    device: str | None = None,
    lengths: str = "32k,128k,512k,1m",
    phase: str = "decode,prefill,train",
    dtype: str = "bf16",
    heads: int = 64,
    groups: int = 4,
    dim: int = 128,
    index_dim: int = 128,
    block: int = 128,
    top_k: int = 16,
    chunk: int | None = None,
    minutes: float | None = None,
    longest: float | None = None,
    json: bool = False,
    out: str | None = None,
    plot: str | None = None,
) -> None:
    """Measures and prints a table, or with `json` one array of rows; everything else goes to stderr.

    Lengths in tokens (32k, 1m), phases and lengths with commas between. `out` also writes the array to a
    file, `plot` a picture. Raises LongforgeError for options that do not fit and where the check fails.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: one of {', '.join(DTYPES)} expected, got {dtype!r}")
    options = Options(
        device=device_of(device),
        lengths=[parse_length(text) for text in lengths.split(",")],
        phases=parse_phases(phase),
        dtype=dtype,
        shape=Shape(heads, groups, dim, index_dim, block, top_k),
        chunk=chunk,
        minutes=minutes,
        longest=longest,
    )
    rows: list[dict[str, Any]] = []
    for point in bench_attention(options):
        rows += point
        if out is not None:  # after each point: what was measured stays, whatever stops the next one
            write_json_atomic(out, rows)
    if plot is not None and rows:
        draw(rows, plot)
    print(_dumps(rows) if json else table(rows))
    sys.stdout.flush()


def _dumps(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1)


def defaults() -> dict[str, Any]:
    """The options' names and defaults."""
    return {name: p.default for name, p in inspect.signature(attention).parameters.items()}
