"""Data sets of model editing: one loader per corpus, each returning `Fact` objects or typed records.

    from editkit.corpora import clare
    facts = clare.load()          # 11,427 facts; they lie in the package

Loaders: clare, counterfact, zsre, selfcheck, temporal -> Facts; mquake, ripple -> typed records that hold
Facts. All take (path, limit=, on_error="raise" | "skip") and return a `Corpus`: a list with `.provenance`. The
generated world and its companion model are in `world`. May import `base` and `models`.
"""

from .base import Corpus, Provenance, Record
from .cards import CARDS
from .fetch import REGISTRY, Source

__all__ = ["CARDS", "REGISTRY", "Corpus", "Provenance", "Record", "Source"]
