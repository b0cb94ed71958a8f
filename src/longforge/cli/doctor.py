"""`longforge doctor`."""

import json
from typing import Annotated

import typer

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    compile_first: Annotated[
        bool, typer.Option("--compile", help="First compile every kernel that serving needs.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="With --compile: float32, bfloat16, or auto for all that serving may choose.")
    ] = "auto",
    port: Annotated[int, typer.Option(help="Port to look at.", min=1, max=65535)] = 8000,
) -> None:
    """Look at this machine: what works, what is slow, what is missing, and how to mend it.

    Exit code 1 where something fails.
    """
    from longforge.doctor.check import as_document, as_lines, healthy
    from longforge.doctor.compilation import compile_kernels
    from longforge.doctor.examination import examine

    if compile_first:
        compile_kernels(dtype)
    checks = examine(port)
    print(json.dumps(as_document(checks)) if as_json else as_lines(checks))
    if not healthy(checks):
        raise typer.Exit(1)
