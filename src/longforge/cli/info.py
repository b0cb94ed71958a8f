"""`longforge info`."""

import json
from typing import Annotated

import typer

__all__ = ["info"]


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET_OR_PATH",
            help="m2, m3, micro, mini, or a model folder. Without one, the shipped demo model.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what a model is made of: parameters, and bytes per token of context (bf16)."""
    from longforge.model import shipped
    from longforge.model.info import find_config, model_info

    facts = model_info(find_config(shipped.path() if model is None else model))
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):{width}}{_readable(value)}")


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {kind}" for kind, count in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)
