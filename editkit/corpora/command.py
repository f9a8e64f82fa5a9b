"""`editkit fetch`: list, download and check the files of the corpora."""

from __future__ import annotations

import argparse
import sys

from ..base.errors import DataError
from . import fetch


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the subcommand; its `func(args) -> int` returns 1 if a file is not to be had, else 0."""
    parser = subparsers.add_parser(
        "fetch",
        help="download and check the data sets",
        description="Find or download the named files and check their sha256; a copy below "
        f"${fetch.DATA_ENV} comes first. Without a name the known files are listed.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="e.g. clare, counterfact, ripple_popular")
    parser.add_argument(
        "--allow-unverified",
        action="store_true",
        help="also download files whose hash editkit does not know",
    )
    parser.set_defaults(func=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Print path, hash and licence of each file."""
    if not args.names:
        width = max(map(len, fetch.REGISTRY))
        for name, source in fetch.REGISTRY.items():
            how = "checked" if source.sha256 else "unverified" if source.url else "bring your own"
            print(f"{name:<{width}}  {how:<14}  {source.licence:<18}  {source.url or source.home}")
        return 0
    failed = 0
    for name in args.names:
        try:
            path = fetch.fetch(name, allow_unverified=args.allow_unverified)
        except DataError as error:
            print(f"editkit fetch: {error}", file=sys.stderr)
            failed += 1
            continue
        source, found = fetch.REGISTRY[name], fetch.sha256_of(path)
        verdict = (
            "checked"
            if source.sha256
            else f"same as {source.seen[found]}"
            if found in source.seen
            else "unverified"
        )
        print(
            f"{name}: {path}\n  sha256 {found} ({verdict})\n  licence: {source.licence}; from {source.home}"
        )
    return int(failed > 0)
