"""Scoring edited models: named protocols, free text, statistics, and edit-then-score runs.

May import `base` and `models`.
"""

from .engine import TargetScore, score_targets
from .evaluate import evaluate
from .generation import Generation, generate
from .probes import AXES, expand
from .protocols import PROTOCOLS, Baseline, says, score
from .stats import (
    Interval,
    PairedTest,
    bootstrap_mean,
    generation_gap,
    overall,
    paired_permutation_test,
    summarize,
)
from .text import TfIdf, confident_share, ngram_entropy, perplexity, score_text

__all__ = [
    "AXES",
    "PROTOCOLS",
    "Baseline",
    "Generation",
    "Interval",
    "PairedTest",
    "TargetScore",
    "TfIdf",
    "bootstrap_mean",
    "confident_share",
    "evaluate",
    "expand",
    "generate",
    "generation_gap",
    "ngram_entropy",
    "overall",
    "paired_permutation_test",
    "perplexity",
    "says",
    "score",
    "score_targets",
    "score_text",
    "summarize",
]
