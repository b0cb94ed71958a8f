"""What `longforge bench serve` does with its options."""

import json as json_format
import sys

import torch

from longforge.bench.inputs import DTYPES
from longforge.bench.serve import bench_serve
from longforge.bench.serve_report import plot as draw
from longforge.bench.serve_report import table
from longforge.bench.serve_rows import Row
from longforge.bench.serve_setting import MEASURES, ServeOptions
from longforge.bench.work import parse_length
from longforge.errors import InputError
from longforge.model.checkpoint import config_of
from longforge.observe import write_json_atomic
from longforge.server.cores import free_cores
from longforge.server.launch import model_folder

__all__ = ["serve"]


def serve(
    model: str | None,
    *,
    measures: str,
    batches: str,
    prompt: str,
    tokens: str,
    prefill: str | None,
    first_token: str,
    talks: int,
    dtypes: str,
    threads: int | None,
    rounds: int,
    compiled: bool,
    minutes: float | None,
    json: bool,
    out: str | None,
    plot: str | None,
) -> None:
    """Measures and prints a table, or with `json` one array of rows; everything else goes to stderr.

    Lists with commas between, lengths in tokens (2k, 100k). prefill None: 512, 2048 and the whole context.
    `out` also writes the array to a file, after each point; `plot` a picture. Raises LongforgeError for
    options that do not fit and where a check fails.
    """
    folder = model_folder(model)
    context = config_of(folder).max_positions
    if prefill is None:
        prefilled = [length for length in (512, 2048) if length < context - 1] + [context - 1]
    else:
        prefilled = _lengths(prefill)
    torch.set_num_threads(_positive("threads", threads if threads is not None else free_cores().free))
    options = ServeOptions(
        folder=folder,
        measures=_names("measures", measures, MEASURES),
        dtypes=_names("dtypes", dtypes, tuple(name for name in DTYPES if name != "fp16")),
        batches=[_positive("batches", _whole(text)) for text in batches.split(",")],
        prompt=parse_length(prompt),
        tokens=_at_least("tokens", parse_length(tokens), 2),
        prefill=prefilled,
        first_token=_lengths(first_token),
        talks=_positive("talks", talks),
        rounds=_positive("rounds", rounds),
        minutes=minutes,
        compiled=compiled,
    )
    rows: list[Row] = []
    for point in bench_serve(options):
        rows += point
        if out is not None:  # after each point: what was measured stays, whatever stops the next one
            write_json_atomic(out, rows)
    if plot is not None and rows:
        draw(rows, plot)
    print(json_format.dumps(rows, indent=1) if json else table(rows))
    sys.stdout.flush()


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    given = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not given or set(given) - set(known):
        raise InputError(f"{option}: some of {', '.join(known)} expected, got {text!r}")
    return given


def _lengths(text: str) -> list[int]:
    return [parse_length(part) for part in text.split(",") if part.strip()]


def _whole(text: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"batches: whole numbers like 1,16 expected, got {text!r}")
    return int(text)


def _positive(option: str, number: int) -> int:
    return _at_least(option, number, 1)


def _at_least(option: str, number: int, least: int) -> int:
    if number < least:
        raise InputError(f"{option}: at least {least} expected, got {number}")
    return number
