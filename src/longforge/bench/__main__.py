"""`python -m longforge.bench attention ...`, where only torch and what it needs are installed."""

import argparse
import sys

from longforge.bench.command import attention, defaults
from longforge.errors import LongforgeError


def main() -> None:
    """Runs the benchmark of `sys.argv` and exits: 0 done, 2 a mistake of the user or a failed check."""
    parser = argparse.ArgumentParser(prog="python -m longforge.bench")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("attention", help="MSA against dense attention and transformers' MSA")
    for name, value in defaults().items():
        option = f"--{name.replace('_', '-')}"
        if value is False:
            verb.add_argument(option, action="store_true")
        else:
            kind = float if name in ("minutes", "longest") else type(value) if value is not None else str
            verb.add_argument(option, type=int if name == "chunk" else kind, default=value)
    given = vars(parser.parse_args())
    del given["verb"]
    try:
        attention(**given)
    except LongforgeError as error:
        print(f"longforge: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
