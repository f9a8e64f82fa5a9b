"""One plot style for every figure: colour-blind safe, one look per method, SVG that follows the page's theme.

Figures are drawn with a transparent background and three reserved "ink" colours (text, axes, grid).
`themed_svg` turns those inks into CSS variables with fallbacks, so that an inlined figure is readable on
light and dark pages and the stand-alone file is a plain dark-on-transparent SVG.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008), the usual colour-blind safe qualitative palette, without black (reserved for baselines).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")
NEUTRAL = "#7A7A7A"

# Reserved inks; nothing else may use these exact colours. They are dark greys, so a raw SVG stays readable.
INK, AXIS, GRID = "#232426", "#5c5d5f", "#d9dadb"
_CSS = {
    **{color: f"var(--ek-c{i}, {color})" for i, color in enumerate(PALETTE)},  # lighter on dark pages
    INK: f"var(--ek-ink, var(--jp-content-font-color1, {INK}))",
    AXIS: f"var(--ek-axis, var(--jp-content-font-color2, {AXIS}))",
    GRID: f"var(--ek-grid, var(--jp-border-color2, {GRID}))",
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How one method is drawn everywhere: legend label, colour, marker and line style."""

    label: str
    color: str
    marker: str = "o"
    linestyle: str = "-"

    def line(self) -> dict:
        """Keyword arguments for `Axes.plot` / `Axes.errorbar`."""
        return {"label": self.label, "color": self.color, "marker": self.marker, "linestyle": self.linestyle}

    def bar(self) -> dict:
        """Keyword arguments for `Axes.bar` / `Axes.barh`."""
        return {"label": self.label, "color": self.color}


# Families share a colour (what is compared within a family differs by marker and dash), so that a reader
# who has learned "MEMIT is blue" is right on every page.
_LOOKS: dict[str, Look] = {
    "unedited": Look("unedited", NEUTRAL, "", ":"),
    "ft": Look("FT", PALETTE[7], "v", "-"),
    "ft-l": Look("FT-L", PALETTE[7], "v", "-"),
    "ft-m": Look("FT-M", PALETTE[7], "^", "--"),
    "lora": Look("LoRA", PALETTE[7], "D", ":"),
    "rome": Look("ROME", PALETTE[4], "s", "-"),
    "r-rome": Look("R-ROME", PALETTE[4], "s", "--"),
    "memit": Look("MEMIT", PALETTE[0], "o", "-"),
    "memit-seq": Look("MEMIT + history", PALETTE[0], "o", "--"),
    "rect": Look("MEMIT + RECT", PALETTE[5], "P", "-"),
    "prune": Look("MEMIT + PRUNE", PALETTE[5], "X", "--"),
    "nse": Look("NSE", PALETTE[5], "h", ":"),
    "one-time": Look("one-time editing", INK, "*", "-"),
    "alphaedit": Look("AlphaEdit", PALETTE[2], "D", "-"),
    "grace": Look("GRACE", PALETTE[6], "v", "-"),
    "defer": Look("Defer", PALETTE[6], "^", "--"),
    "wise": Look("WISE", PALETTE[6], "p", ":"),
    "memoir": Look("MEMOIR", PALETTE[3], "o", "-"),
    "mend": Look("MEND", PALETTE[1], "v", ":"),
    "malmen": Look("MALMEN", PALETTE[1], "s", "--"),
    "rledit": Look("RLEdit", PALETTE[1], "^", "-."),
    "horse": Look("HORSE", PALETTE[1], "o", "-"),
    "loka": Look("LOKA", PALETTE[3], "X", "--"),
}


def look(method: str) -> Look:
    """The fixed look of a method, by registry name ("memit", "FT-L", "memit_seq": case and _/- are equal).

    A method without an entry gets a look derived from its name, the same in every figure and process.
    """
    key = method.strip().lower().replace("_", "-").replace(" ", "-")
    if key in _LOOKS:
        return _LOOKS[key]
    digest = hashlib.sha256(key.encode()).digest()
    color = PALETTE[digest[0] % len(PALETTE)]
    return Look(method, color, "os^vDPX*"[digest[1] % 8], ("-", "--", ":")[digest[2] % 3])


def colors(methods) -> dict[str, str]:
    """{method: colour}, usable as seaborn's `palette`."""
    return {m: look(m).color for m in methods}


_TICKS = {"labelsize": 11.0, "major.size": 6.0, "major.width": 1.25, "minor.size": 4.0, "minor.width": 1.0}


