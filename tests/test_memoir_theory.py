"""What the derivation page states about overlap, interference and minimal overwrite, checked numerically."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, NumericsError
from editkit.methods.memory.calibration import (
    Null,
    expected_overlap,
    from_data,
    gaussian_correlation,
    gaussian_ratio,
)
from editkit.methods.memory.tophash import TopHash


@given(st.integers(2, 400), st.floats(0.02, 1.0), st.floats(0, 1))
def test_tail_bounds_hold_and_serfling_is_sharper(d, share, threshold):
    null = Null(d, max(1, int(share * d)))
    exact = null.log_tail(threshold)
    if threshold > null.mean:
        assert exact <= null.log_serfling(threshold) + 1e-9 <= null.log_hoeffding(threshold) + 2e-9
    overlaps = np.arange(null.k + 1)
    pmf = null.pmf(overlaps)
    ratio = overlaps / null.k
    assert pmf @ ratio == pytest.approx(null.mean)
    assert pmf @ (ratio - null.mean) ** 2 == pytest.approx(null.sd**2, abs=1e-12)
    least = math.ceil(threshold * null.k - 1e-9)
    assert math.exp(exact) == pytest.approx(pmf[least:].sum(), abs=1e-9)


@pytest.mark.parametrize("d, k, mean, sd, log10", [
    (14336, 4096, 0.2857, 0.00597, -78.6), (11008, 4096, 0.3721, 0.00598, -5.8), (6400, 1024, 0.16, 0.0105, -94.7),
])  # fmt: skip
def test_numbers_of_published_models(d, k, mean, sd, log10):
    null = Null(d, k)
    assert null.mean == pytest.approx(mean, abs=1e-4) and null.sd == pytest.approx(sd, abs=1e-5)
    assert null.log_tail(0.4) / math.log(10) == pytest.approx(log10, abs=0.1)


def test_masks_of_independent_features_follow_the_null():
    d, k = 256, 73
    generator = torch.Generator().manual_seed(0)
    hash_ = TopHash(torch.zeros(d), torch.randperm(d, generator=generator), k)
    masks = hash_(torch.randn(400, d, generator=generator)).double()
    pairs = (masks @ masks.T / k)[np.triu_indices(400, 1)].numpy()
    null = Null(d, k)
    assert pairs.mean() == pytest.approx(null.mean, abs=4 * null.sd / np.sqrt(400))
    assert pairs.std() == pytest.approx(null.sd, rel=0.03)


@given(st.integers(3, 60), st.integers(0, 50))
def test_unequal_columns_overlap_more(d, seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, d))
    q = rng.random(d)
    q = q / q.sum() * k
    assert expected_overlap(q, k) >= k / d - 1e-12
    assert expected_overlap(np.full(d, k / d), k) == pytest.approx(k / d)


def test_expected_overlap_of_drawn_masks():
    """Masks that take column j with probability q_j, drawn independently of each other."""
    rng = np.random.default_rng(0)
    q = np.linspace(0.05, 0.95, 40)
    k = q.sum()
    a, b = (rng.random((40_000, 40)) < q for _ in range(2))
    assert (a & b).sum(1).mean() / k == pytest.approx(expected_overlap(q, k), abs=0.003)


@pytest.mark.parametrize(
    "rho, p, ratio", [(0.0, 0.2857, 0.286), (0.5, 0.2857, 0.395), (0.9, 0.2857, 0.719), (0.7, 0.16, 0.442)]
)
def test_gaussian_ratio_and_its_inverse(rho, p, ratio):
    assert gaussian_ratio(rho, p) == pytest.approx(ratio, abs=1e-3)
    if rho:
        assert gaussian_correlation(ratio, p) == pytest.approx(rho, abs=5e-3)


@given(st.integers(10, 60), st.integers(1, 9), st.integers(0, 50))
def test_interference_is_the_inner_product_on_common_columns(d, t, seed):
    """Equation (5): what edit j's update changes at edit i, and its exact zero for disjoint masks."""
    rng = np.random.default_rng(seed)
    m, k = 4, int(rng.integers(1, d // 2 + 1))
    a_i, a_j, delta = rng.normal(size=(t, d)), rng.normal(size=(t, d)), rng.normal(size=(t, m))
    M_i, M_j = np.zeros(d), np.zeros(d)
    M_i[rng.permutation(d)[:k]] = 1
    M_j[rng.permutation(d)[:k]] = 1
    update = delta.T @ (a_j * M_j)  # dW = sum_s delta_s (M_j o a_js)^T
    change = (a_i * M_i) @ update.T
    common = (M_i * M_j).astype(bool)
    assert np.allclose(change, (a_i[:, common] @ a_j[:, common].T) @ delta)
    assert not (update[:, M_j == 0]).any()
    if not common.any():
        assert not change.any()


def test_random_masks_keep_a_share_p_squared_of_the_interference_energy():
    rng = np.random.default_rng(1)
    d, k, n = 400, 100, 4000
    a_i, a_j = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    M_i, M_j = (np.argsort(rng.random((n, d)), 1) < k for _ in range(2))
    masked = ((a_i * a_j * M_i * M_j).sum(1) ** 2).mean()
    assert masked / ((a_i * a_j).sum(1) ** 2).mean() == pytest.approx((k / d) ** 2, rel=0.15)


# --- calibration --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 0.99))
def test_calibrated_threshold_keeps_its_rate(ratios, rate):
    found = from_data(ratios, rate)
    assert np.mean(np.asarray(ratios) >= found.threshold) <= rate + 1e-9
    assert found.false_positives <= rate + 1e-9 and found.false_positives <= found.false_positives_upper <= 1
    # and no smaller observed ratio would do
    below = [r for r in ratios if r < found.threshold]
    assert np.mean(np.asarray(ratios) >= max(below)) > rate


def test_calibration_reports_rephrases():
    found = from_data([0.3, 0.35, 0.4, 0.5], 0.25, [0.38, 0.45, 0.6, 0.7])
    assert found.threshold == pytest.approx(0.425) and found.false_positives == 0.25
    assert found.true_positives == 0.75 and found.n_rephrases == 4
    assert math.isnan(from_data([0.3], 0.0).true_positives)


def test_threshold_from_the_null():
    null = Null(1024, 293)
    for n, rate in ((1, 0.01), (1000, 0.01), (15_000, 1e-6)):
        t = null.threshold(n, rate)
        assert n * math.exp(null.log_tail(t)) <= rate < n * math.exp(null.log_tail(t - 1 / null.k))
    assert Null(4, 4).threshold(10, 0.5) > 1


def test_bad_input():
    with pytest.raises(ConfigError, match="the layer has 10"):
        Null(10, 11)
    for action in (lambda: from_data([0.5], 1.0), lambda: Null(10, 5).threshold(1, 0.0)):
        with pytest.raises(ConfigError, match="rate must lie"):
            action()
    with pytest.raises(ConfigError, match="n_edits"):
        Null(10, 5).threshold(0, 0.1)
    for bad in ([], [math.nan]):
        with pytest.raises(NumericsError, match="finite overlap ratios"):
            from_data(bad, 0.1)
    with pytest.raises(NumericsError, match="add up to"):
        expected_overlap(np.ones(5), 3)
    with pytest.raises(ConfigError, match="rho"):
        gaussian_ratio(1.0, 0.2)
    with pytest.raises(ConfigError, match="lies outside"):
        gaussian_correlation(0.1, 0.3)


# --- the page -----------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "book" / "memoir" / "derivation.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="the book is not part of this installation")
def test_the_derivation_page_runs_and_its_references_have_labels():
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert len(blocks) >= 5
    page: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), page)
    labels = Counter(re.findall(r"^:label: (\S+)$", text, flags=re.M))
    assert max(labels.values()) == 1
    used = re.findall(r"\{(?:eq|prf:ref|ref)\}`([^`]+)`", text)
    assert used and set(used) <= set(labels)
