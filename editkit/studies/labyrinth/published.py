"""The paper's own figures, as printed: never computed here, never mixed with ours."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

_FILE = Path(__file__).with_name("published.json")


def _load() -> dict:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def source(table: str) -> str:
    """Where the figures of a table come from."""
    return _load()[table]["source"]


def main_table(dataset: str | None = None) -> pd.DataFrame:
    """Columns dataset, edits ("20 x 100" or "1 x 2000"), model, method, then metric and metric_std, in
    percent.

    Flu is the n-gram entropy times 100, Con the TF-IDF cosine times 100; zsRE has neither.
    """
    table = _load()["main"]
    frame = pd.DataFrame(table["rows"], columns=table["columns"])
    return frame if dataset is None else frame[frame["dataset"] == dataset].reset_index(drop=True)


def ablation_table() -> pd.DataFrame:
    """Columns processing (PRUNE, RECT), configuration, Eff, Gen, Spe in percent: Llama-3-8B, 20 x 100
    edits."""
    table = _load()["ablation"]
    return pd.DataFrame(table["rows"], columns=table["columns"])


def latest_table() -> pd.DataFrame:
    """Memorize-the-latest: setting and six downstream scores, Llama-3-8B."""
    table = _load()["latest"]
    return pd.DataFrame(table["rows"], columns=table["columns"])
