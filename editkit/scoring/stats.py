"""Averages with confidence intervals, paired tests, and the tables of the papers.

Probes of one fact are not independent, so facts (and seeds, where there are several) are the units that are
resampled: every average is taken inside a fact first and over facts then, as in ROME/MEMIT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ..base.errors import ConfigError, DataError

_BCA_LIMIT = 1000  # above, the correction changes nothing visible and its jackknife gets slow


@dataclasses.dataclass(frozen=True)
class Interval:
    """mean, its confidence interval [lo, hi], n units it was taken over, and how the interval was made."""

    mean: float
    lo: float
    hi: float
    n: int
    method: str


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    groups: Sequence | np.ndarray | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean of values (n,) with a bootstrap confidence interval. NaN values are left out.

    Without groups: scipy's bootstrap, bias-corrected and accelerated (BCa) up to 1,000 values, percentile
    above.
    With groups (n,), e.g. the seed of each value: two-stage bootstrap, groups first and values inside them
    then (percentile); the mean is over groups of equal weight. With two or three groups it is rough.
    Values that are all 0 or all 1 give the exact binomial (Clopper-Pearson) interval, since resampling them
    would claim certainty. Other constant values have a width of 0; a single one has no interval (NaN).
    """
    if n_boot < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"n_boot must be positive and confidence inside (0, 1), got {n_boot} and {confidence}"
        )
    values = np.asarray(values, dtype=float)
    keep = ~np.isnan(values)
    labels = None if groups is None else np.asarray(groups)[keep]
    values = values[keep]
    n = len(values)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0, "none")
    if np.all(values == values[0]):
        if values[0] in (0.0, 1.0):
            ci = stats.binomtest(int(values.sum()), n).proportion_ci(confidence, method="exact")
            return Interval(float(values[0]), float(ci.low), float(ci.high), n, "exact binomial")
        edge = float(values[0]) if n > 1 else np.nan
        return Interval(float(values[0]), edge, edge, n, "constant")
    if n == 1:
        return Interval(float(values[0]), np.nan, np.nan, 1, "single value")
    rng = np.random.default_rng(seed)
    if labels is not None and len(np.unique(labels)) > 1:
        parts = [values[labels == g] for g in np.unique(labels)]
        means = _two_stage(parts, n_boot, rng)
        tail = (1 - confidence) / 2
        lo, hi = np.quantile(means, [tail, 1 - tail])
        return Interval(
            float(np.mean([p.mean() for p in parts])), float(lo), float(hi), n, "two-stage percentile"
        )
    method = "BCa" if n <= _BCA_LIMIT else "percentile"
    # Batches bound the memory: n x batch resampled values at a time.
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=n_boot, confidence_level=confidence, method=method, rng=rng,
        vectorized=True, batch=max(1, 2_000_000 // n),
    ).confidence_interval  # fmt: skip
    return Interval(float(values.mean()), float(result.low), float(result.high), n, method)


