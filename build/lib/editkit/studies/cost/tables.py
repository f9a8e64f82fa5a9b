"""Tables of the cost study: one row per phase, costs per edit and per 1,000 edits, exponents of growth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .bench import ONCE, Bench, Cost
from .floors import floors
from .rates import Rates

THOUSAND = 1000


def phase_rows(bench: Bench, cost: Cost, rates: Rates) -> list[dict]:
    """Rows method, edits, phase, seconds, peak (bytes), floor (seconds), over (seconds / floor), bound."""
    least = floors(bench, cost.method, cost.n)
    rows = []
    for phase, seconds in cost.seconds.items():
        work = least.get(phase)
        floor = work.seconds(rates) if work and (work.flops or work.bytes) else None
        rows.append({
            "method": cost.method, "edits": cost.n, "phase": phase, "seconds": seconds, "peak": cost.peak[phase],
            "floor": floor, "over": seconds / floor if floor else None, "bound": work.bound(rates) if floor else "",
        })  # fmt: skip
    return rows


def per_thousand(costs: Sequence[Cost]) -> tuple[float | None, str]:
    """(seconds of 1,000 edits, how they were found): measured, or a + b x 1,000 through the two largest edits.

    Phases that are paid once are left out. None where nothing was measured.
    """
    good = sorted((c for c in costs if not c.failed), key=lambda c: c.n)
    if not good:
        return None, "not measured"
    if good[-1].n == THOUSAND:
        return good[-1].total, "measured"
    slope = 0.0
    if len(good) > 1:
        a, b = good[-2:]
        slope = (b.total - a.total) / (b.n - a.n)
    if slope <= 0:  # a single size, or sizes so small that other things decide
        return good[-1].total / good[-1].n * THOUSAND, f"proportional to {good[-1].n}"
    return b.total + slope * (THOUSAND - b.n), f"line through {a.n} and {b.n}"


def summary(costs: Sequence[Cost], weights: float) -> dict:
    """One row per method: seconds per edit and per 1,000, what is paid once, peak of the largest edit."""
    good = [c for c in costs if not c.failed]
    failed = [c for c in costs if c.failed]
    seconds, how = per_thousand(costs)
    largest = good[-1] if good else None
    once = sum(s for name, s in largest.seconds.items() if name.endswith(ONCE)) if largest else None
    return {
        "method": costs[0].method, "s, one edit": good[0].total / good[0].n if good else None,
        "edits": largest.n if largest else failed[0].n,
        "s per edit": largest.total / largest.n if largest else None, "s per 1,000": seconds, "1,000 edits": how,
        "s once": once, "rise GiB": largest.rise / 2**30 if largest else None,
        "peak GiB": (largest.rise + weights) / 2**30 if largest else None,
        "predicted rise GiB": (largest or failed[0]).needed / 2**30, "note": failed[0].failed if failed else "",
    }  # fmt: skip


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the straight line through log y over log x, by least squares."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def growth(frame: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Exponents over one axis of a table of `phase_rows` with that axis as a column: measured, and of the floor.

    Phases below a millisecond, or without a floor, are left out.
    """
    rows = []
    for (method, phase), part in frame.groupby(["method", "phase"], sort=False):
        part = part[(part["seconds"] > 1e-3) & part["floor"].notna()]
        if part[axis].nunique() < 3:
            continue
        rows.append({"grows with": axis, "method": method, "phase": phase, "points": len(part),
                     "exponent": exponent(part[axis], part["seconds"]),
                     "of the floor": exponent(part[axis], part["floor"].astype(float))})  # fmt: skip
    return pd.DataFrame(rows)
