"""Figures of the MEMOIR paper, as collected: never computed here, never mixed with ours."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

_FILE = Path(__file__).with_name("published.json")


def table(name: str) -> pd.DataFrame:
    """One of "zsre", "zsre_1000", "long_run", "ripple"; shares 0..1, NaN where unknown."""
    found = json.loads(_FILE.read_text(encoding="utf-8"))[name]
    return pd.DataFrame(found["rows"], columns=found["columns"])


def source(name: str) -> str:
    """Where a table comes from."""
    return json.loads(_FILE.read_text(encoding="utf-8"))[name]["source"]
