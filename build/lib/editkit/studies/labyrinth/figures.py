"""Figures of the chapter on sequential editing; each takes tidy data and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...press.plotting import INK, NEUTRAL, look
from ..arms import ARMS
from .sequences import VARIANTS

# The aligned methods that the paper prints, in its words.
PRINTED = {
    "memit-seq": ("MEMIT_seq", "MEMIT\n+ hist."),
    "alphaedit": ("AlphaEdit", "Alpha-\nEdit"),
    "prune-compensated": ("MEMIT_seq_prune_err", "PRUNE\n+ comp."),
    "rect-compensated": ("MEMIT_seq_rect_err", "RECT\n+ comp."),
}
_COLUMNS = {"Eff": "Efficacy", "Gen": "Paraphrase", "Spe": "Neighborhood"}
_DRAWN = {  # colour of the method whose condition is broken
    "aligned": ("memit-seq", "o", "-"), "no-history": ("memit", "o", ":"), "float32-weights": (None, "", "-"),
    "float32-solve": (None, "", "--"), "bfloat16-weights": (None, "", ":"), "recounted-prior": ("rome", "s", "-"),
    "stale-residual": ("rome", "v", "--"), "rect": ("mend", "P", ":"), "rect-compensated": ("mend", "P", "-"),
    "prune": ("memoir", "X", ":"), "prune-compensated": ("memoir", "X", "-"),
}  # fmt: skip


def beside_paper(ours: pd.DataFrame, printed: pd.DataFrame, where: Mapping[str, str], here: str) -> Figure:
    """The aligned methods in many batches and in one: the paper's models (hollow) beside this one.

    ours: columns arm, regime, column, mean, lo, hi of one protocol, shares.   printed: the paper's table, percent.
    where: regime -> edits as they were made here.   here: name of the model.
    """
    fig, axes = plt.subplots(2, 3, figsize=(8.6, 5.2), sharey="col", sharex=True)
    markers = dict(zip(printed["model"].unique(), "^vsd"))
    theirs = printed.set_index(["edits", "method", "model"])
    ours = ours.set_index(["arm", "regime", "column"])
    for line, (regime, edits) in zip(axes, {"stream": "20 x 100", "once": "1 x 2000"}.items()):
        for axis, column in zip(line, _COLUMNS):
            for x, (arm, (method, _)) in enumerate(PRINTED.items()):
                for name, marker in markers.items():
                    axis.plot(x - 0.15, theirs.loc[(edits, method, name), column], marker=marker, color=NEUTRAL,
                              mfc="none", ls="", label=f"paper: {name}" if x == 0 else None)  # fmt: skip
                if (arm, regime, column) in ours.index:
                    r = 100 * ours.loc[(arm, regime, column), ["mean", "lo", "hi"]].astype(float)
                    yerr = [[r["mean"] - r["lo"]], [r["hi"] - r["mean"]]]
                    axis.errorbar(x + 0.15, r["mean"], yerr=yerr, marker="o", color=ARMS[arm].look.color, ls="",
                                  label=f"here: {here}" if x == 0 else None)  # fmt: skip
            axis.set_xticks(range(len(PRINTED)), [short for _, short in PRINTED.values()], fontsize=8.5)
            if line is axes[0]:
                axis.set_title(_COLUMNS[column])
        line[0].set_ylabel(f"paper {edits}\nhere {where[regime]}\nscore, %", fontsize=9)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    return fig


def distances(curves: pd.DataFrame) -> Figure:
    """Distance to the one-time solution against facts written, rule by rule; keys of the model and random ones."""
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 4.6), sharey=True)
    for axis, kind, title in zip(axes, ("model", "random"), ("Keys of the model", "Random keys")):
        for name, part in curves[curves["keys"] == kind].groupby("variant", sort=False):
            whose, marker, dash = _DRAWN[name]
            line = part.groupby("facts")["distance"].mean().clip(lower=1e-17)
            color = look(whose).color if whose else NEUTRAL
            axis.plot(line.index, line, color=color, marker=marker, linestyle=dash, label=VARIANTS[name].label)
        axis.set(title=title, xlabel="facts written", yscale="log")
    axes[0].set_ylabel("distance to the one-time solution")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    return fig


def pipeline(gaps: pd.DataFrame, drift: pd.DataFrame, order: Sequence[str], layers: Sequence[int]) -> Figure:
    """Distance of the total updates setting by setting, and how far keys moved in the last setting."""
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), width_ratios=[3, 2])
    color = look("memit-seq").color
    for i, setting in enumerate(order):
        part = gaps[gaps["setting"] == setting]
        axes[0].scatter(part["distance"], np.full(len(part), i), color=color, zorder=3)
        for row in part.itertuples():
            axes[0].annotate(f"{row.layer}", (row.distance, i), textcoords="offset points", xytext=(0, 6), fontsize=8,
                             ha="center")  # fmt: skip
    axes[0].set_yticks(range(len(order)), [s.replace(", ", ",\n", 1) for s in order], fontsize=8.5)
    axes[0].invert_yaxis()
    axes[0].set(xscale="log", xlabel="distance to one-time editing (labels: layer)", title="Total update")
    last = drift[drift["setting"] == order[-1]]
    parts = axes[1].violinplot(
        [last[last["layer"] == x]["drift"] for x in layers], positions=range(len(layers)), showmedians=True
    )
    for body in parts["bodies"]:
        body.set_facecolor(color)
    for name in ("cmedians", "cbars", "cmins", "cmaxes"):
        parts[name].set_color(INK)
    axes[1].set_xticks(range(len(layers)), [f"layer {x}" for x in layers])
    axes[1].set(title="Keys that moved", ylabel="relative change", ylim=(0, None))
    return fig
