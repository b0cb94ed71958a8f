"""The rows of the serving benchmark."""

from collections.abc import Sequence
from typing import Any

import torch

from longforge.bench.serve_rates import Spread
from longforge.observe import passport

__all__ = ["About", "Row", "headline"]

Row = dict[str, Any]


class About:
    """What every row says of the run: model, machine, versions."""

    def __init__(self, model: str) -> None:
        told = passport()
        self._about: Row = {"model": model, "threads": torch.get_num_threads()}
        self._about |= {key: told[key] for key in ("device", "cores", "utc", "commit", "dirty")}
        versions = {name: told["versions"][name] for name in ("longforge", "torch", "numba")}
        self._about["versions"] = versions | {"transformers": _transformers()}

    def row(
        self,
        measure: str,
        unit: str,
        dtype: str,
        ours: Spread,
        rival: str,
        theirs: Spread | None,
        *,
        batch: int = 1,
        prompt: int | None = None,
        tokens: int | None = None,
        note: str = "",
        **more: Any,
    ) -> Row:
        """One comparison.

        Values are medians, `_low` and `_high` quartiles over `rounds`. ratio is ours / rival_value: above 1
        is better for a rate (tokens/s), below 1 for a time (ms). prompt_tokens and new_tokens are of each of
        the `batch` requests, context is both together; null where requests differ. A rival that did not run
        has null numbers, and `note` says why; where several did, rivals has the medians of all. headline
        marks the rows that compare each side's fastest dtype.
        """
        return {
            "measure": measure,
            "unit": unit,
            "batch": batch,
            "prompt_tokens": prompt,
            "new_tokens": tokens,
            "context": None if prompt is None else prompt + (tokens or 0),
            "dtype": dtype,
            "rival_dtype": dtype,
            "ours": ours.middle,
            "ours_low": ours.low,
            "ours_high": ours.high,
            "rounds": ours.rounds,
            "rival": rival,
            "rival_value": theirs and theirs.middle,
            "rival_low": theirs and theirs.low,
            "rival_high": theirs and theirs.high,
            "ratio": None if theirs is None else ours.middle / theirs.middle,
            "headline": True,
            "note": note,
            **more,
            **self._about,
        }


def headline(rows: Sequence[Row]) -> list[Row]:
    """Rows of one point (rates), one for each dtype, with the headline: the faster dtype of each side.

    Where both sides are fastest in the same dtype that row is the headline, else a row is added that takes
    each side from its own. A side without numbers has none to be fastest with.
    """
    rows = [{**row, "headline": False} for row in rows]
    if not rows:
        return []
    ours = max(rows, key=lambda row: row["ours"])
    against = [row for row in rows if row["rival_value"] is not None]
    theirs = max(against, key=lambda row: row["rival_value"]) if against else ours
    if theirs is ours:
        ours["headline"] = True
        return rows
    taken = ("rival", "rival_dtype", "rival_value", "rival_low", "rival_high", "rivals")
    mixed = {**ours, **{key: theirs[key] for key in taken if key in theirs}, "headline": True}
    mixed["ratio"] = mixed["ours"] / mixed["rival_value"]
    return [*rows, mixed]


def _transformers() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None
