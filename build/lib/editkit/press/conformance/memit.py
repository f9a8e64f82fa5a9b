"""Adapter for MEMIT: one batch of requests, end to end and from the recorded intermediates."""

from __future__ import annotations

import torch

from ...methods.weights.memit import MEMIT
from .case import Case, Comparison, adapter, compare
from .editing import (
    as_matrix,
    compare_lookups,
    compare_targets,
    facts_of,
    make,
    recorded_batch,
    replaying,
    tolerance,
    weight_matrix,
)


@adapter("memit")
def memit(case: Case) -> list[Comparison]:
    facts, layers = facts_of(case.data["requests"]), case.hparams["layers"]
    lm = case.load_model()
    out = compare_lookups(case, lm)
    out += [
        compare(f"W0_{l}", lm.get_matrix(l), weight_matrix(lm, case.arrays[f"W0_{l}"]), 0.0) for l in layers
    ]
    seen: dict[str, torch.Tensor] = {}
    delta = make(MEMIT, case, lm, seen).edit(facts)
    # float32 and float64 runs of the official code differ by 6e-6 in z and 3e-6 elsewhere.
    tol = tolerance(case, 1e-4)
    out += compare_targets(case, "", seen["z"], seen["zloss"], tol)
    # The official code rounds updates to float32 also in a float64 model.
    near, far = tolerance(case, 2e-5, 1e-6), tolerance(case, 5e-5, 1e-6)
    for l in layers:
        out += [
            compare(f"{name}_{l}", seen[f"{name}_{l}"], case.arrays[f"{name}_{l}"], far)
            for name in ("K", "curz", "resid")
        ]
        out.append(compare(f"upd_{l}", seen[f"upd_{l}"], as_matrix(lm, l, case.arrays[f"upd_{l}"]), near))
        out.append(compare(f"W1_{l}", lm.get_matrix(l), weight_matrix(lm, case.arrays[f"W1_{l}"]), near))
    delta.restore(lm)
    out += [
        compare(f"restored W0_{l}", lm.get_matrix(l), weight_matrix(lm, case.arrays[f"W0_{l}"]), 0.0)
        for l in layers
    ]

    # The solve alone, from the recorded float32 z, K and states: float64 rounding only.
    solved: dict[str, torch.Tensor] = {}
    editor = make(replaying(MEMIT), case, lm, solved)
    editor.replay = recorded_batch(case, "", len(facts))
    editor.edit(facts)
    for l in layers:
        resid = case.arrays[f"resid_{l}"]
        # The official residual is a float32 difference, exact up to the rounding of z - h.
        out.append(compare(f"resid_{l} from recorded z", solved[f"resid_{l}"], resid, tolerance(case, 2e-6)))
        upd = as_matrix(lm, l, case.arrays[f"upd_{l}"])
        out.append(compare(f"upd_{l} from recorded K", solved[f"upd_{l}"], upd, tolerance(case, 5e-6, 1e-10)))
    return out
