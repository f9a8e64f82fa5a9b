"""Adapter for NSE: targets on the original model, restricted solves, several passes, history."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ...linear.nse import restricted_update, select_neurons
from ...methods.weights.nse import NSE
from .case import Case, Comparison, adapter, compare, compare_equal
from .editing import as_matrix, facts_of, make, set_weights, tolerance, weight_matrix


@adapter("nse")
def nse(case: Case) -> list[Comparison]:
    h = case.hparams
    options = {
        "alpha": h["alpha"], "upper_bound": h["upper_bound"], "passes": max(h["max_iterations"] - 1, 1),
        "neuron_threshold": h["neuron_threshold"],
    }  # fmt: skip
    tol = tolerance(case, 1e-4)
    layers = h["layers"]
    lm = case.load_model()
    seen: dict[str, torch.Tensor] = {}
    editor = make(NSE, case, lm, seen, **options)
    out: list[Comparison] = []
    S = {l: torch.zeros(lm.weight_shape(l)[1:] * 2) for l in layers}
    for t, batch in enumerate(case.data["batches"]):
        facts = facts_of(batch)
        seen.clear()
        if t:
            set_weights(lm, case, f"b{t - 1}_W_")
            editor._last = None  # the stream goes on from recorded weights and history, not from its own
            editor.S = {
                l: torch.from_numpy(case.arrays[f"b{t - 1}_cache_c"][i]).double()
                for i, l in enumerate(layers)
            }
        editor.edit(facts)
        out += _targets(case, seen, batch, tol)
        out += _steps(case, editor, seen, t, S, tol)
        done = sum(name.startswith("upd_") for name in seen)
        out.append(compare_equal(f"b{t} updates", done, case.data.get(f"b{t}_n_inner_updates", done)))
        for i, l in enumerate(layers):
            out.append(
                compare(
                    f"b{t}_W_{l}", lm.get_matrix(l), weight_matrix(lm, case.arrays[f"b{t}_W_{l}"]), tol / 2
                )
            )
            out.append(
                compare(
                    f"b{t}_cache_c[{i}]", editor.S[l], case.arrays[f"b{t}_cache_c"][i], 1e-5, relative=True
                )
            )
            S[l] = torch.from_numpy(case.arrays[f"b{t}_cache_c"][i])
    return out


def _targets(
    case: Case, seen: dict[str, torch.Tensor], batch: list[dict], tol: float
) -> Iterator[Comparison]:
    for i, request in enumerate(batch):
        name = request["case_id"]
        losses, recorded = seen["zloss"][i], case.arrays[f"zloss_pre_{name}"]
        ran = int(torch.isfinite(losses[:, 0]).sum())
        yield compare(f"z_pre_{name}", seen["z"][:, i], case.arrays[f"z_pre_{name}"], tol)
        yield compare_equal(f"iterations_pre_{name}", ran, len(recorded))
        yield compare(f"zloss_pre_{name}", losses[:ran], recorded[:ran], tol)


def _steps(
    case: Case, editor: NSE, seen: dict[str, torch.Tensor], t: int, S: dict[int, torch.Tensor], tol: float
) -> Iterator[Comparison]:
    """Keys, states and updates of every solve in call order; and the solve alone from the recorded keys and
    states.
    """
    layers = case.hparams["layers"]
    calls = [name.removeprefix("upd_") for name in seen if name.startswith("upd_")]
    per_pass = len(layers) + 1  # states: all requests first, then one call per layer
    for c, call in enumerate(calls):
        number, layer = (int(x) for x in call.split("_"))
        i = layers.index(layer)
        upd = as_matrix(editor.lm, layer, case.arrays[f"b{t}_upd_step{c}"])
        K, now = case.arrays[f"b{t}_ks_call{c}"], case.arrays[f"b{t}_io_call{number * per_pass + 1 + i}"]
        yield compare(f"b{t}_ks_call{c}", seen[f"K_{call}"], K, tol / 2)
        yield compare(f"b{t}_io_call{number * per_pass + 1 + i}", seen[f"curz_{call}"], now, tol)
        yield compare(f"b{t}_upd_step{c}", seen[f"upd_{call}"], upd, tol / 2)
        K = torch.from_numpy(K).double()
        Z = _recorded_targets(case, t, now.shape[1])
        if Z is None:
            continue
        R = (Z - torch.from_numpy(now).double()) / (len(layers) - i)
        C = editor.config.lam * editor.second_moment(layer) + S[layer].double() + K @ K.T
        neurons = select_neurons(K, editor.config.neuron_threshold)
        yield compare_equal(
            f"neurons of b{t}_upd_step{c}", set(neurons.tolist()), set(np.flatnonzero(np.abs(upd).sum(0)))
        )
        yield compare(
            f"b{t}_upd_step{c} from recorded K", restricted_update(K, R, C, neurons), upd, 2e-6, relative=True
        )
    for name in [n for n in seen if n.startswith("state_")]:
        recorded = f"b{t}_io_call{int(name.removeprefix('state_')) * per_pass}"
        yield compare(recorded, seen[name], case.arrays[recorded], tol)
    for i, layer in enumerate(layers):
        name = f"b{t}_ks_call{len(calls) + i}"
        yield compare(name, seen[f"Kpost_{layer}"], case.arrays[name], tol)


def _recorded_targets(case: Case, t: int, n: int) -> torch.Tensor | None:
    """Recorded targets (m, n) of batch t if all its requests took part in the solve."""
    ids = [r["case_id"] for r in case.data["batches"][t]]
    if len(ids) != n:
        return None
    return torch.from_numpy(np.stack([case.arrays[f"z_pre_{i}"] for i in ids], axis=1)).double()
