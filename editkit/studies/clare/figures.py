"""Figures of the chapter on ripple effects; each takes tidy data and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...entanglement.predictors import PREDICTORS
from ...press.plotting import AXIS, PALETTE
from ..arms import arm_named
from .trial import ARMS, LABELS, SINGLE


def _color(arm: str) -> str:
    return arm_named(ARMS.get(arm, arm)).look.color


def _label(arm: str) -> str:
    return LABELS.get(arm, arm_named(ARMS.get(arm, arm)).label)


def predictors(result: pd.DataFrame, names: Sequence[str], arms: Sequence[str]) -> Figure:
    """Pooled correlation of every predictor with an interval, one colour an editor; filled: one edited layer."""
    fig, ax = plt.subplots(figsize=(8.6, 4.2))
    step = 0.8 / len(arms)
    for k, arm in enumerate(arms):
        part, color = result[result.editor == arm].set_index("predictor").loc[names], _color(arm)
        y = np.arange(len(names)) + (k - (len(arms) - 1) / 2) * step
        xerr = [part.pooled - part.lo, part.hi - part.pooled]
        ax.errorbar(part.pooled, y, xerr=xerr, fmt="o" if arm in SINGLE else "s", color=color, ms=4, lw=1.2,
                    mfc=color if arm in SINGLE else "none", label=_label(arm))  # fmt: skip
    ax.set_yticks(range(len(names)), [PREDICTORS[p].label for p in names])
    ax.invert_yaxis()
    ax.axvline(0, color=AXIS, linewidth=0.8)
    left = min(-0.15, result.lo.min() - 0.02)
    ax.set(xlabel="pooled Spearman correlation with the logit shift", xlim=(left, 1))
    ax.legend(loc="upper right", fontsize=8)
    return fig


def scatter(
    scores: Mapping, ripples: Mapping, result: pd.DataFrame, arms: Sequence[str], names: Sequence[str]
) -> Figure:
    """Predictor against ripple, one point a pair; rows: editors, columns: predictors.

    scores: predictor, or (editor, predictor) -> tables.   ripples: editor -> tables.
    """
    fig, axes = plt.subplots(
        len(arms), len(names), figsize=(2.35 * len(names), 2.3 * len(arms)), squeeze=False
    )
    for row, arm in zip(axes, arms):
        y = np.concatenate([r.ravel() for r in ripples[arm]])
        for ax, p in zip(row, names):
            x = np.concatenate([t.ravel() for t in scores.get((arm, p), scores.get(p))])
            ax.scatter(x, y, s=4, alpha=0.25, linewidths=0, color=_color(arm), rasterized=True)
            rho = result[(result.editor == arm) & (result.predictor == p)].pooled.item()
            ax.set_title(f"{PREDICTORS[p].label}\n{rho:.2f}", fontsize=9)
            ax.set_yscale("log")
            if PREDICTORS[p].per_editor:
                ax.set_xscale("log")
        row[0].set_ylabel(f"{_label(arm)}\nlogit shift")
    for ax in axes[-1]:
        ax.set_xlabel("predictor")
    return fig


def layers(sweep: pd.DataFrame, arms: Sequence[str], critical: int) -> Figure:
    """Correlation by layer of four kinds of representation, and of whitened keys; dotted: the critical layer."""
    looks = dict(
        zip(("block_output", "mlp_output", "attn_output", "down_input"), (PALETTE[i] for i in (0, 2, 4, 3)))
    )
    fig, axes = plt.subplots(1, len(arms), figsize=(4.4 * len(arms), 3.9), sharey=True, squeeze=False)
    for ax, arm in zip(axes[0], arms):
        part = sweep[sweep.editor == arm]
        for module, color in looks.items():
            line = part[(part.module == module) & (part.score == "cosine")]
            ax.plot(line.layer, line.spearman, marker="o", color=color, label=module.replace("_", " "))
        line = part[(part.module == "block_output") & (part.score == "centered cosine")]
        ax.plot(
            line.layer,
            line.spearman,
            marker="s",
            ls="--",
            color=looks["block_output"],
            label="block output, centered",
        )
        line = part[part.score == "whitened"]
        ax.plot(line.layer, line.spearman, marker="D", color=PALETTE[1], label="whitened keys")
        ax.axvline(critical, color=AXIS, linestyle=":", linewidth=1.2)
        ax.set(xlabel="layer", title=_label(arm))
    axes[0][0].set_ylabel("pooled Spearman")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return fig
