"""Red-teaming after an edit: which facts to ask again first, and how many changed ones that finds.

order = recheck_order(scores, exclude=~may_be_kept(edits, pool).all(0))   # facts by expected disturbance
recall_curves({"clare": s1, "random": s2}, changed)            # recall of what changed, by budget
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...base.errors import RequestError
from ...scoring.stats import bootstrap_mean


def _array(values: Tensor | np.ndarray | Sequence) -> np.ndarray:
    found = np.asarray(torch.as_tensor(np.asarray(values) if isinstance(values, list) else values).cpu())
    return found[None] if found.ndim == 1 else found


def recheck_order(
    scores: Tensor | np.ndarray,
    *,
    strength: Sequence[float] | None = None,
    exclude: np.ndarray | None = None,
    budget: int | None = None,
) -> np.ndarray:
    """Facts in the order in which to re-check them after a batch of edits: highest expected disturbance first.

    scores: (n_edits, n_facts) or (n_facts,). A fact counts by the root of the sum of (strength_i E_ij)^2, as
    updates of different edits point in unrelated directions. exclude: (n_facts,) facts that are not asked, such
    as those that ought to change. budget: only that many. Ties keep their order.
    """
    scores = _array(scores).astype(float)
    if strength is not None:
        if len(strength) != len(scores):
            raise RequestError(f"{len(scores)} edits but {len(strength)} strengths; give one per edit")
        scores = scores * np.asarray(strength, dtype=float)[:, None]
    total = np.sqrt(np.square(scores).sum(0)) if len(scores) > 1 else scores[0]
    order = np.argsort(-total, kind="stable")
    if exclude is not None:
        order = order[~np.asarray(exclude, dtype=bool)[order]]
    return order if budget is None else order[:budget]


def changed_facts(shift: Tensor | np.ndarray, quantile: float = 0.95) -> np.ndarray:
    """(n_edits, n_facts) bool: per edit the facts whose measured ripple exceeds its quantile (clare.md 7.3)."""
    shift = _array(shift).astype(float)
    if not 0 < quantile < 1:
        raise RequestError(f"quantile = {quantile}; give a share between 0 and 1")
    return shift > np.nanquantile(shift, quantile, axis=1, keepdims=True)


def recall_at(
    scores: Tensor | np.ndarray, changed: np.ndarray, exclude: np.ndarray | None = None
) -> np.ndarray:
    """Recall of the changed facts after asking the m highest: (n_edits, n_facts + 1), m = 0 ... n_facts.

    scores, changed, exclude: (n_edits, n_facts). Excluded facts are asked last and do not count as changed.
    Rows without any changed fact are NaN. Facts with equal scores are found together on average, so that a score
    that says nothing has the recall of guessing.
    """
    scores, changed = _array(scores).astype(float), _array(changed).astype(bool)
    if scores.shape != changed.shape:
        raise RequestError(f"scores are {scores.shape}, changed is {changed.shape}; give one value per pair")
    if exclude is not None:
        exclude = np.broadcast_to(exclude, scores.shape)
        scores, changed = np.where(exclude, -np.inf, scores), changed & ~exclude
    n = scores.shape[1]
    found = np.full((len(scores), n + 1), np.nan)
    for row, s, hit in zip(found, scores, changed):
        if not hit.any():
            continue
        order = np.argsort(-s, kind="stable")
        _, first, size = np.unique(-s[order], return_index=True, return_counts=True)
        share = np.add.reduceat(hit[order], first) / size
        row[0], row[1:] = 0.0, np.cumsum(np.repeat(share, size)) / hit.sum()
    return found


def recall_curves(
    predictors: Mapping[str, Tensor | np.ndarray],
    changed: np.ndarray,
    *,
    exclude: np.ndarray | None = None,
    groups: Sequence | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Recall by budget for several predictors, averaged over edits, with 95 % bootstrap intervals over edits.

    predictors: name -> scores (n_edits, n_facts).   groups: (n_edits,) e.g. seeds, for a two-stage bootstrap.
    Returns curves (predictor, budget as a share of the facts, recall, lo, hi at 21 budgets) and areas
    (predictor, area, lo, hi: mean recall over all budgets; 0.5 is guessing), edits without changes left out.
    """
    curves, areas = [], []
    shares = np.linspace(0, 1, 21)
    for name, scores in predictors.items():
        recall = recall_at(scores, changed, exclude)
        keep = ~np.isnan(recall[:, -1])
        if not keep.any():
            raise RequestError("no fact changed after any edit; lower the quantile or give more facts")
        recall = recall[keep]
        own = None if groups is None else np.asarray(groups)[keep]
        budgets = np.linspace(0, recall.shape[1] - 1, recall.shape[1])
        for share in shares:
            at = np.array([np.interp(share * budgets[-1], budgets, row) for row in recall])
            ci = bootstrap_mean(at, own, n_boot=n_boot, seed=seed)
            curves.append({"predictor": name, "budget": share, "recall": ci.mean, "lo": ci.lo, "hi": ci.hi})
        area = np.trapezoid(recall, axis=1) / budgets[-1]
        ci = bootstrap_mean(area, own, n_boot=n_boot, seed=seed)
        areas.append({"predictor": name, "area": ci.mean, "lo": ci.lo, "hi": ci.hi, "n": int(keep.sum())})
    return pd.DataFrame(curves), pd.DataFrame(areas)
