"""Results of the scripts in benchmarks/: JSON files that pages quote, and the one table of them all.

A number is named by file and path: `targets:speed_up_processor_time`, `recursive_d4096:engines/inverse/relative_error`.
Keys of JSON objects are joined by "/", since they may hold dots and blanks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .format import format_number
from .quote import Lookup

FOLDER = "benchmarks/results"
STAGED = "_benchmarks"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. name: file.   path: of the ratio.   bar: what was asked for, or "".   spec: format.

    unit: "times faster", or what else the ratio says.
    """

    name: str
    what: str
    against: str
    path: str
    bar: str = ""
    unit: str = "times faster"
    spec: str = ".1f"


_ENGINE = "engines/inverse/speed_up_processor_time/"
_BATCH, _ALONE = "speed_up_processor_time/", "one text at a time, whole model"
_PAIRS, _PRODUCT = "widths/{}/ratio/processor/top_k/of_medians", "bare product of all pairs"
_FILES = "steps/{}/speed_up/files / memory, known facts (processor)"
_READ = "processor_seconds/{}/ratio"
_RECURSIVE, _STREAM = "recursive_d4096", "a batch of 100, d = 4,096"
_MEMOIR, _PLAIN = "edits/15000/batch 32/{}/overhead", "forward pass without memory"
ROWS = (
    Row("targets", "targets of 100 facts", "one fact at a time, as released", "speed_up_processor_time", "8"),
    Row("batching", "keys of 100 facts", _ALONE, _BATCH + "keys"),
    Row("batching", "second moment of 300 texts", _ALONE, _BATCH + "covariance"),
    Row("batching", "evaluation of 200 answers", _ALONE, _BATCH + "evaluation"),
    Row("reading", "free texts of 12 facts", "one fact at a time", _READ.format("free texts")),
    Row(
        "reading",
        "unedited model, for 4 methods",
        "read anew for each",
        _READ.format("unedited model, 4 methods"),
    ),
    Row(
        "reading", "second moment of 1,000 texts", "full products", _READ.format("second moments, one layer")
    ),
    Row("reading", "300 greedy continuations", "in the given order", _READ.format("greedy continuations")),
    Row(_RECURSIVE, _STREAM, "AlphaEdit as released (LU)", _ENGINE + "released_alphaedit", "10"),
    Row(_RECURSIVE, _STREAM, "MEMIT with history as released (LU)", _ENGINE + "released_memit_seq", "10"),
    Row(_RECURSIVE, _STREAM, "one-time solution (Cholesky)", _ENGINE + "one_time"),
    Row(_RECURSIVE, _STREAM, "one Cholesky and two solves", _ENGINE + "lean_cholesky"),
    Row("hypernet_cache_companion", "HORSE, a step of 32 facts", "rows in files", _FILES.format(32)),
    Row("hypernet_cache_companion", "HORSE, a step of 128 facts", "rows in files", _FILES.format(128)),
    Row(
        "all_pairs",
        "graph of 11,427 facts, width 256",
        _PRODUCT,
        _PAIRS.format(256),
        "",
        "times its time",
        ".2f",
    ),
    Row(
        "all_pairs",
        "graph of 11,427 facts, width 1,024",
        _PRODUCT,
        _PAIRS.format(1024),
        "",
        "times its time",
        ".2f",
    ),
    Row(
        "memoir_lookup", "MEMOIR, 15,000 edits, bypassed", _PLAIN, _MEMOIR.format("miss"), "", "on top", ".1%"
    ),
    Row("memoir_lookup", "MEMOIR, 15,000 edits, read", _PLAIN, _MEMOIR.format("hit"), "", "on top", ".1%"),
)


def load(folder: Path) -> dict[str, dict]:
    """{file name without suffix: report} of a folder of results."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def value(reports: dict[str, dict], target: str) -> Any:
    """The entry behind "name:path/to/key"; raises Lookup with what there is instead."""
    name, colon, path = target.strip().partition(":")
    if not colon or name not in reports:
        raise Lookup(f"{target!r}: no benchmark {name!r}; there are {', '.join(reports)}")
    entry: Any = reports[name]
    keys = path.split("/")
    while keys:
        # Keys may contain the separator themselves: the longest that fits is taken.
        fitting = ["/".join(keys[:k]) for k in range(len(keys), 0, -1)]
        key = next((k for k in fitting if isinstance(entry, dict) and k in entry), None)
        if key is None:
            known = ", ".join(entry) if isinstance(entry, dict) else f"the value {entry!r}"
            raise Lookup(f"{target!r}: nothing at {'/'.join(keys)!r}; here is {known}")
        entry, keys = entry[key], keys[key.count("/") + 1 :]
    return entry


def formatted(reports: dict[str, dict], text: str) -> str:
    """ "name:path ; spec" as printed; a factor before the spec ("; * 1000 .2f") changes the unit."""
    target, _, spec = text.partition(";")
    number = value(reports, target)
    spec, factor = spec.strip(), 1.0
    if spec.startswith("*"):
        scale, _, spec = spec[1:].strip().partition(" ")
        factor = float(scale)
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return str(number)
    return format_number(number * factor if factor != 1.0 else number, spec or None)


def origin(report: dict) -> str:
    """Machine, threads, load and commit of a report, in one line."""
    about = report["provenance"]
    machine, git = about["hardware"], about["git"]
    load = report.get("load_average", report.get("load_average_while_timing"))
    if isinstance(load, list):
        load = max(load)
    if load is None and "widths" in report:
        load = max(max(width["load_average_while_timing"]) for width in report["widths"].values())
    busy = f", load {load:.1f}" if load is not None else ", load not recorded"
    device = ", ".join(machine["accelerators"]) or "no GPU"
    commit = (git["commit"] or "no commit")[:8] + (" and changes" if git["dirty"] else "")
    cores = (
        f"{machine['processor']}, {machine['cores']} cores, {device}, {machine['torch_threads']} thread(s)"
    )
    return f"{cores}{busy}; commit {commit}"


def table(reports: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table of all results. Raises Lookup for a row without its number, and for a file without
    a row.
    """
    if forgotten := sorted({*reports} - {row.name for row in ROWS}):
        raise Lookup(f"benchmarks/results has {forgotten}, which no row of editkit.press.benchmarks shows")
    body = []
    for row in ROWS:
        ratio = value(reports, f"{row.name}:{row.path}")
        bar = f"at least {row.bar}: {'met' if ratio >= float(row.bar) else 'missed'}" if row.bar else ""
        shown = f"{format_number(ratio, row.spec)} {row.unit}"
        body.append([row.what, row.against, shown, bar, f"{row.name}.json", origin(reports[row.name])])
    return ["what", "against", "ratio, processor time", "asked for", "file", "measured on"], body
