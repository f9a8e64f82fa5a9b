"""Averages, intervals and tests against known results."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from editkit.base.errors import ConfigError, DataError
from editkit.scoring import bootstrap_mean, generation_gap, overall, paired_permutation_test, summarize


def table(values, axis="efficacy", **columns):
    """values: {fact_id: [success of each probe]}."""
    rows = [{"fact_id": f, "axis": axis, "success": v, **columns} for f, vs in values.items() for v in vs]
    return pd.DataFrame(rows)


def test_the_mean_is_inside_facts_first():
    df = pd.concat(
        [table({"a": [1, 1, 1, 1], "b": [0]}), table({"a": [1], "b": [np.nan, 0, 0.5]}, "paraphrase")]
    )
    result = summarize(df).set_index("axis")
    assert result.loc["efficacy", "mean"] == 0.5
    assert result.loc["paraphrase", "mean"] == pytest.approx((1 + 0.25) / 2)
    assert result.loc["paraphrase", ["n_facts", "n_probes", "n_undefined"]].tolist() == [2, 4, 1]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        interval = bootstrap_mean(rng.binomial(1, 0.7, size=60).astype(float), n_boot=300, seed=i)
        hits += interval.lo <= 0.7 <= interval.hi
    assert 0.9 <= hits / 200 <= 0.99


def test_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(2, 3, size=5000)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.method == "percentile" and interval.mean == pytest.approx(values.mean())
    assert interval.hi - interval.lo == pytest.approx(2 * half, rel=0.08)


def test_resampling_facts_is_wider_than_resampling_probes():
    rng = np.random.default_rng(2)
    facts = {str(i): [float(rng.random() < 0.5)] * 10 for i in range(30)}  # ten equal probes each
    clustered = summarize(table(facts)).iloc[0]
    naive = bootstrap_mean([v for vs in facts.values() for v in vs])
    assert clustered["hi"] - clustered["lo"] > 2.5 * (naive.hi - naive.lo)


def test_seeds_are_resampled_too():
    rng = np.random.default_rng(3)
    parts = [
        table({str(i): [float(rng.random() < p)] for i in range(50)}, seed=s)
        for s, p in enumerate((0.2, 0.8))
    ]
    df = pd.concat(parts)
    together = summarize(df).iloc[0]
    assert together["method"] == "two-stage percentile" and together["n_facts"] == 100
    pooled = bootstrap_mean(df["success"])
    assert together["mean"] == pytest.approx(pooled.mean)
    assert together["hi"] - together["lo"] > 2 * (pooled.hi - pooled.lo)
    assert summarize(df, ["seed", "axis"])["n_facts"].tolist() == [50, 50]


def test_perfect_scores_are_not_certain():
    interval = bootstrap_mean(np.ones(20))
    assert interval.hi == 1 and interval.lo == pytest.approx(0.025 ** (1 / 20))
    assert bootstrap_mean(np.zeros(20)).hi == pytest.approx(1 - 0.025 ** (1 / 20))


def test_small_and_empty_samples():
    assert np.isnan(bootstrap_mean([0.5]).lo)
    assert bootstrap_mean([0.5, 0.5]).lo == 0.5
    assert bootstrap_mean([np.nan]).n == 0 and np.isnan(bootstrap_mean([np.nan]).mean)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(4).random(40)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_overall_score_is_the_harmonic_mean_of_the_averages():
    summary = pd.DataFrame({
        "editor": ["x"] * 3 + ["y"] * 3 + ["z"],
        "axis": ["efficacy", "paraphrase", "neighborhood"] * 2 + ["efficacy"],
        "mean": [1.0, 0.5, 0.25, 1.0, 0.0, 1.0, 1.0],
    })  # fmt: skip
    result = overall(summary).set_index("editor")["S"]
    assert result["x"] == pytest.approx(3 / (1 + 2 + 4)) and result["y"] == 0 and np.isnan(result["z"])
    assert overall(summary[:3].drop(columns="editor"))["S"].tolist() == [pytest.approx(3 / 7)]


def test_permutation_test_is_exact_for_few_facts():
    a = table({str(i): [1.0] for i in range(6)})
    b = table({str(i): [0.0, 0.5] for i in range(6)})
    result = paired_permutation_test(a, b)
    assert result.difference == 0.75 and result.n == 6
    assert result.pvalue == pytest.approx(
        2 / 2**6
    )  # of the 64 sign patterns, the observed one and its mirror


def test_permutation_test_agrees_with_the_t_test():
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, 80)
    y = x + rng.normal(0.2, 0.8, 80)
    a, b = (table({str(i): [v] for i, v in enumerate(values)}) for values in (x, y))
    shuffled = b.sample(frac=1, random_state=0)
    result = paired_permutation_test(a, shuffled)
    assert result.pvalue == pytest.approx(stats.ttest_rel(x, y).pvalue, abs=0.01)


@pytest.mark.parametrize("call, error, message", [
    (lambda df: summarize(df, []), ConfigError, "at least one"),
    (lambda df: summarize(df, ["editor"]), DataError, "no column 'editor'"),
    (lambda df: bootstrap_mean([1, 2], confidence=95), ConfigError, "inside"),
    (lambda df: overall(df), DataError, "summarize"),
    (lambda df: paired_permutation_test(df, df[:1]), DataError, "same facts"),
    (lambda df: paired_permutation_test(pd.concat([df, df.assign(axis="x")]), df), DataError, "mixes"),
    (lambda df: generation_gap(df.assign(protocol="generate")), DataError, "both protocols"),
])  # fmt: skip
def test_unusable_tables(call, error, message):
    with pytest.raises(error, match=message):
        call(table({"a": [1.0], "b": [0.0]}))
