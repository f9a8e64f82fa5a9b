"""Adapter for ROME: requests edited one after the other, each on the recorded weights before it; released
keys.
"""

from __future__ import annotations

import numpy as np
import torch

from ...locate.keys import compute_keys
from ...methods.weights.rome import ROME
from .case import Case, Comparison, adapter, compare, compare_equal
from .editing import facts_of, make, tolerance, weight_matrix


@adapter("rome")
def rome(case: Case) -> list[Comparison]:
    facts = facts_of(case.data["requests"])
    (layer,) = case.hparams["layers"]
    lm = case.load_model()
    seen: dict[str, torch.Tensor] = {}
    # ROME's loss reads the model's own logits whatever v_loss_layer says.
    editor = make(
        ROME,
        case,
        lm,
        seen,
        key="released",
        whiten=case.hparams.get("mom2_adjustment", True),
        z_loss_layer=None,
    )
    tol = tolerance(case, 1e-4)
    start = weight_matrix(lm, case.arrays[f"W0_{layer}"])
    out = [compare(f"W0_{layer}", lm.get_matrix(layer), start, 0.0)]
    for i, fact in enumerate(facts):
        if i:
            previous = weight_matrix(lm, case.arrays[f"W_after_{i - 1}"])
            lm.set_matrix(layer, torch.from_numpy(previous))
        before = lm.get_matrix(layer)
        keys = torch.stack(
            [
                compute_keys(lm, [(filled, fact.subject)], layer, token=editor.config.token)[:, 0]
                for filled in editor.templates().fill(fact.prompt)
            ]
        )
        editor.edit([fact])
        k, u, v = seen["imposed_key"], seen["u"], seen["v"]
        losses, recorded = seen["losses"], case.arrays[f"losses_{i}"]
        ran = int(torch.isfinite(losses[:, 0]).sum())
        right = torch.as_tensor(case.arrays[f"right_{i}"], dtype=torch.float64)
        out += [
            compare(f"keys_{i}", keys, case.arrays[f"keys_{i}"], tol / 2),
            compare(f"u_{i}", u, case.arrays[f"u_{i}"], tol / 2),
            compare(f"curin_{i}", k, case.arrays[f"curin_{i}"], tol / 2),
            compare(f"vstar_{i}", v, case.arrays[f"vstar_{i}"], tol),
            compare_equal(f"iterations_{i}", ran, len(recorded)),
            compare(f"losses_{i}", losses[:ran], recorded[:ran], tol),
            compare(f"right_{i}", seen["upd"] @ u, right, tol * max(1.0, float(right.abs().max()))),
            compare(f"delta_{i}", seen["upd"], weight_matrix(lm, case.arrays[f"delta_{i}"]), tol),
            compare(
                f"W_after_{i}", lm.get_matrix(layer), weight_matrix(lm, case.arrays[f"W_after_{i}"]), tol
            ),
        ]
        bias = getattr(lm.model.get_submodule(lm.down_name(layer)), "bias", None)
        output = before @ k + (0 if bias is None else bias.detach().double())
        out.append(compare(f"curout_{i}", output, case.arrays[f"curout_{i}"], tol / 2))
    if f"invcov_{layer}" in case.arrays:
        ours = np.linalg.inv(case.covariance(layer).astype(np.float64))
        out.append(compare(f"invcov_{layer}", ours, case.arrays[f"invcov_{layer}"], 1e-3, relative=True))
    editor.restore()
    out.append(compare(f"restored W0_{layer}", lm.get_matrix(layer), start, 0.0))
    return out
