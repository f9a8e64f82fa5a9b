"""`editkit run | collect | book`: execute a study, keep reference results, build the book (or its PDF)."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import yaml

from ..base.errors import ConfigError
from .study import Study, load_study, parse_yaml


def add_parser(subparsers) -> None:
    """Register the three subcommands."""
    run = subparsers.add_parser(
        "run",
        help="execute the notebooks of a study",
        description="Expands a study file into runs and executes those whose inputs have changed, each in a "
        "process and a temporary folder of its own. Finished runs lie in book/runs/<run id>/.",
    )
    _common(run)
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    run.add_argument("--force", action="store_true", help="execute also what is current")
    run.add_argument(
        "--list", action="store_true", help="list the runs and why each would be executed; do nothing"
    )
    run.add_argument("--one", metavar="RUN_ID", help="execute one run, by run id or alias")
    run.add_argument("-p", dest="overrides", action="append", default=[], metavar="NAME=VALUE",
                     help="set a parameter in every selected run (not shown in the book)")  # fmt: skip
    run.add_argument(
        "--keep-reference", action="store_true", help="afterwards copy the results into results/"
    )
    run.add_argument("--allow-dirty", action="store_true", help="keep references of uncommitted code, too")
    run.set_defaults(func=_run)

    collect = subparsers.add_parser(
        "collect",
        help="copy finished runs into results/ as committed reference results",
        description="Copies sidecar, figures and small tables (no notebooks) into results/<alias>/.",
    )
    _common(collect)
    collect.add_argument("--allow-dirty", action="store_true", help="accept runs of uncommitted code")
    collect.set_defaults(func=_collect)

    book = subparsers.add_parser(
        "book",
        help="build the HTML book from finished runs",
        description="Builds a strict HTML book from scratch, refusing failed notebooks; "
        "skipped when nothing has changed.",
    )
    _common(book, only=False)
    book.add_argument("--force", action="store_true", help="build even when nothing has changed")
    book.add_argument("--pdf", action="store_true", help="the derivations as a PDF instead (needs LaTeX)")
    book.set_defaults(func=_book)


def _common(parser: argparse.ArgumentParser, only: bool = True) -> None:
    parser.add_argument("study", type=Path, help="study file, e.g. studies/default.yaml")
    if only:
        parser.add_argument("--only", action="append", default=[], metavar="NAME",
                            help="only runs with this alias, id, tag or notebook (repeatable)")  # fmt: skip
    parser.add_argument("--root", type=Path, help="folder of the project (default: found upwards from here)")


def parse_override(text: str) -> tuple[str, object]:
    """("name", value) from "name=value"; the value is read as YAML (1e-5, true, [1, 2])."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"-p takes NAME=VALUE, got {text!r}")
    try:
        return name, parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"-p {text}: {error}") from error


def _load(args) -> tuple[Study, object]:
    from .layout import Layout, find_root

    root = args.root.resolve() if args.root else find_root()
    path = args.study if args.study.exists() and not args.root else root / args.study
    return load_study(path, dict(map(parse_override, getattr(args, "overrides", [])))), Layout(root)


def _run(args) -> int:
    from .execute import CURRENT, FAILED, OK, UNAVAILABLE, run_all
    from .inputs import changes, prepare

    if args.keep_reference and args.overrides:
        raise ConfigError("a reference has the parameters of its study: use --keep-reference without -p")
    # Ctrl-C means the same however we were started: what shells run in the background inherits that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    study, layout = _load(args)
    specs = [study.find(args.one)] if args.one else study.select(args.only)
    runs = prepare(specs, layout.root)
    if args.list:
        for run in runs:
            reasons = changes(run, layout)
            print(f"{run.run_id:<44} {run.spec.notebook:<36} {'; '.join(reasons) or 'current'}")
        return 0
    width = max((len(run.run_id) for run in runs), default=0)

    def report(outcome) -> None:
        note = {OK: f"done in {outcome.seconds:.1f} s", CURRENT: "unchanged, not executed"}.get(
            outcome.status
        )
        note = note or f"{outcome.status.upper()}: {outcome.message}"
        if outcome.stderr_cells:
            note += f"; cells {list(outcome.stderr_cells)} wrote to stderr"
        print(f"  {outcome.spec.run_id:<{width}}  {note}", flush=True)

    print(f"{study.title}: {len(runs)} runs")
    outcomes = run_all(runs, layout, jobs=args.jobs, force=args.force, report=report)
    count = {
        status: sum(o.status == status for o in outcomes) for status in (OK, CURRENT, UNAVAILABLE, FAILED)
    }
    print(f"{count[OK]} executed, {count[CURRENT]} unchanged, {count[UNAVAILABLE]} not available here, "
          f"{count[FAILED]} failed")  # fmt: skip
    for outcome in outcomes:
        if outcome.status == FAILED:
            log = layout.log(outcome.spec.run_id)
            where = log.relative_to(layout.root)
            print(f"failed: {outcome.spec.run_id}: {outcome.message}\n  log: {where}", file=sys.stderr)
    if args.keep_reference:
        from .reference import collect

        good = [o.spec for o in outcomes if o.status in (OK, CURRENT)]
        _print_collected(collect(good, layout, allow_dirty=args.allow_dirty))
    return 1 if count[FAILED] else 0


def _collect(args) -> int:
    from .reference import collect

    study, layout = _load(args)
    _print_collected(collect(study.select(args.only), layout, allow_dirty=args.allow_dirty))
    return 0


def _print_collected(folders: list[Path]) -> None:
    for folder in folders:
        print(f"reference kept: results/{folder.name}")


def _book(args) -> int:
    from .book import build

    study, layout = _load(args)
    if args.pdf:
        from .pdf import build_pdf

        print(f"PDF built. Open {build_pdf(study, layout)}")
        return 0
    index, built, missing = build(study, layout, force=args.force)
    print(f"{'Book built' if built else 'Book unchanged'}. Open {index}")
    for alias, why in missing.items():
        print(f"missing page: runs/{alias} ({why['status']}: {why['message']})", file=sys.stderr)
    return 1 if any(why["status"] != "unavailable" for why in missing.values()) else 0
