"""Command line: `editkit run | book | collect | train | doctor | conformance | fetch`.

Each subcommand lives with the code it belongs to, in a module with `add_parser(subparsers)`; this file only
collects them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

from .errors import EditkitError

COMMAND_MODULES = (
    "editkit.runs.command",
    "editkit.world.command",
    "editkit.corpora.command",
    "editkit.conformance.command",
    "editkit.doctor",
)


def make_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; each sets `func(args) -> exit code`."""
    parser = argparse.ArgumentParser(prog="editkit", description=__doc__.split("\n", 1)[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMAND_MODULES:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Mistakes of the user end with one line and exit code 2, never with a traceback."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.func(args) or 0)
    except EditkitError as error:
        print(f"editkit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
