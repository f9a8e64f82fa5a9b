"""Adapter for DEFER: sequential edits from the recorded start values, then probes."""

from __future__ import annotations

import torch

from ...methods.memory.defer import DEFER
from .case import Case, Comparison, adapter, compare, compare_equal
from .memories import Log, compare_probes, fact_of, site

_ARRAYS = {
    "gate_weight": "defer_weight", "gate_bias": "defer_bias", "value_weight": "values_weight",
    "value_bias": "values_bias",
}  # fmt: skip


@adapter("defer")
def defer(case: Case) -> list[Comparison]:
    h, lm, seen = case.hparams, case.load_model(), Log()
    config = {
        **site(case, lm), "lr": h["edit_lr"], "steps": h["n_iter"], "threshold": h["threshold"],
        "query": "sequence_last",
    }  # fmt: skip
    editor = DEFER(lm, config, record=seen)
    start = {ours: torch.from_numpy(case.arrays[f"init_{theirs}"]) for ours, theirs in _ARRAYS.items()}
    editor.load_memory({"trained": False}, start)
    out: list[Comparison] = []
    for e, request in enumerate(case.data["requests"]):
        fact = fact_of(request, e)
        editor.edit([fact])
        ids = lm.tokenizer(f"{fact.text} {fact.target}")["input_ids"]
        n = len(ids) - len(lm.tokenizer(fact.text)["input_ids"])
        labels = [-100] * (len(ids) - n) + ids[-n:]
        out.append(compare_equal(f"e{e}_input_ids", [ids], case.arrays[f"e{e}_input_ids"].tolist()))
        out.append(compare_equal(f"e{e}_labels", [labels], case.arrays[f"e{e}_labels"].tolist()))
        out.append(compare(f"e{e}_losses", seen["losses"][e], case.arrays[f"e{e}_losses"], 1e-4))
        for ours, theirs in _ARRAYS.items():
            out.append(compare(f"e{e}_{theirs}", seen[ours][e], case.arrays[f"e{e}_{theirs}"], 1e-4))
    return out + compare_probes(case, lm, 1e-3)
