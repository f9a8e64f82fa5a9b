"""Figures of the papers, as printed or collected: never computed here, never mixed with ours; one file a paper.

    table("labyrinth", "main")     a data frame         source("labyrinth", "main")     where it comes from

clare      gain: relative improvement of Spearman's correlation over GradSim per model (fraction); cost: factors by
           which CLaRE is faster and smaller than GradSim
labyrinth  main: percent, metric and metric_std; edits "20 x 100" or "1 x 2000"; Flu is the n-gram entropy times 100,
           Con the TF-IDF cosine times 100, zsRE has neither; ablation: Llama-3-8B, 20 x 100; latest: six tasks
memoir     zsre, zsre_1000, long_run, ripple, ablation, main: shares 0..1, NaN where unknown
horse      gains: points over previous methods
"""

from __future__ import annotations

import json
from importlib.resources import files

import pandas as pd

from ...base.config import check_known


def table(paper: str, name: str) -> pd.DataFrame:
    """The table as it stands in the file. Raises ConfigError for a paper or table that is not there."""
    found = _load(paper, name)
    return pd.DataFrame(found["rows"], columns=found["columns"])


def source(paper: str, name: str) -> str:
    """Where the figures of the table come from, and how they were read."""
    return _load(paper, name)["source"]


def _load(paper: str, name: str) -> dict:
    folder = files(__name__)
    check_known(
        [f"{paper}.json"], [f.name for f in folder.iterdir() if f.suffix == ".json"], "published file"
    )
    tables = json.loads((folder / f"{paper}.json").read_text(encoding="utf-8"))
    check_known([name], tables, f"published table of {paper}:")
    return tables[name]
