"""Adapter for WISE: sequential edits in the released form, TIES merges from recorded shards, probes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...methods.memory.wise import _INF, WISE
from ...methods.memory.wise_merge import ties
from ...models.facts import Fact
from .case import CannotHandle, Case, Comparison, adapter, compare, compare_equal
from .memories import Log, compare_probes, fact_of, site


class _Recorded(WISE):
    """WISE in the released form with recorded masks, irrelevant texts, layer inputs and replayed edits."""

    case: Case
    edit_index = 0
    mask_now: Tensor | None = None
    loc_prompt = ""
    unmerged = (
        False  # read the open shard and the merged ones apart, as the model does before its final merge
    )

    def memories(self) -> list[tuple[Tensor, float]]:
        if not self.unmerged:
            return super().memories()
        bound = self.act * self.config.act_ratio
        return [(self.new, bound), (self.weight if self.merged is None else self.merged, bound)]

    def irrelevant(self, fact: Fact) -> str:
        return self.loc_prompt

    def draw_mask(self) -> Tensor:
        return self.mask_now

    def choose_replay(self, losses: list[Tensor]) -> int:
        """The released code draws from an unrecorded random state: the draw whose loss was recorded."""
        recorded = self.case.arrays[f"e{self.edit_index}_loss_total_ft_act"][self._step, 4]
        return int(np.argmin([abs(float(v.detach()) - recorded) for v in losses]))


@adapter("wise")
def wise(case: Case) -> list[Comparison]:
    h, lm, seen = case.hparams, case.load_model(), Log()
    if h.get("merge_alg", "ties") != "ties" or h.get("use_chat_template"):
        raise CannotHandle("only merge_alg='ties' without a chat template is implemented")
    limit = h["norm_constraint"]
    config = {
        **site(case, lm), "lr": h["edit_lr"], "steps": h["n_iter"], "weight_decay": 1e-5,
        "limit": limit if isinstance(limit, float) else None, "alpha": h["alpha"], "beta": h["beta"],
        "gamma": h["gamma"], "act_ratio": h["act_ratio"], "mask_ratio": h["mask_ratio"],
        "save_every": h["save_freq"], "merge_every": h["merge_freq"], "density": h["densities"],
        "retrieve": h["retrieve"], "replay": bool(h.get("replay")), "form": "released",
    }  # fmt: skip
    first, *others = case.data["context_templates"]
    editor = _Recorded(lm, config, contexts=[[first], others] if others else [[first]], record=seen)
    editor.case = case
    W = case.arrays["W_original"]
    out = [compare("W_original", editor.weight, W, 0.0)]
    for e, request in enumerate(case.data["requests"]):
        editor.edit_index, editor.loc_prompt = e, request["loc_prompt"]
        if f"e{e}_weight_mask" in case.arrays:
            editor.mask_now = torch.from_numpy(case.arrays[f"e{e}_weight_mask"]).float().view(W.shape)
        editor.edit([fact_of(request, e)])
        out += _edit(case, editor, seen, e)
    if not editor.config.retrieve:
        out += _final_merge(case, editor)
    return out + compare_probes(case, lm, 1e-3, routed=False)


def _final_merge(case: Case, editor: _Recorded) -> list[Comparison]:
    """Without `retrieve` the released wrapper merges at its first inference. Whether probes were read through it,
    and the final weight taken after it, is not recorded: the state that fits is taken.
    """
    W, lm = editor.weight, editor.lm
    merged = editor.memories()[0][0] if editor.count >= editor.config.save_every else W
    states = [merged, W if editor.merged is None else editor.merged]
    deviations = []
    for editor.unmerged in (False, True):
        found = compare_probes(case, lm, 1e-3, routed=False)
        deviations.append(max(min(c.severity, 1e9) for c in found))
    editor.unmerged = deviations[1] < deviations[0]
    if "layer_weight_final" not in case.arrays:
        return []
    recorded = torch.from_numpy(case.arrays["layer_weight_final"])
    final = min(states, key=lambda state: float((state - recorded).abs().mean()))
    return [_merged("layer_weight_final", final, recorded.numpy())]


def _edit(case: Case, editor: _Recorded, seen: Log, e: int) -> list[Comparison]:
    arrays, out = case.arrays, []
    for name in ("input_ids", "labels"):
        out.append(compare_equal(f"e{e}_{name}", seen[name][-1].tolist(), arrays[f"e{e}_{name}"].tolist()))
    out.append(compare(f"e{e}_layer_input", seen["layer_input"][-1], arrays[f"e{e}_layer_input"], 1e-5))
    recorded = arrays[f"e{e}_loss_total_ft_act"]
    found = seen["losses"][e]
    if (
        found.shape[1] < recorded.shape[1]
    ):  # nothing is replayed before the first merge: no losses of it, or zeros
        unused = np.nan_to_num(recorded[:, found.shape[1] :])
        out.append(compare(f"e{e} replay losses before the first merge", 0 * unused, unused, 0.0))
        recorded = recorded[:, : found.shape[1]]
    out.append(compare(f"e{e}_loss_total_ft_act", found, recorded, 1e-3))
    out.append(
        _merged(f"e{e}_new_weight_start", seen["new_weight_start"][e], arrays[f"e{e}_new_weight_start"])
    )
    if f"e{e}_new_weight_before_save" in arrays:
        found = seen["new_weight_before_save"][e]
        out.append(
            compare(f"e{e}_new_weight_before_save", found, arrays[f"e{e}_new_weight_before_save"], 1e-4)
        )
    out.append(compare(f"e{e}_new_weight", editor.new, arrays[f"e{e}_new_weight"], 1e-4))
    stored = [k for k in arrays if k.startswith(f"e{e}_memory_weight_")]
    out.append(compare_equal(f"e{e} shards", len(editor.shards), len(stored)))
    for j, shard in enumerate(editor.shards):
        if f"e{e}_memory_weight_{j}" in arrays:
            out.append(_merged(f"e{e}_memory_weight_{j}", shard, arrays[f"e{e}_memory_weight_{j}"]))
    if f"e{e}_merge_cnt" in case.data:
        out.append(compare_equal(f"e{e}_merge_cnt", editor.merges, case.data[f"e{e}_merge_cnt"]))
    if f"e{e}_editing_mean_act" in case.data:
        smallest = case.data[f"e{e}_editing_mean_act"][1]
        out.append(
            compare(
                f"e{e} smallest activation", min(editor.act, _INF), smallest, 1e-3 if smallest < 1e8 else 1
            )
        )
    acts = case.data.get(f"e{e}_memory_min_act", [])
    out.append(compare(f"e{e}_memory_min_act", editor.acts, acts, 1e-3))
    out += _merge_alone(case, editor, e)
    return out


def _merge_alone(case: Case, editor: _Recorded, e: int) -> list[Comparison]:
    """The merge from recorded shards, which is exact: nothing of the training enters."""
    cfg, arrays = editor.config, case.arrays
    n = cfg.merge_every // cfg.save_every
    saves = [i for i in range(e + 1) if f"e{i}_new_weight_before_save" in arrays]
    if not cfg.retrieve or (e + 1) % cfg.merge_every or len(saves) < n:
        return []
    shards = [torch.from_numpy(arrays[f"e{i}_new_weight_before_save"]) for i in saves[-n:]]
    last = max(int(k.rpartition("_")[2]) for k in arrays if k.startswith(f"e{e}_memory_weight_"))
    merged = ties(torch.from_numpy(arrays["W_original"]), shards, cfg.density)
    return [compare(f"e{e} merge of recorded shards", merged, arrays[f"e{e}_memory_weight_{last}"], 1e-6)]


def _merged(name: str, ours: Tensor, recorded: np.ndarray) -> Comparison:
    """Weights that went through TIES: the trimming threshold falls among weight-decay deltas of about 1e-5 where
    float ties decide, so single entries may differ by that much.
    """
    return compare(name, ours, recorded, 2e-4)
