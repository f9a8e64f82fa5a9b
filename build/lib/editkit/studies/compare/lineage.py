"""Who builds on whom, and where each family writes: the data of the page on lineage, and two drawings.

`lineage.json` holds one entry per work: id, year, family, cite (key of the bibliography), from (ids of the works it
builds on), adds (in a few words), run (its row of the comparison, or "").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...base.errors import DataError
from ...press.plotting import AXIS, GRID, INK, NEUTRAL, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "gradient": PALETTE[7], "locate": PALETTE[0], "hypernetwork": PALETTE[1], "memory": PALETTE[3],
    "prompt": NEUTRAL, "predict": PALETTE[2],
}  # fmt: skip


def load_lineage() -> dict[str, Any]:
    """{"families": {key: name}, "works": [...]}. Raises DataError for unknown, later or repeated ancestors."""
    found = json.loads(Path(__file__).with_name("lineage.json").read_text(encoding="utf-8"))
    check_lineage(found)
    return found


def check_lineage(found: dict[str, Any]) -> None:
    """Raise DataError if ids repeat, a family is unknown, or a work builds on a missing or later one."""
    year: dict[str, int] = {}
    for work in found["works"]:
        if work["id"] in year:
            raise DataError(f"{work['id']} is listed twice")
        if work["family"] not in found["families"]:
            raise DataError(f"{work['id']} has the unknown family {work['family']!r}")
        year[work["id"]] = work["year"]
    for work in found["works"]:
        for name in work["from"]:
            if year.get(name, 9999) > work["year"]:
                raise DataError(f"{work['id']} ({work['year']}) builds on {name}, which is missing or later")


def table(found: dict[str, Any]) -> pd.DataFrame:
    """One row per work, by family and year: work, year, family, builds on, what it added."""
    order = list(found["families"])
    works = sorted(found["works"], key=lambda w: (order.index(w["family"]), w["year"]))
    return pd.DataFrame([
        {"work": w["id"], "year": w["year"], "family": found["families"][w["family"]],
         "builds on": ", ".join(w["from"]) or "\u2013", "what it added": w["adds"]}
        for w in works
    ])  # fmt: skip


def places(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(x, y) of each work: x is the year, families lie below each other, works of one family and year are stacked.

    Odd years sit a little lower, so that arrows over several years pass between the boxes.
    """
    spots, top = {}, 0.0
    for family in found["families"]:
        works = [w for w in found["works"] if w["family"] == family]
        by_year: dict[int, list[str]] = {}
        for w in works:
            by_year.setdefault(w["year"], []).append(w["id"])
        height = max(len(names) for names in by_year.values())
        for year, names in by_year.items():
            for i, name in enumerate(names):
                spots[name] = (float(year), top - (i + 0.5) * height / len(names) - 0.3 * (year % 2))
        top -= height + 0.8
    return spots


def draw_lineage(ax: Axes, found: dict[str, Any]) -> None:
    """The graph: a box per work at its year, an arrow from each ancestor."""
    spots = places(found)
    for work in found["works"]:
        x, y = spots[work["id"]]
        for name in work["from"]:
            x0, y0 = spots[name]
            ax.annotate("", (x - 0.02, y), (x0 + 0.02, y0), zorder=1, arrowprops={
                "arrowstyle": "-|>", "color": AXIS, "lw": 0.8, "shrinkA": 22, "shrinkB": 22,
                "connectionstyle": "arc3,rad=-0.16" if x - x0 > 1 and y > y0 - 0.5 else "arc3,rad=0.08",
            })  # fmt: skip
        ax.text(x, y, work["id"], ha="center", va="center", fontsize=8, color=INK, zorder=3, bbox={
            "boxstyle": "round,pad=0.3", "facecolor": "none", "edgecolor": COLORS[work["family"]], "linewidth": 1.4,
        })  # fmt: skip
    for family, name in found["families"].items():
        level = max(spots[w["id"]][1] for w in found["works"] if w["family"] == family)
        ax.text(2019.35, level + 0.42, name, fontsize=8, color=INK, ha="left", va="bottom", style="italic")
    years = sorted({w["year"] for w in found["works"]})
    ax.set(xlim=(2019.3, max(years) + 0.6), ylim=(min(y for _, y in spots.values()) - 0.6, 0.8), yticks=[])
    ax.set_xticks(range(min(years), max(years) + 1), [str(y) for y in range(min(years), max(years) + 1)])
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)


def draw_map(ax: Axes) -> None:
    """A block of the model, and where each family of methods puts an edit."""
    ax.set(xlim=(0, 10), ylim=(0, 6))
    ax.axis("off")
    _box(ax, 3.1, 1.0, 3.2, 4.1, "", AXIS)
    ax.text(3.15, 0.72, "a block", fontsize=8, color=INK)
    _box(ax, 3.5, 1.3, 2.4, 0.8, "attention", AXIS)
    _box(ax, 3.5, 2.5, 2.4, 0.8, "up projection", AXIS)
    _box(ax, 3.5, 3.8, 2.4, 0.9, "down projection $W$", COLORS["locate"], 2.0)
    _arrow(ax, (4.7, 0.35), (4.7, 1.0), AXIS)
    _arrow(ax, (4.7, 5.1), (4.7, 5.75), AXIS)
    ax.text(4.95, 0.45, "prompt", fontsize=8, color=INK)
    ax.text(4.95, 5.55, "answer", fontsize=8, color=INK)
    _note(
        ax, 0.0, 4.9, "locate-then-edit", "key and value, one solve:\nROME, MEMIT, AlphaEdit, ...", "locate"
    )
    _arrow(ax, (2.55, 4.45), (3.5, 4.3), COLORS["locate"])
    _note(ax, 0.0, 3.2, "fine-tuning", "gradient steps on $W$, or on\nlow-rank factors: FT, LoRA", "gradient")
    _arrow(ax, (2.55, 2.95), (3.5, 3.95), COLORS["gradient"])
    _note(ax, 0.0, 1.5, "prompts", "the edit is told in front\nof the question", "prompt")
    _arrow(ax, (2.2, 0.95), (4.6, 0.35), COLORS["prompt"])
    _note(
        ax,
        7.2,
        4.9,
        "memories",
        "$W$ stays; a second store is\nread if the prompt asks for it:\nGRACE, WISE, MEMOIR, ...",
        "memory",
    )
    _box(ax, 6.55, 3.85, 0.5, 0.8, "", COLORS["memory"], 2.0)
    _arrow(ax, (6.55, 4.25), (5.9, 4.25), COLORS["memory"])
    _note(
        ax,
        7.2,
        2.6,
        "hypernetworks",
        "a trained network turns the\ngradient of the edit into the\nupdate: MEND, ..., HORSE",
        "hypernetwork",
    )
    _arrow(ax, (7.15, 2.4), (5.9, 3.95), COLORS["hypernetwork"])


def _box(ax: Axes, x: float, y: float, w: float, h: float, text: str, color: str, width: float = 1.0) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0.02,rounding_size=0.08"
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor="none", edgecolor=color, linewidth=width)
    )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8.5, color=INK)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4})


def _note(ax: Axes, x: float, y: float, title: str, text: str, family: str) -> None:
    ax.plot([x, x + 0.35], [y + 0.28] * 2, color=COLORS[family], lw=3, solid_capstyle="butt")
    ax.text(x, y, title, fontsize=9, weight="bold", color=INK, va="center")
    ax.text(x, y - 0.25, text, fontsize=8, color=INK, va="top")
    ax.plot([x, x + 2.5], [y - 0.19] * 2, color=GRID, lw=0.8)