def style_params() -> dict:
    """Matplotlib rcParams of the style. Text stays text in the SVG (searchable, small)."""
    from cycler import cycler

    return {
        "figure.figsize": (6.4, 3.8),
        "figure.facecolor": "none",
        "figure.constrained_layout.use": True,
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "savefig.transparent": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "editkit",
        "font.family": "sans-serif",
        "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "Bitstream Vera Sans", "sans-serif"],
        "font.size": 10.5,
        "mathtext.fontset": "dejavusans",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": AXIS,
        "axes.labelsize": 12.0,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": AXIS,
        "ytick.color": AXIS,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        **{f"{axis}tick.{key}": x for axis in "xy" for key, x in _TICKS.items()},
        "legend.fontsize": 11.0,
        "legend.title_fontsize": 12.0,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
        "lines.solid_capstyle": "round",
        "patch.linewidth": 0.0,
        "patch.edgecolor": "w",
        "patch.force_edgecolor": True,
        "image.cmap": "cividis",
        "axes.prop_cycle": cycler(color=PALETTE),
        "errorbar.capsize": 2.5,
    }


def use_style() -> None:
    """Make the style the default of this process (notebooks get it through `editkit.press.start`)."""
    import matplotlib

    matplotlib.rcParams.update(style_params())


def tidy_log_axes(fig: Figure) -> None:
    """Label short logarithmic axes 1, 2, 5 in plain numbers, where matplotlib prints "3 × 10⁰" on top of "4 × 10⁰".

    Axes over more than three decades keep their powers of ten; ticks that a notebook has set itself stay.
    """
    from matplotlib.ticker import (
        FuncFormatter,
        LogFormatterSciNotation,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )

    plain = FuncFormatter(lambda x, _: f"{x:,.10g}" if x >= 1 else f"{x:.10g}")
    for axis in (a for axes in fig.axes for a in (axes.xaxis, axes.yaxis)):
        if axis.get_scale() != "log" or not isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
            continue
        low, high = sorted(axis.get_view_interval())
        if not 0 < low < high or high > 1000 * low:
            continue
        subs = (1.0, 2.0, 5.0) if high <= 100 * low else (1.0,)
        locator = LogLocator(subs=subs, numticks=20)
        inside = [t for t in locator.tick_values(low, high) if low <= t <= high]
        axis.set_major_locator(locator if len(inside) > 2 else MaxNLocator(4))
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())


def thin_tick_labels(fig: Figure) -> None:
    """Leave out tick labels that would be printed on top of the one before."""
    fig.canvas.draw()
    for axis in (a for axes in fig.axes for a in (axes.xaxis, axes.yaxis)):
        last = None
        for label in axis.get_ticklabels(which="both"):
            if label.get_visible() and label.get_text():
                box = label.get_window_extent()
                if last is not None and box.overlaps(last):
                    label.set_visible(False)
                else:
                    last = box


def spread_labels(fig: Figure) -> None:
    """Move labels of points up until none is printed on top of another; drawings without axes stay as they are."""
    for axes in (a for a in fig.axes if a.axison):
        placed = []
        for text in sorted(axes.texts, key=lambda t: t.get_window_extent().y0):
            box = text.get_window_extent()
            up = 0.0
            while hit := next((b for b in placed if b.overlaps(box.translated(0, up))), None):
                up += hit.y1 - box.y0 - up + 1
            placed.append(box.translated(0, up))
            if up and hasattr(text, "xyann") and text.anncoords == "offset points":
                text.xyann = (text.xyann[0], text.xyann[1] + up * 72 / fig.dpi)
            elif up:
                place = text.get_transform()
                x, y = place.transform(text.get_position())
                text.set_position(place.inverted().transform((x, y + up)))


def themed_svg(fig: Figure, *, prefix: str, title: str = "") -> str:
    """The figure as one `<svg>` element: themed inks, prefixed ids (figures can share a page), alt text.

    `prefix` must be unique on the page; `title` becomes the accessible name of the picture. Deterministic.
    """
    from matplotlib import rc_context

    tidy_log_axes(fig)
    thin_tick_labels(fig)
    spread_labels(fig)
    buffer = io.StringIO()
    with rc_context(
        {"svg.hashsalt": "editkit", "svg.fonttype": "none"}
    ):  # also where `use_style` was not called
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    tag = re.sub(r"[^\w-]", "-", prefix)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{tag}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{tag}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{tag}-\1)", svg)
    for ink, css in _CSS.items():
        # Presentation attributes (fill="#...") do not take var(); matplotlib writes its colours in style="".
        svg = re.sub(rf"(:\s*){ink}\b", rf"\1{css}", svg, flags=re.I)
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', svg)
    if size:  # let the page shrink the figure, never enlarge it
        width = float(size.group(1)) * 4 / 3
        svg = svg.replace(size.group(0), f'width="100%" style="max-width:{width:.0f}px;height:auto"', 1)
    head, rest = svg.split(">", 1)
    name = escape(title, quote=True)
    return f'{head} role="img" aria-label="{name}"><title>{name}</title>{rest}\n'
