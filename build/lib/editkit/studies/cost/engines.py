"""The recursive engines at a key width: seconds a batch against solving the whole system again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...base.device import is_out_of_memory
from ...linear.engines import make_engine
from .meter import Phases


def engine_rows(
    device: torch.device,
    d: int,
    m: int,
    n: int,
    *,
    engines: Sequence[str] = ("direct", "inverse", "cholesky"),
    batches: int = 3,
    seed: int = 0,
) -> list[dict]:
    """Rows engine, d, n, start (seconds), batch (seconds, mean), peak (bytes), speed-up over "direct", note.

    The prior is a ridge and the keys are random: neither changes the time. An engine that runs out of memory is a row
    that says so.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for name in engines:
        phases, note = Phases(device), ""
        try:
            with phases.measured():
                with phases.phase("start"):
                    engine = make_engine(name, torch.eye(d, dtype=torch.float64, device=device))
                for _ in range(batches):
                    K = torch.randn(d, n, dtype=torch.float64, generator=draw).to(device)
                    R = torch.randn(m, n, dtype=torch.float64, generator=draw).to(device)
                    with phases.phase("batch"):
                        engine.add(K, R)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            note = "out of memory"
        engine = None
        batch = phases.seconds["batch"] / batches if not note else None
        rows.append({"engine": name, "d": d, "n": n, "start": phases.seconds.get("start"), "batch": batch,
                     "peak": max(phases.peak.values()), "note": note})  # fmt: skip
    direct = next((r["batch"] for r in rows if r["engine"] == "direct"), None)
    for row in rows:
        row["times faster than direct"] = direct / row["batch"] if direct and row["batch"] else None
    return rows
