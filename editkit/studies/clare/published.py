"""The CLaRE paper's own figures, as printed: never computed here, never mixed with ours."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ...base.config import check_known

_FILE = Path(__file__).with_name("published.json")


def table(name: str) -> pd.DataFrame:
    """ "gain": relative improvement of Spearman's correlation over GradSim per model (fraction); "cost": factors by
    which CLaRE is faster and smaller than GradSim."""
    return pd.DataFrame(_load(name)["rows"], columns=_load(name)["columns"])


def source(name: str) -> str:
    """Where the figures of a table come from."""
    return _load(name)["source"]


def _load(name: str) -> dict:
    tables = json.loads(_FILE.read_text(encoding="utf-8"))
    check_known([name], tables, "published table")
    return tables[name]
