"""Does a predictor know which probes an edit moves? Rank correlations with intervals and a permutation test.

Three readings of the same tables (clare.md 3.6): pooled over all (edit, probe) pairs, inside each edit, and inside
each probe. Pooled pairs are not independent: edits are what is resampled and exchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ..base.errors import ConfigError, DataError

Tables = np.ndarray | Sequence[np.ndarray]


def weighted_spearman(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Spearman of x and y (n,) where observation i counts w_i >= 0 times: that of np.repeat(x, w), np.repeat(y, w)."""
    return _correlation(_ranks(*_levels(x), w), _ranks(*_levels(y), w), w)


def _levels(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Index of each value among the sorted distinct values, and their number."""
    values, index = np.unique(x, return_inverse=True)
    return index.reshape(-1), len(values)


def _ranks(index: np.ndarray, n: int, w: np.ndarray) -> np.ndarray:
    """Mid-ranks of the weighted sample."""
    count = np.bincount(index, weights=w, minlength=n)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def _correlation(a: np.ndarray, b: np.ndarray, w: np.ndarray) -> float:
    total = w.sum()
    a, b = a - (w @ a) / total, b - (w @ b) / total
    scale = np.sqrt((w @ (a * a)) * (w @ (b * b)))
    return float((w @ (a * b)) / scale) if scale > 0 else np.nan


def row_spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman inside each row of two (rows, n) tables; NaN for a constant row."""
    a, b = (stats.rankdata(t, axis=1) for t in (x, y))
    a, b = (t - t.mean(1, keepdims=True) for t in (a, b))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Spearman correlations of one predictor with one ripple table.

    pooled, lo, hi: over all pairs, with the percentile bootstrap over edits. per_edit, per_probe: mean of the
    correlations inside rows and inside columns; per_edit_lo, per_edit_hi: bootstrap over edits. pvalue: one-sided
    permutation test of the pooled value, edits of a seed exchanged: a predictor that only knows which probes move for
    any edit does not pass. n_edits, n_pairs. by_seed: pooled value of each table.
    """

    pooled: float
    lo: float
    hi: float
    per_edit: float
    per_edit_lo: float
    per_edit_hi: float
    per_probe: float
    pvalue: float
    n_edits: int
    n_pairs: int
    by_seed: tuple[float, ...]


def agreement(
    scores: Tables, ripple: Tables, *, n_boot: int = 1000, n_permutations: int = 999, seed: int = 0
) -> Agreement:
    """Compare a predictor with measured ripples.

    scores, ripple: (n_e, n_p) tables, edits in rows; or lists of them, one per seed, whose probes may differ.
    Raises DataError for shapes that differ, NaN, or fewer than two edits.
    """
    S, R = _tables(scores), _tables(ripple)
    if [s.shape for s in S] != [r.shape for r in R]:
        raise DataError(
            f"scores {[s.shape for s in S]} and ripples {[r.shape for r in R]} differ in shape; "
            "give one (edits, probes) table per seed on both sides"
        )
    if n_boot < 2 or n_permutations < 1:
        raise ConfigError("n_boot must be at least 2 and n_permutations at least 1")
    widths = [s.shape[1] for s in S]
    x, y = (np.concatenate([t.reshape(-1) for t in T]) for T in (S, R))
    edit = np.repeat(np.arange(sum(map(len, S))), np.repeat(widths, [len(s) for s in S]))
    n_edits = int(edit[-1]) + 1
    if n_edits < 2:
        raise DataError("one edit gives no correlation over edits; measure at least two")
    for what, t in (("scores", x), ("ripples", y)):
        if not np.isfinite(t).all():
            raise DataError(f"the {what} have NaN or Inf; drop those edits or probes")
    (xi, nx), (yi, ny) = _levels(x), _levels(y)

    def pooled(drawn: np.ndarray) -> float:
        w = np.bincount(drawn.astype(int), minlength=n_edits)[edit].astype(float)
        return _correlation(_ranks(xi, nx, w), _ranks(yi, ny, w), w)

    everything = np.arange(n_edits)
    rng = np.random.default_rng(seed)
    ci = stats.bootstrap(
        (everything,), pooled, n_resamples=n_boot, vectorized=False, method="percentile", rng=rng
    ).confidence_interval
    rows = np.concatenate([row_spearman(s, r) for s, r in zip(S, R, strict=True)])
    rows = rows[~np.isnan(rows)]
    row_ci = _mean_interval(rows, n_boot, rng)
    columns = np.concatenate([row_spearman(s.T, r.T) for s, r in zip(S, R, strict=True)])
    return Agreement(
        pooled(everything), float(ci.low), float(ci.high), float(rows.mean()) if len(rows) else np.nan, *row_ci,
        float(np.nanmean(columns)) if not np.isnan(columns).all() else np.nan,
        _permutation(S, R, n_permutations, rng), n_edits, len(x),
        tuple(pooled_spearman([s], [r]) for s, r in zip(S, R, strict=True)),
    )  # fmt: skip


def pooled_spearman(scores: Tables, ripple: Tables) -> float:
    """Spearman over all (edit, probe) pairs; NaN if one side is constant."""
    x, y = (np.concatenate([t.reshape(-1) for t in _tables(T)]) for T in (scores, ripple))
    return weighted_spearman(x, y, np.ones(len(x)))


def _tables(tables: Tables) -> list[np.ndarray]:
    tables = [tables] if isinstance(tables, np.ndarray) else list(tables)
    found = [np.asarray(t, dtype=float) for t in tables]
    if not found or any(t.ndim != 2 or t.size == 0 for t in found):
        raise DataError("give non-empty tables of shape (edits, probes)")
    return found


def _mean_interval(values: np.ndarray, n_boot: int, rng: np.random.Generator) -> tuple[float, float]:
    if len(values) < 2 or np.ptp(values) == 0:
        return (float(values[0]),) * 2 if len(values) > 1 else (np.nan, np.nan)
    ci = stats.bootstrap(
        (values,), np.mean, n_resamples=n_boot, vectorized=True, method="percentile", rng=rng
    ).confidence_interval
    return float(ci.low), float(ci.high)


def _permutation(S: list[np.ndarray], R: list[np.ndarray], n: int, rng: np.random.Generator) -> float:
    """p of the pooled correlation when the edits inside each table are exchanged."""
    x, y = (stats.rankdata(np.concatenate([t.reshape(-1) for t in T])) for T in (S, R))
    parts, start = [], 0
    for s in S:
        stop = start + s.size
        parts.append((x[start:stop].reshape(s.shape), y[start:stop].reshape(s.shape)))
        start = stop
    # Ranks do not depend on the pairing, so the inner product of the ranks orders the pairings.
    products = [a @ b.T for a, b in parts]  # (edits, edits): scores of edit k against ripples of edit i

    observed = sum(np.trace(p) for p in products)
    hits = 0
    for _ in range(n):
        drawn = sum(p[rng.permutation(len(p)), np.arange(len(p))].sum() for p in products)
        hits += drawn >= observed * (1 - 1e-12)
    return (hits + 1) / (n + 1)


def agreement_table(
    scores: dict[str, Sequence[np.ndarray]], ripples: dict[str, Sequence[np.ndarray]], **options
) -> pd.DataFrame:
    """One row per editor and predictor: the fields of `Agreement`. Keys of `scores` may be (editor, predictor)."""
    rows = []
    for editor, ripple in ripples.items():
        for key, table in scores.items():
            own, name = key if isinstance(key, tuple) else (editor, key)
            if own == editor:
                found = agreement(table, ripple, **options)
                rows.append({"editor": editor, "predictor": name, **dataclasses.asdict(found)})
    return pd.DataFrame(rows)


def gain(ours: float, theirs: float) -> float:
    """Relative improvement of a correlation, (ours - theirs) / |theirs|, as the paper states it; Inf at theirs = 0."""
    return (ours - theirs) / abs(theirs) if theirs else np.inf
