"""`longforge train`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Train models.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    pass


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="TOML file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run; a stopped run in it goes on.")],
    steps: Annotated[int | None, typer.Option(help="Planned steps (default: the file's).", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit (default: the file's).", min=0)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Train a model from nothing on conversations (JSONL) and text files; writes OUT/model."""
    from longforge.training.config import load_config
    from longforge.training.launch import pretrain as run
    from longforge.training.progress import TrainingBar

    plan = load_config(config).with_schedule(steps=steps, minutes=minutes)
    with TrainingBar() as bar:
        finished = run(plan, out, report=bar, device=device)
    if not finished:
        typer.echo(f"stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(130)
    typer.echo(str(out / "model"))
