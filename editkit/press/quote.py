"""Finding recorded results by name, for the book's roles and directives."""

from __future__ import annotations

import re

from ..base.errors import DataError
from .format import format_value

_TARGET = re.compile(r"(?P<alias>[a-z0-9][\w.-]*)?(?:@(?P<which>run|reference))?(?::(?P<key>.+))?", re.S)


class Lookup(DataError):
    """A quoted run, number, table or figure does not exist; the message names what there is."""


class Runs:
    """The runs the book may quote: {alias: {"run": sidecar, "reference": sidecar}}."""

    def __init__(self, manifest: dict[str, dict]):
        self.manifest = manifest

    def find(self, alias: str, which: str | None = None, page: str | None = None) -> tuple[dict, str]:
        """(sidecar, "run" or "reference"): `which` if given, else this run, else the reference.

        A stale result gives way to one that is not, except on the run's own page, which shows what was executed.
        """
        if alias not in self.manifest:
            raise Lookup(f"there is no run {alias!r}; the book has: {', '.join(self.manifest) or 'none'}")
        entry = self.manifest[alias]
        there = [kind for kind in ("run", "reference") if kind in entry]
        which = which or (
            there[0] if page == alias else min(there, key=lambda kind: bool(entry[kind].get("stale")))
        )
        if which not in entry:
            raise Lookup(f"run {alias!r} has no {which} result")
        return entry[which], which

    def item(self, target: str, kind: str, page: str | None = None) -> tuple[dict, dict, str, str]:
        """(record, sidecar, alias, which) of "alias[@which]:key" among the values, tables or figures."""
        match = _TARGET.fullmatch(target.strip())
        alias = match and (match["alias"] or page)
        if not match or not alias or not match["key"]:
            raise Lookup(f"{target!r} should read alias:key")
        sidecar, which = self.find(alias, match["which"], page)
        key = match["key"].strip()
        if key not in sidecar[kind]:
            raise Lookup(f"run {alias!r} recorded no {kind[:-1]} {key!r}; it has: {', '.join(sidecar[kind])}")
        return sidecar[kind][key], sidecar, alias, which


def origin(sidecar: dict, which: str) -> str:
    """One line on where a result comes from."""
    commit = (sidecar["git"]["commit"] or "no commit")[:8] + ("+changes" if sidecar["git"]["dirty"] else "")
    kind = "reference run" if which == "reference" else "run"
    reasons = sidecar.get("stale") or []
    shown = ", ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    old = f"; STALE: {shown}" if reasons else ""
    return f"{kind} {sidecar['run_id']}, commit {commit}, {sidecar['started'][:10]}{old}"


def marks(sidecar: dict, which: str) -> list[str]:
    """Words that stand beside whatever is quoted from a result: "ref" for a reference, "stale" where inputs changed."""
    return ["ref"] * (which == "reference") + ["stale"] * bool(sidecar.get("stale"))


def other_execution(entry: dict) -> bool:
    """Whether this run and the reference run are both there and are two executions, not one and its copy."""
    run, reference = entry.get("run"), entry.get("reference")
    return run is not None and reference is not None and run["started"] != reference["started"]


def agreement(mine: dict, reference: dict) -> str:
    """How two records of one number compare: "equal" as printed, "overlap" or "apart" by their intervals, "differs".

    "differs": not equal as printed, and at least one of the two has no interval.
    """
    if format_value(mine) == format_value({**reference, "fmt": mine.get("fmt")}):
        return "equal"
    ends = [record[end] for record in (mine, reference) for end in ("lo", "hi")]
    if not all(isinstance(end, (int, float)) for end in ends):
        return "differs"
    return "overlap" if mine["lo"] <= reference["hi"] and reference["lo"] <= mine["hi"] else "apart"
