"""From the rows of `measure` to tables: means with intervals, paired differences, agreement of scorers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ...base.config import check_known
from ...base.errors import DataError
from ...scoring import Interval, bootstrap_mean

WANTED = ("efficacy", "paraphrase", "neighborhood", "same_subject", "locality", "consequence")
ABILITY = ("recall", "log_perplexity")


def means(rows: pd.DataFrame, *, n_boot: int = 1000) -> pd.DataFrame:
    """One row per method, regime, protocol and axis: mean, lo, hi (95 %, units inside seeds), n."""
    by = ["method", "regime", "protocol", "axis"]
    found = []
    for key, part in rows.groupby(by, sort=False):
        interval = bootstrap_mean(part["success"], part["seed"].to_numpy(), n_boot=n_boot)
        found.append({**dict(zip(by, key, strict=True)), "mean": interval.mean, "lo": interval.lo,
                      "hi": interval.hi, "n": interval.n})  # fmt: skip
    return pd.DataFrame(found)


def difference(a: pd.DataFrame, b: pd.DataFrame, *, n_boot: int = 1000) -> Interval:
    """Mean of a - b over the same units of the same seeds (one axis each), with a 95 % interval.

    Where no unit differs, the interval is +- the exact binomial bound on the share of units that would.
    Raises DataError if the units are not the same.
    """
    x, y = (t.set_index(["seed", "unit"])["success"] for t in (a, b))
    if not len(x) or set(x.index) != set(y.index):
        raise DataError("a paired difference needs the same units on both sides; score both on one list")
    gap = x - y.reindex(x.index)
    found = bootstrap_mean(gap.to_numpy(), gap.index.get_level_values("seed").to_numpy(), n_boot=n_boot)
    if not gap.any():
        return Interval(0.0, -found.hi, found.hi, found.n, "equal")
    if gap.nunique() == 1:  # e.g. 1 everywhere: the bound of a share, from below
        width = 1 - bootstrap_mean(np.ones(len(gap)), n_boot=1).lo
        value = float(gap.iloc[0])
        return Interval(
            value, max(-1.0, value - width), min(1.0, value + width), len(gap), "equal differences"
        )
    return found


def against(rows: pd.DataFrame, baseline: str, protocol: str, *, n_boot: int = 1000) -> pd.DataFrame:
    """Every method minus the baseline, per regime and axis: method, regime, axis, mean, lo, hi, n.

    protocol: that of the scores; "ability" gives recall and log perplexity. Raises ConfigError for a baseline that
    was not run.
    """
    check_known([baseline], rows["method"].unique(), "method")
    part = rows[rows["protocol"] == protocol]
    found = []
    for (regime, axis), table in part.groupby(["regime", "axis"], sort=False):
        one = dict(list(table.groupby("method", sort=False)))
        for method, own in one.items():
            if method == baseline or baseline not in one:
                continue
            x = difference(own, one[baseline], n_boot=n_boot)
            found.append({"method": method, "regime": regime, "axis": axis, "mean": x.mean, "lo": x.lo, "hi": x.hi,
                          "n": x.n})  # fmt: skip
    return pd.DataFrame(found)


def agreement(summary: pd.DataFrame, *, without: Sequence[str] = ("unedited",)) -> pd.DataFrame:
    """Spearman's rank correlation of the methods' order under two protocols, per regime and axis.

    summary: from `means`. Columns regime, axis, first, second, rho, n (methods). rho is NaN where one protocol
    gives all methods the same score, i.e. cannot rank them.
    """
    part = summary[~summary["method"].isin(without) & (summary["protocol"] != "ability")]
    found = []
    for (regime, axis), table in part.groupby(["regime", "axis"], sort=False):
        wide = table.pivot(index="method", columns="protocol", values="mean")
        names = list(wide.columns)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                pair = wide[[first, second]].dropna()
                varies = len(pair) > 2 and (pair.nunique() > 1).all()
                rho = float(stats.spearmanr(*pair.to_numpy().T).statistic) if varies else np.nan
                found.append({"regime": regime, "axis": axis, "first": first, "second": second, "rho": rho,
                              "n": len(pair)})  # fmt: skip
    return pd.DataFrame(found)


def balance(summary: pd.DataFrame, protocol: str, axes: Sequence[str] = WANTED[:5]) -> pd.Series:
    """Harmonic mean over axes of each method's averages (as the Score of ROME and MEMIT), by (regime, method)."""
    part = summary[(summary["protocol"] == protocol) & summary["axis"].isin(axes)]
    wide = part.pivot_table(index=["regime", "method"], columns="axis", values="mean", sort=False)
    if set(axes) - set(wide.columns):
        raise DataError(f"no scores on {', '.join(sorted(set(axes) - set(wide.columns)))}")
    values = wide[list(axes)].to_numpy()
    safe = np.where(values > 0, values, 1.0)
    score = np.where((values > 0).all(1), stats.hmean(safe, axis=1), 0.0)
    return pd.Series(score, index=wide.index, name="balance")


def ranks(summary: pd.DataFrame, regime: str, axis: str) -> pd.DataFrame:
    """Rank (1 = best, ties averaged) of every method under every protocol: index method, columns protocols."""
    part = summary[
        (summary["regime"] == regime) & (summary["axis"] == axis) & (summary["protocol"] != "ability")
    ]
    wide = part[part["method"] != "unedited"].pivot(index="method", columns="protocol", values="mean")
    return wide.rank(ascending=False)
