"""Finding recorded results by name, for the book's roles and directives."""

from __future__ import annotations

import re

from ..errors import DataError

_TARGET = re.compile(r"(?P<alias>[a-z0-9][\w.-]*)?(?:@(?P<which>run|reference))?(?::(?P<key>.+))?", re.S)


class Lookup(DataError):
    """A quoted run, number, table or figure does not exist; the message names what there is."""


class Runs:
    """The runs the book may quote: {alias: {"run": sidecar, "reference": sidecar}}."""

    def __init__(self, manifest: dict[str, dict]):
        self.manifest = manifest

    def find(self, alias: str, which: str | None = None) -> tuple[dict, str]:
        """(sidecar, "run" or "reference"): `which` if given, else this run, else the reference."""
        if alias not in self.manifest:
            raise Lookup(f"there is no run {alias!r}; the book has: {', '.join(self.manifest) or 'none'}")
        entry = self.manifest[alias]
        which = which or ("run" if "run" in entry else "reference")
        if which not in entry:
            raise Lookup(f"run {alias!r} has no {which} result")
        return entry[which], which

    def item(self, target: str, kind: str, page: str | None = None) -> tuple[dict, dict, str, str]:
        """(record, sidecar, alias, which) of "alias[@which]:key" among the values, tables or figures."""
        match = _TARGET.fullmatch(target.strip())
        alias = match and (match["alias"] or page)
        if not match or not alias or not match["key"]:
            raise Lookup(f"{target!r} should read alias:key")
        sidecar, which = self.find(alias, match["which"])
        key = match["key"].strip()
        if key not in sidecar[kind]:
            raise Lookup(f"run {alias!r} recorded no {kind[:-1]} {key!r}; it has: {', '.join(sidecar[kind])}")
        return sidecar[kind][key], sidecar, alias, which


def origin(sidecar: dict, which: str) -> str:
    """One line on where a result comes from."""
    commit = (sidecar["git"]["commit"] or "no commit")[:8] + ("+changes" if sidecar["git"]["dirty"] else "")
    kind = "reference run" if which == "reference" else "run"
    return f"{kind} {sidecar['run_id']}, commit {commit}, {sidecar['started'][:10]}"
