"""A figure in words, for readers who cannot see it: made from what is drawn, so that it changes with the data."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 12  # things said of one panel


def describe(fig: Figure) -> str:
    """The picture in words, made from what is drawn: per panel its axes, and first and last point of every line, the
    values of every bar, the range of every cloud. Nothing is said that the data do not say.
    """
    return " ".join(filter(None, map(_panel, fig.axes)))


def _panel(axes: Axes) -> str:
    if not axes.axison:  # a drawing: positions in it mean nothing
        return ""
    said = [*_lines(axes), *_bars(axes), *_clouds(axes), *_steps(axes), *_images(axes)]
    if not said:
        return ""
    names = [axes.get_title(loc) for loc in ("left", "center", "right")]
    title = next(filter(None, names), "")
    x, y = axes.get_xlabel(), axes.get_ylabel()
    about = ": ".join(filter(None, [title, " against ".join(filter(None, [y, x]))]))
    more = f" and {len(said) - MOST} more" if len(said) > MOST else ""
    return re.sub(r"\s+", " ", f"{about or 'Panel'}: {'; '.join(said[:MOST])}{more}.").replace("$", "")


def _named(label: str, i: int, what: str) -> str:
    return f"{what} {i + 1}" if not label or label.startswith("_") else label


def _span(values) -> str:
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if not len(found):
        return "no values"
    low, high = f"{found.min():.3g}", f"{found.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _lines(axes: Axes) -> list[str]:
    said, dots = [], []
    for i, line in enumerate(axes.get_lines()):
        xy = np.ma.filled(np.ma.asarray(line.get_xydata(), dtype=float), np.nan)
        xy = xy[np.isfinite(xy).all(axis=1)]
        if not len(xy) or line.get_transform() != axes.transData:  # guides across the panel are no data
            continue
        if line.get_linestyle() == "None" and line.get_label().startswith("_"):
            dots.append(xy)
            continue
        (x0, y0), (x1, y1) = xy[0], xy[-1]
        name = _named(line.get_label(), i, "line")
        said.append(f"{name} {y0:.3g} at {x0:.3g}" + (f", {y1:.3g} at {x1:.3g}" if len(xy) > 1 else ""))
    if dots:
        x, y = np.concatenate(dots).T
        said.append(f"{len(x)} points {_span(y)} at {_span(x)}")
    return said


def _steps(axes: Axes) -> list[str]:
    """Histograms drawn as outlines: where each is highest, and between which values it has any height."""
    from matplotlib.patches import Polygon, StepPatch

    said = []
    for i, patch in enumerate(p for p in axes.patches if isinstance(p, StepPatch | Polygon)):
        if isinstance(patch, StepPatch):
            heights, edges, _ = patch.get_data()
            x = (edges[1:] + edges[:-1]) / 2
        else:
            x, heights = patch.get_xy().T
        drawn = np.isfinite(heights) & (heights > 0)
        if drawn.any():
            top = x[drawn][heights[drawn].argmax()]
            said.append(f"{_named(patch.get_label(), i, 'outline')} over {_span(x[drawn])}, highest at {top:.3g}")
    return said


def _bars(axes: Axes) -> list[str]:
    from matplotlib.container import BarContainer

    said = []
    for i, bars in enumerate(c for c in axes.containers if isinstance(c, BarContainer)):
        flat = bars.orientation == "horizontal"
        axis = axes.yaxis if flat else axes.xaxis
        ticks = {
            round(float(t), 3): label.get_text()
            for t, label in zip(axis.get_ticklocs(), axis.get_ticklabels())
        }
        spots = [b.get_y() + b.get_height() / 2 if flat else b.get_x() + b.get_width() / 2 for b in bars]
        sizes = [b.get_width() if flat else b.get_height() for b in bars]
        if len(bars) > MOST or not any(ticks.get(round(float(s), 3)) for s in spots):
            said.append(f"{_named(bars.get_label(), i, 'bars')} {_span(sizes)}")
            continue
        each = (
            f"{ticks.get(round(float(s), 3), '') or f'{s:.3g}'} {size:.3g}" for s, size in zip(spots, sizes)
        )
        said.append(f"{_named(bars.get_label(), i, 'bars')}: {', '.join(each)}")
    return said


def _clouds(axes: Axes) -> list[str]:
    from matplotlib.collections import PathCollection

    clouds = [c for c in axes.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
    return [
        f"{_named(c.get_label(), i, 'points')} {_span(c.get_offsets()[:, 1])} at {_span(c.get_offsets()[:, 0])}"
        for i, c in enumerate(clouds)
    ]


def _images(axes: Axes) -> list[str]:
    return [f"shading from {_span(image.get_array().filled(float('nan')))}" for image in axes.get_images()]