def _two_stage(parts: list[np.ndarray], n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means (n_boot,): draw groups with replacement, then values inside each drawn group."""
    means = np.empty((n_boot, len(parts)))
    for b, drawn in enumerate(rng.integers(len(parts), size=(n_boot, len(parts)))):
        means[b] = [
            part[rng.integers(len(part), size=len(part))].mean() for part in (parts[i] for i in drawn)
        ]
    return means.mean(axis=1)


def per_fact(df: pd.DataFrame, by: Sequence[str], metric: str = "success") -> pd.DataFrame:
    """Mean of a metric inside each fact (and seed, if there is such a column): columns by, fact_id, [seed],
    metric.

    Probes where the metric is NaN are left out of their fact's mean.
    """
    missing = [c for c in (*by, "fact_id", metric) if c not in df.columns]
    if missing:
        raise DataError(
            f"the scores have no column {', '.join(map(repr, missing))}; they have {', '.join(df.columns)}"
        )
    unit = [*by, "fact_id"] + (["seed"] if "seed" in df.columns and "seed" not in by else [])
    return df.groupby(unit, sort=False, dropna=False)[metric].mean().reset_index()


def summarize(
    df: pd.DataFrame,
    by: Sequence[str] | None = None,
    *,
    metric: str = "success",
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Average a metric per group, with bootstrap confidence intervals over facts (and seeds).

    by: columns that define the groups; default: those of editor, protocol, when, step, axis that df has. If
    df has a column `seed` that is not in `by`, facts are resampled inside resampled seeds. Returns one row
    per group in order of appearance: by, mean, lo, hi, n_facts (facts x seeds), n_probes, n_undefined (probes
    where the metric is NaN), method. Values are in the metric's unit (success: 0..1).
    """
    if by is None:
        by = [c for c in ("editor", "protocol", "when", "step", "axis") if c in df.columns]
    by = list(by)
    if not by:
        raise ConfigError("by must name at least one column, e.g. by=['axis']")
    units = per_fact(df, by, metric)
    # By position: a key that holds None twice or more is not found by `loc`.
    counts = df.groupby(by, sort=False, dropna=False)[metric].agg(["size", "count"]).to_numpy()
    rows = []
    groups_of = units.groupby(by, sort=False, dropna=False)
    for (key, part), (size, defined) in zip(groups_of, counts.tolist(), strict=True):
        groups = part["seed"] if "seed" in part.columns and "seed" not in by else None
        interval = bootstrap_mean(part[metric], groups, n_boot=n_boot, seed=seed, confidence=confidence)
        rows.append({
            **dict(zip(by, key, strict=True)), "mean": interval.mean, "lo": interval.lo, "hi": interval.hi,
            "n_facts": interval.n, "n_probes": size, "n_undefined": size - defined, "method": interval.method,
        })  # fmt: skip
    return pd.DataFrame(rows)


def overall(
    summary: pd.DataFrame, axes: Sequence[str] = ("efficacy", "paraphrase", "neighborhood")
) -> pd.DataFrame:
    """Score S of ROME/MEMIT: harmonic mean, over axes, of the averages (not of records).

    summary: from `summarize` with "axis" among its groups. Returns one row per remaining group with column S;
    NaN if an axis is missing, 0 if one average is 0.
    """
    if not {"axis", "mean"} <= set(summary.columns):
        raise DataError(
            "the summary needs the columns 'axis' and 'mean'; make it with summarize(df, by=[..., 'axis'])"
        )
    not_groups = {"axis", "mean", "lo", "hi", "n_facts", "n_probes", "n_undefined", "method"}
    by = [c for c in summary.columns if c not in not_groups]
    rows = []
    for key, part in summary.groupby(by, sort=False, dropna=False) if by else [((), summary)]:
        means = part.set_index("axis")["mean"].reindex(list(axes)).to_numpy(dtype=float)
        S = np.nan if np.isnan(means).any() else float(stats.hmean(means)) if (means > 0).all() else 0.0
        rows.append({**dict(zip(by, key, strict=True)), "S": S})
    return pd.DataFrame(rows)


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """difference: mean of a - b over n shared units.   pvalue: two-sided, exchanging labels within pairs."""

    difference: float
    pvalue: float
    n: int


def paired_permutation_test(
    a: pd.DataFrame, b: pd.DataFrame, *, metric: str = "success", n_resamples: int = 9999, seed: int = 0
) -> PairedTest:
    """Compare two methods on the same facts (one axis each): paired permutation test of the per-fact means.

    a, b: score tables restricted to what is compared (e.g. one axis, one protocol). Facts in only one of them
    are an error, because a difference over different facts is not paired.
    """
    for name, df in (("a", a), ("b", b)):
        varying = [c for c in ("axis", "protocol", "when", "step") if c in df.columns and df[c].nunique() > 1]
        if varying:
            raise DataError(
                f"table {name} mixes several values of {', '.join(varying)}; select one before comparing"
            )
    unit = ["fact_id"] + (["seed"] if "seed" in a.columns and "seed" in b.columns else [])
    left, right = (df.groupby(unit, sort=False)[metric].mean() for df in (a, b))
    if set(left.index) != set(right.index):
        raise DataError(
            "the two tables do not hold the same facts (and seeds); score both methods on the same list"
        )
    x, y = left.to_numpy(dtype=float), right.reindex(left.index).to_numpy(dtype=float)
    keep = ~(np.isnan(x) | np.isnan(y))
    x, y = x[keep], y[keep]
    if not len(x):
        return PairedTest(np.nan, np.nan, 0)
    result = stats.permutation_test(
        (x, y), lambda u, v, axis: np.mean(u - v, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=n_resamples, rng=np.random.default_rng(seed), batch=max(1, 2_000_000 // len(x)),
    )  # fmt: skip
    return PairedTest(float(np.mean(x - y)), float(result.pvalue), len(x))


def generation_gap(df: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Teacher-forced against free generation, per axis: how much a token-accuracy score promises too much.

    df: scores that hold protocol "easyedit" (or "rome_zsre") and protocol "generate" on the same probes.
    Returns axis, teacher_forced (mean token accuracy of the answer), generated (mean exact generation), gap
    and its interval lo, hi (paired by probe, facts resampled), n_facts.
    """
    forced = df[df["protocol"].isin(["easyedit", "rome_zsre"])]
    free = df[df["protocol"] == "generate"]
    if forced.empty or free.empty:
        raise DataError("the scores need both protocols: 'easyedit' (or 'rome_zsre') and 'generate'")
    if forced["protocol"].nunique() > 1:
        raise DataError("the scores mix 'easyedit' and 'rome_zsre'; keep one of them")
    keys = ["fact_id", "axis", "kind", "prompt", "answer"] + [
        c for c in ("seed", "when", "step") if c in df.columns
    ]
    merged = (
        forced[[*keys, "token_acc"]].drop_duplicates(keys).merge(free[[*keys, "exact"]].drop_duplicates(keys))
    )
    merged["gap"] = merged["token_acc"] - merged["exact"]
    by = [c for c in ("when", "step", "axis") if c in merged.columns]
    gap = summarize(merged, by, metric="gap", n_boot=n_boot, seed=seed).rename(columns={"mean": "gap"})
    for column, metric in (("teacher_forced", "token_acc"), ("generated", "exact")):
        gap[column] = per_fact(merged, by, metric).groupby(by, sort=False)[metric].mean().to_numpy()
    return gap[[*by, "teacher_forced", "generated", "gap", "lo", "hi", "n_facts"]]
