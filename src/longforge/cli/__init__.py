"""The command. One file per verb or group of verbs; whatever is heavy is imported inside the verb.

Exit codes: 0 done, 1 the doctor or `verify` found a fault, 2 a mistake of the user (one line on stderr),
70 a server's engine failed, 130 Ctrl-C; anything else is a bug.
"""

import sys
from typing import Annotated

import typer

from longforge import __version__
from longforge.cli import bench, chat, doctor, forge, info, serve, train, verify
from longforge.errors import LongforgeError

__all__ = ["app", "main"]

app = typer.Typer(
    help="A block-sparse mixture-of-experts model, its engine, and agent-native reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.command("verify")(verify.verify)
app.add_typer(train.app, name="train")
app.add_typer(forge.app, name="forge")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"longforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command of `sys.argv` and exits."""
    try:
        app()
    except LongforgeError as error:
        print(f"longforge: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
