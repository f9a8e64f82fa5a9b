"""Which overlap of two TopHash masks means something: the hypergeometric null, its tail, and data.

Null model: two masks are independent uniform k-subsets of d columns. Their overlap X is Hypergeometric(d, k, k):

    E[X/k] = p = k/d,    Var[X/k] = p (1 - p) (d - k) / (k (d - 1)),
    P(X/k >= p + eps) <= exp(-2 k eps^2)                        (Hoeffding, sampling without replacement)

If column j is taken with probability q_j instead, E X = sum_j q_j^2 >= k^2/d: the null is a lower bound, and a
threshold has to be checked on prompts that have nothing to do with the edits (`from_data`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from ...base.errors import ConfigError, NumericsError
from .tophash import check_k


@dataclasses.dataclass(frozen=True)
class Null:
    """Overlap ratio X/k of two random masks of k out of d columns."""

    d: int
    k: int

    def __post_init__(self) -> None:
        check_k(self.k, self.d)

    @property
    def mean(self) -> float:
        """k/d."""
        return self.k / self.d

    @property
    def sd(self) -> float:
        """Standard deviation of the ratio."""
        if self.d == 1:
            return 0.0
        p = self.mean
        return math.sqrt(p * (1 - p) * (self.d - self.k) / (self.k * (self.d - 1)))

    def log_tail(self, threshold: float) -> float:
        """Natural log of P(X/k >= threshold), exact."""
        least = math.ceil(threshold * self.k - 1e-9)
        return float(stats.hypergeom(self.d, self.k, self.k).logsf(least - 1))

    def log_hoeffding(self, threshold: float) -> float:
        """Natural log of Hoeffding's bound on that probability (0 where the threshold is below the mean)."""
        return -2 * self.k * max(0.0, threshold - self.mean) ** 2

    def log_serfling(self, threshold: float) -> float:
        """Natural log of Serfling's sharper bound, which knows that draws are without replacement."""
        return self.log_hoeffding(threshold) / (1 - (self.k - 1) / self.d)

    def pmf(self, overlaps: np.ndarray) -> np.ndarray:
        """P(X = overlap)."""
        return stats.hypergeom(self.d, self.k, self.k).pmf(overlaps)

    def threshold(self, n_edits: int, rate: float) -> float:
        """Smallest ratio that a random query reaches with one of n stored masks with at most this probability.

        By the union bound, n P(X >= threshold k) <= rate. Above 1 if no ratio is safe.
        """
        _check_rate(rate)
        if n_edits < 1:
            raise ConfigError(f"n_edits must be at least 1, got {n_edits}")
        overlaps = np.arange(self.k + 2)
        tail = stats.hypergeom(self.d, self.k, self.k).logsf(overlaps - 1)
        return float(overlaps[np.argmax(tail + math.log(n_edits) <= math.log(rate))] / self.k)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold for a wanted false-positive rate, with what the data say about it.

    threshold: smallest overlap ratio at which at most `rate` of the unrelated prompts are taken for an edit.
    false_positives, false_positives_upper: their share at that threshold, and its exact 95 % upper bound.
    true_positives: share of rephrases that reach it (NaN without rephrases).   n_unrelated, n_rephrases: prompts.
    """

    threshold: float
    rate: float
    false_positives: float
    false_positives_upper: float
    true_positives: float
    n_unrelated: int
    n_rephrases: int


def from_data(
    unrelated: Sequence[float] | np.ndarray, rate: float, rephrases: Sequence[float] | np.ndarray = ()
) -> Calibration:
    """Threshold from best overlap ratios of prompts that have nothing to do with the edits.

    unrelated, rephrases: for each prompt its overlap with the nearest stored mask (`Memoir.look_up`).
    A query is taken for an edit if its ratio is at least the threshold; only ratios above all observed
    unrelated ones separate them if rate is 0. The threshold lies halfway to the next observed ratio.
    Raises ConfigError for a rate outside [0, 1) and NumericsError for no or unusable ratios.
    """
    _check_rate(rate, zero=True)
    no, yes = np.sort(np.asarray(unrelated, float)), np.asarray(rephrases, float)
    if not no.size or not np.isfinite(no).all() or not np.isfinite(yes).all():
        raise NumericsError("calibration needs finite overlap ratios of at least one unrelated prompt")
    allowed = math.floor(rate * no.size + 1e-9)
    highest = no[::-1][allowed]  # the first that must not pass
    above = np.concatenate([no, yes])
    above = above[above > highest]
    threshold = float((highest + above.min()) / 2) if above.size else _above(highest)
    false = int((no >= threshold).sum())
    upper = 1.0 if false == no.size else float(stats.beta.ppf(0.95, false + 1, no.size - false))
    return Calibration(
        threshold, rate, false / no.size, upper,
        float((yes >= threshold).mean()) if yes.size else math.nan, no.size, yes.size,
    )  # fmt: skip


def _above(value: float) -> float:
    """The next number that is larger as float32 too: memories compare their overlaps in that precision."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def expected_overlap(frequencies: np.ndarray, k: int) -> float:
    """Mean overlap ratio sum_j q_j^2 / k of independent masks that take column j with probability q_j."""
    q = np.asarray(frequencies, float)
    if abs(q.sum() - k) > 1e-6 * k:
        raise NumericsError(f"the frequencies of the columns add up to {q.sum():g}, not to k = {k}")
    return float((q**2).sum() / k)


def gaussian_ratio(rho: float, p: float) -> float:
    """Expected overlap ratio of two prompts whose centred features have correlation rho, p = k/d.

    Each coordinate pair is bivariate normal; with t = Phi^-1(1 - p/2) the ratio is P(|Z'| > t | |Z| > t).
    """
    if not 0 < p < 1 or not -1 < rho < 1:
        raise ConfigError(f"give 0 < p < 1 and -1 < rho < 1, got p = {p} and rho = {rho}")
    t = stats.norm.ppf(1 - p / 2)
    both = sum(stats.multivariate_normal(cov=[[1, r], [r, 1]]).cdf([-t, -t]) for r in (rho, -rho))
    return float(2 * both / p)


def gaussian_correlation(ratio: float, p: float) -> float:
    """The correlation at which `gaussian_ratio` gives this ratio: what a threshold asks of a rephrase."""
    low, high = gaussian_ratio(0.0, p), gaussian_ratio(0.99999, p)
    if not low <= ratio <= high:
        raise ConfigError(f"ratio = {ratio} lies outside [{low:.3f}, {high:.3f}], which p = {p} allows")
    return float(optimize.brentq(lambda r: gaussian_ratio(r, p) - ratio, 0.0, 0.99999, xtol=1e-6))


def _check_rate(rate: float, zero: bool = False) -> None:
    if not (0 <= rate < 1 if zero else 0 < rate < 1):
        raise ConfigError(f"the false-positive rate must lie in {'[' if zero else '('}0, 1), got {rate}")
