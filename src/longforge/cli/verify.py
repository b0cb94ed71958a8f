"""`longforge verify`."""

import json
import sys
from typing import Annotated

import typer

__all__ = ["verify"]


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder. Without one, the shipped demo model.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
) -> None:
    """Prove on this machine that the engine's features change nothing: cache, chunks, batches, drafts,
    preemption, tiers, selection, dialects, new weights.

    Exit code 1 where a check fails.
    """
    from longforge.verify.check import as_document, as_line, passed, verdict
    from longforge.verify.subject import open_subject
    from longforge.verify.verification import about, checks

    subject = open_subject(model, device, dtype)
    told = []
    for check in checks(subject):
        told.append(check)
        print(as_line(check), file=sys.stderr if as_json else sys.stdout, flush=True)
    print(json.dumps(as_document(told, about(subject))) if as_json else verdict(told))
    if not passed(told):
        raise typer.Exit(1)
