"""`longforge forge run|resume`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(help="Agent-native reinforcement learning.", no_args_is_help=True)

AS_JSON = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to do.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run folder to make.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace the run that is in DIR.")] = False,
    as_json: AS_JSON = False,
) -> None:
    """Measure a model's held-out success, train it through an agent's own calls, and measure again."""
    _quiet_idle_threads()
    from longforge.forge.config import load_config
    from longforge.forge.loop import Interrupted, start_run

    settings = load_config(config)
    try:
        _show(start_run(settings, out, replace=replace), out, as_json)
    except Interrupted:
        _stopped(out)


@app.command("resume")
def resume(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")], as_json: AS_JSON = False
) -> None:
    """Go on with a run that was stopped or killed."""
    _quiet_idle_threads()
    from longforge.forge.loop import Interrupted, resume_run

    try:
        _show(resume_run(path), path, as_json)
    except Interrupted:
        _stopped(path)


def _quiet_idle_threads() -> None:
    """The trainer's idle threads must not spin on the cores that the engine uses. Before torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _stopped(path: Path) -> None:
    # As it was typed: `make demo` runs a command that need not be on the PATH.
    command = f"{sys.executable} -m longforge.cli" if sys.argv[0].endswith(".py") else sys.argv[0]
    print(f"longforge: stopped; go on with: {command} forge resume {path}", file=sys.stderr)
    raise typer.Exit(130)


def _show(summary: dict[str, Any], path: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.table import Table

    from longforge.forge.summary import summary_table, text_plot

    table = Table(title=f"run {summary['name']}", title_justify="left", show_header=False)
    for row in summary_table(summary):
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(text_plot(summary), markup=False, soft_wrap=True)
    console.print(f"report: {path / 'report.html'}  plot: {path / 'plot.png'}", markup=False, soft_wrap=True)
