"""Command line of editkit.

Each subcommand lives with the code it belongs to, in a module with `add_parser(subparsers)`; this file only
collects them, and imports no more of them than the call needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .base.errors import EditkitError

COMMANDS = {
    "run": "editkit.press.command",
    "collect": "editkit.press.command",
    "book": "editkit.press.command",
    "train": "editkit.corpora.world.command",
    "pocket": "editkit.press.pocket",
    "fetch": "editkit.corpora.command",
    "conformance": "editkit.press.conformance.command",
    "doctor": "editkit.methods.doctor",
}


def make_parser(commands=tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser with these subcommands; each sets `func(args) -> exit code`."""
    parser = argparse.ArgumentParser(
        prog="editkit", description="Model editing: methods, scorers, reproducible runs."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in dict.fromkeys(COMMANDS[name] for name in commands):
        importlib.import_module(module).add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Mistakes of the user end with one line and exit code 2, never with a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = make_parser(argv[:1]) if argv[:1] and argv[0] in COMMANDS else make_parser()
        args = parser.parse_args(argv)
        return int(args.func(args) or 0)
    except EditkitError as error:
        print(f"editkit {argv[0]}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("editkit"):
            raise
        print(
            f"editkit {argv[0]}: needs the package {error.name}: pip install 'editkit[book]'", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
