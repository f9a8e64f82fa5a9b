"""Adapter for fine-tuning: released objective at the last prompt position, biases included."""

from __future__ import annotations

import torch

from ...methods.weights.ft import FT
from .case import Case, Comparison, adapter, compare, compare_equal
from .editing import facts_of, tolerance


@adapter("ft")
def ft(case: Case) -> list[Comparison]:
    h = case.hparams
    facts, lm = facts_of(case.data["requests"]), case.load_model()
    seen: dict[str, torch.Tensor] = {}
    limit = h.get("norm_constraint")
    config = {
        "layers": h["layers"], "objective": "prompt_last", "lr": h["lr"], "steps": h["num_steps"],
        "weight_decay": h["weight_decay"], "batch_size": h["batch_size"], "biases": True,
        "score_padding": True,
        "limit": limit if isinstance(limit, float) else None,
    }  # fmt: skip
    editor = FT(lm, config, record=seen.__setitem__)
    names = sorted(k.removeprefix("W0:") for k in case.arrays if k.startswith("W0:"))
    out = [compare_equal("trained parameters", sorted(editor.parameter_names()), names)]
    out += [compare(f"W0:{n}", lm.parameter(n), case.arrays[f"W0:{n}"], 0.0) for n in names]
    delta = editor.edit(facts)
    tol = tolerance(case, 1e-5)
    out.append(compare("batch_losses", seen["batch_losses"], case.arrays["batch_losses"], tol))
    out += [compare(f"W1:{n}", delta.after[n], case.arrays[f"W1:{n}"], tol) for n in names]
    editor.restore()
    out += [compare(f"restored W0:{n}", lm.parameter(n), case.arrays[f"W0:{n}"], 0.0) for n in names]
    return out
