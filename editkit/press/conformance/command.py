"""`editkit conformance DIR`: compare editkit with recorded runs of the official implementations."""

from __future__ import annotations

import argparse
import os
import sys

import transformers

from ...base.errors import DataError
from . import runner


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the subcommand; its `func(args) -> int` returns 1 if a case failed, else 0 (2: DIR is not a
    folder).
    """
    parser = subparsers.add_parser(
        "conformance",
        help="compare with recorded runs of the official implementations",
        description="Run every recorded case at or below DIR (folders with case.json) and print a table.",
    )
    parser.add_argument("dir", metavar="DIR", help="folder with recorded cases, or one case")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every comparison of every case")
    parser.set_defaults(func=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the table and the totals. Exit code 1 when a case failed."""
    try:
        folders = runner.find_cases(args.dir)
    except DataError as error:
        print(f"editkit conformance: {error}", file=sys.stderr)
        return 2
    transformers.utils.logging.disable_progress_bar()  # one bar per loaded model would tear the table apart
    root = os.path.abspath(args.dir)
    width = max([20, *(len(os.path.relpath(os.path.abspath(f), root)) for f in folders)])
    print(runner.format_header(width))
    outcomes = []
    for outcome in runner.run(args.dir):
        outcomes.append(outcome)
        print(runner.format_row(outcome, width), flush=True)
        if args.verbose:
            for c in outcome.comparisons:
                flag = "ok" if c.passed else "FAIL"
                print(f"    {flag:<4} {c.deviation:10.2e}  {c.tolerance:9.1e}  {c.name}  {c.note}".rstrip())
            if outcome.unused:
                print(f"    not read by the adapter: {', '.join(outcome.unused)}")
    print(*runner.summary(outcomes), sep="\n")
    print(runner.totals(outcomes))
    return int(any(o.verdict == "failed" for o in outcomes))
