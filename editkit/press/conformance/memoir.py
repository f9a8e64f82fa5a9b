"""Adapter for MEMOIR: sequential edits of one memory, and what edited, rephrased and unrelated prompts find."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...locate.target_rows import encode_targets
from ...methods.memory.memoir import Memoir
from ...methods.memory.tophash import TopHash
from ...models.facts import Fact
from ...models.hooks import trace
from ...models.lm import LM
from ...models.prompts import prompts
from .case import CannotHandle, Case, Comparison, adapter, compare, compare_equal
from .editing import tolerance

_FEATURES = {"mean": "mean", "mean_decentered": "centered"}
_BACKGROUND_ROWS = 100  # rows of the saved features that the released code averages


@adapter("memoir")
def memoir(case: Case) -> list[Comparison]:
    lm = case.load_model()
    seen: dict[str, list[Tensor]] = {"weight": [], "norm": [], "gradient": []}
    editor = Memoir(
        lm, _options(case), contexts=case.data["context_templates"],
        record=lambda name, value: seen[name].append(value.detach().clone()),
    )  # fmt: skip
    layer, near = editor.layer, tolerance(case, 1e-5)
    out = [compare("W_original", lm.weight(layer), case.arrays["W_original"], 0.0)]
    center, more = _center(case, editor, near)
    out += more
    editor.hash = TopHash(center.to(editor.weight), torch.from_numpy(case.arrays["permutation"]), editor.k)
    for e, request in enumerate(case.data["requests"]):
        for values in seen.values():
            values.clear()
        fact = _fact(request)
        with editor.detached():
            out += _rows(case, lm, editor, fact, e)
        losses, kept = _edit(editor, fact)
        recorded = case.arrays[f"e{e}_losses"]
        weights = torch.stack(seen["weight"]) if seen["weight"] else torch.zeros(0)
        out += [
            compare_equal(f"e{e} steps", len(losses), len(recorded)),
            compare(f"e{e}_losses", losses, recorded, near),
            compare(f"e{e}_gradnorm_preclip", seen["norm"], case.arrays[f"e{e}_gradnorm_preclip"], near),
            compare(f"e{e}_grad_step0_clipped", seen["gradient"][0], case.arrays[f"e{e}_grad_step0_clipped"][:, kept],
                    near),
            compare(f"e{e}_grad_step0_clipped elsewhere", 0 * kept.float().sum(),
                    abs(case.arrays[f"e{e}_grad_step0_clipped"][:, ~kept]).max(), 0.0),
            compare(f"e{e}_new_weight_steps", weights, case.arrays[f"e{e}_new_weight_steps"][: len(weights)], near),
            compare(f"e{e}_masks_after", editor.masks.masks(torch.arange(len(editor.masks))),
                    case.arrays[f"e{e}_masks_after"], 0.0),
        ]  # fmt: skip
    for probe in case.data.get("probes", []):
        out += _probe(case, lm, editor, probe)
    with editor.detached():
        out.append(compare("W_original afterwards", lm.weight(layer), case.arrays["W_original"], 0.0))
    editor.restore()
    return out


def _center(case: Case, editor: Memoir, near: float) -> tuple[Tensor, list[Comparison]]:
    """What is taken off a feature. Plain means need no background, so a recording of them may have none."""
    out, arrays = [], case.arrays
    if "bg_mean" in arrays and "background_features" in arrays:
        rows = torch.from_numpy(arrays["background_features"])[:_BACKGROUND_ROWS]
        out.append(compare("bg_mean", rows.mean(0), arrays["bg_mean"], near))
    if editor.config.features == "mean":
        return torch.zeros(editor.d), out
    return torch.from_numpy(arrays["bg_mean"]), out


def _options(case: Case) -> dict[str, Any]:
    h = case.hparams
    found = re.search(r"\d+", " ".join(h.get("inner_params", [])))
    if found is None or h.get("prompt_feature_agg") not in _FEATURES:
        raise CannotHandle("hparams.inner_params names no layer, or prompt_feature_agg is unknown")
    return {
        "layer": int(found.group()), "k": h["top_k"], "threshold": h["irr_threshold"], "lr": h["edit_lr"],
        "steps": h["n_iter"], "features": _FEATURES[h["prompt_feature_agg"]], "weight_decay": 1e-5,
        "loss_divisor": "released",
    }  # fmt: skip


def _fact(request: dict[str, str]) -> Fact:
    prompt, subject = request["prompt"], request["subject"]
    if subject not in prompt:
        raise CannotHandle(f"the prompt {prompt!r} does not contain its subject {subject!r}")
    return Fact(prompt.replace(subject, "{}", 1), subject, request["target_new"].strip())


def _rows(case: Case, lm: LM, editor: Memoir, fact: Fact, e: int) -> list[Comparison]:
    """Our training rows against the recorded ones (whose last row is an untrained irrelevant text)."""
    encoding, _, places = encode_targets(lm, [fact], editor.contexts, token="last").take([0])
    ids, mask = case.arrays[f"e{e}_input_ids"], case.arrays[f"e{e}_attention_mask"].astype(bool)
    # The last target token is predicted but never read, so our rows end before it.
    recorded = [row[keep][:-1].tolist() for row, keep in zip(ids, mask, strict=True)][:-1]
    ours = [row[: int(n)].tolist() for row, n in zip(encoding.input_ids, encoding.lengths, strict=True)]
    labels = [row[row != -100].tolist() for row in case.arrays[f"e{e}_labels"]][:-1]
    targets = [places[places[:, 1] == row, 3].tolist() for row in range(len(ours))]
    name = lm.down_name(editor.layer)
    with torch.no_grad(), trace(lm.model, [name], inputs=True, outputs=False, stop_at=name) as at:
        lm.forward(encoding)
    x = case.arrays[f"e{e}_layer_input"]
    found = torch.cat([a[: int(n)] for a, n in zip(at.input[name], encoding.lengths, strict=True)])
    wanted = torch.cat([torch.from_numpy(a[keep][:-1]) for a, keep in zip(x, mask, strict=True)][:-1])
    return [
        compare_equal(f"e{e}_input_ids", ours, recorded),
        compare_equal(f"e{e}_labels", targets, labels),
        compare(f"e{e}_layer_input", found, wanted, tolerance(case, 2e-5)),
    ]


def _edit(editor: Memoir, fact: Fact) -> tuple[list[float], Tensor]:
    """Losses of all evaluated steps, and the columns that belong to the edit."""
    losses: list[float] = []
    train = editor.train

    def watched(rows, mask, index, fact):
        losses.extend(train(rows, mask, index, fact))
        return losses

    editor.train = watched
    try:
        editor.edit([fact])
    finally:
        del editor.train
    return losses, editor.masks.masks(torch.tensor([editor.mask_of_edit[-1]]))[0]


def _probe(case: Case, lm: LM, editor: Memoir, probe: dict[str, Any]) -> list[Comparison]:
    name = f"p{probe['index']}_{probe['mode']}"
    length, near = probe["last_prompt_token_loc"] + 1, tolerance(case, 1e-5)
    down = lm.down_name(editor.layer)
    encoding = lm.encode([probe["text"]])
    with torch.no_grad(), prompts(lm, [length]), trace(lm.model, [down], inputs=True) as at:
        logits = lm.logits(encoding)[0, length - 1 :]
    x, edited = at.input[down], at.output[down]
    with torch.no_grad(), editor.detached(), trace(lm.model, [down]) as base:
        lm.logits(encoding)
    feature = x[:, :length].mean(1)
    center = editor.hash.center
    query = editor.hash(feature)
    overlap = editor.masks.overlaps(query)[0].float() / editor.k
    active = bool(overlap.max() >= editor.config.threshold)
    recorded = case.arrays[f"{name}_logits"]
    return [
        compare_equal(f"{name}_input_ids", encoding.input_ids.tolist(), case.arrays[f"{name}_input_ids"].tolist()),
        compare(f"{name}_feature", (feature - center)[0], case.arrays[f"{name}_feature"], near),
        compare_equal(f"{name}_hash_idx", query[0].nonzero()[:, 0].tolist(),
                      sorted(case.arrays[f"{name}_hash_idx"].tolist())),
        compare(f"{name}_overlap", overlap, case.arrays[f"{name}_overlap"], 1e-6),
        compare(f"{name} best overlap", overlap.max(), probe["best_overlap"], 1e-6),
        compare_equal(f"{name} active", active, probe["active"]),
        compare(f"{name}_residual", (edited - base.output[down])[0], case.arrays[f"{name}_residual"], near),
        compare(f"{name}_logits", logits.reshape(recorded.shape), recorded, tolerance(case, 1e-4)),
    ]  # fmt: skip
