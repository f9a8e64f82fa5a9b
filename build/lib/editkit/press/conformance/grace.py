"""Adapter for GRACE: sequential edits with the released rules of labels, then probes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods.memory.grace import GRACE
from .case import CannotHandle, Case, Comparison, adapter, compare, compare_equal
from .memories import Log, compare_probes, fact_of, site

_REPLACEMENT = {"replace_last": "last", "replace_prompt": "prompt", "replace_all": "all"}


class _Recorded(GRACE):
    """GRACE with the recorded random start values."""

    start: Tensor | None = None

    def initial_value(self, out: Tensor) -> Tensor:
        return super().initial_value(out) if self.start is None else self.start


@adapter("grace")
def grace(case: Case) -> list[Comparison]:
    h, lm, seen = case.hparams, case.load_model(), Log()
    if h.get("val_train", "sgd") != "sgd" or h.get("dist_fn", "euc") != "euc":
        raise CannotHandle(f"val_train={h['val_train']!r}, dist_fn={h['dist_fn']!r} is not implemented")
    config = {
        **site(case, lm), "radius": h["eps"], "lr": h["edit_lr"], "steps": h["n_iter"],
        "value_init": h["val_init"], "replacement": _REPLACEMENT[h["replacement"]],
        "expand": h["eps_expand"], "match": "released",
    }  # fmt: skip
    editor = _Recorded(lm, config, record=seen)
    out: list[Comparison] = []
    for e, request in enumerate(case.data["requests"]):
        fact = fact_of(request, e)
        start = case.arrays.get(f"e{e}_init_value")
        editor.start = None if start is None else torch.from_numpy(start)[0]
        editor.edit([fact])
        ids = lm.tokenizer(f"{fact.text} {fact.target}")["input_ids"]
        out.append(compare_equal(f"e{e}_input_ids", [ids], case.arrays[f"e{e}_input_ids"].tolist()))
        label = editor.book.labels[int(seen["chosen"][e])]
        if config["match"] == "released" and len(editor.book) == e + 1:
            labels = [[-100] * label.n_prompt + list(label.ids)]
            out.append(compare_equal(f"e{e}_labels", labels, case.arrays[f"e{e}_labels"].tolist()))
        if f"e{e}_n_keys" in case.data:
            out.append(compare_equal(f"e{e}_n_keys", len(editor.book), case.data[f"e{e}_n_keys"]))
        chosen = case.arrays[f"e{e}_chosen_key"].reshape(-1).tolist()
        out.append(compare_equal(f"e{e}_chosen_key", seen["chosen"][e].tolist(), chosen))
        # An independent run under the current transformers deviates by 2e-4 in the values (golden README).
        for ours, theirs, tol in (
            ("keys", "keys", 1e-4), ("radii", "epsilons", 1e-4), ("values", "values", 2e-3),
            ("losses", "losses", 1e-3),
        ):  # fmt: skip
            recorded = case.arrays[f"e{e}_{theirs}"]
            found = seen[ours][e]
            recorded = recorded.reshape(found.shape) if recorded.size == found.numel() else recorded
            out.append(compare(f"e{e}_{theirs}", found, recorded, tol))
    return out + compare_probes(case, lm, 5e-3)
