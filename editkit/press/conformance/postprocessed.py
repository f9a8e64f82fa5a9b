"""Adapters for RECT and PRUNE, plain, with history, and with history and error compensation (released
variants).

Released variants process updates after the layer loop; see `sequences` for how each batch is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...linear.postprocess import prune_spectrum, rect_mask
from ...methods.weights.postprocessed import PostprocessedEditor
from ...methods.weights.prune import PRUNE
from ...methods.weights.rect import RECT
from .case import Case, Comparison, adapter, compare
from .editing import as_matrix, recorded_batch, weight_matrix
from .sequences import sequence


def _before(case: Case, editor: PostprocessedEditor, layer: int, t: int) -> torch.Tensor:
    """Recorded weights (m, d) before batch t."""
    if t:
        return torch.from_numpy(weight_matrix(editor.lm, case.arrays[f"b{t - 1}_W_{layer}"])).double()
    return editor.lm.to_matrix(editor._start[editor.lm.weight_name(layer)]).double()


def _applied(case: Case, editor: PostprocessedEditor, t: int) -> Iterator[Comparison]:
    """Masks and pruned updates, from the recorded raw update and weights: no chained rounding, so exact for
    masks.

    The functions are called in the layer loop and again when the updates are written, 2 L calls.
    """
    layers = case.hparams["layers"]
    for call in range(2 * len(layers)):
        layer = layers[call % len(layers)]
        raw = torch.from_numpy(
            np.ascontiguousarray(as_matrix(editor.lm, layer, case.arrays[f"b{t}_upd_{layer}"]))
        )
        W = _before(case, editor, layer, t)
        if f"b{t}_mask_call{call}" in case.arrays:
            recorded = as_matrix(editor.lm, layer, case.arrays[f"b{t}_mask_call{call}"])
            ours = rect_mask(raw, W, editor.config.keep).numpy()
            # The official ratio is float32 or float64 by orientation; an entry on the threshold may fall
            # either way.
            yield compare(
                f"b{t}_mask_call{call}", (ours != recorded).mean(), 0.0, 5e-4, note="share of entries"
            )
        if f"b{t}_pruned_call{call}" in case.arrays:
            recorded = as_matrix(editor.lm, layer, case.arrays[f"b{t}_pruned_call{call}"])
            yield compare(f"b{t}_pruned_call{call}", prune_spectrum(raw, W), recorded, 1e-6, relative=True)


class _Errors:
    """The recorded error caches: of compensated variants Algorithm 1's; of the others a sum that nothing
    reads.
    """

    def __init__(self, case: Case):
        self.case = case
        self.sums: dict[int, torch.Tensor] = {}
        self.S: dict[int, torch.Tensor] = {}

    def __call__(self, editor: PostprocessedEditor, solved: dict[str, Any], t: int) -> Iterator[Comparison]:
        name = f"b{t}_error_cache"
        if name not in self.case.arrays:
            return
        layers = self.case.hparams["layers"]
        batch = recorded_batch(self.case, f"b{t}_", len(self.case.data["batches"][t]))
        for i, l in enumerate(layers):
            recorded = self.case.arrays[name][i]
            K = batch[f"K_{l}"]
            R = (batch["z"] - batch[f"curz_{l}"]) / (len(layers) - i)
            if editor.config.compensate:
                ours = editor.error[l]
            elif not recorded.any():
                continue  # memit_seq_prune never writes it
            else:
                S = self.S.get(l, torch.zeros_like(K @ K.T)) + K @ K.T
                self.S[l] = S
                C = editor.config.lam * editor.second_moment(l) + S
                ours = self.sums.get(l, 0) + solved[f"written_{l}"] @ C - R @ K.T
                self.sums[l] = ours
            scale = float((R @ K.T).abs().max())  # what the update is solved from; less is its rounding
            yield compare(f"{name}[{i}]", ours, recorded, 1e-4, relative=True, scale=scale)


def _postprocessed(case: Case, cls: type[PostprocessedEditor], **options: Any) -> list[Comparison]:
    errors = _Errors(case)

    def extra(editor: PostprocessedEditor, solved: dict[str, Any], t: int) -> Iterator[Comparison]:
        yield from _applied(case, editor, t)
        yield from errors(editor, solved, t)

    return sequence(case, cls, extra, solve_tol=2e-6, processing="after_loop", solver="released", **options)


@adapter("memit_rect")
def memit_rect(case: Case) -> list[Comparison]:
    return _postprocessed(case, RECT, keep=0.4)


@adapter("memit_seq_rect")
def memit_seq_rect(case: Case) -> list[Comparison]:
    return _postprocessed(case, RECT, keep=0.4, history=True)


@adapter("memit_seq_rect_err")
def memit_seq_rect_err(case: Case) -> list[Comparison]:
    return _postprocessed(case, RECT, keep=0.2, history=True, compensate=True, ridge=1.0)


@adapter("memit_seq_prune")
def memit_seq_prune(case: Case) -> list[Comparison]:
    return _postprocessed(case, PRUNE, when="step", history=True)


@adapter("memit_seq_prune_err")
def memit_seq_prune_err(case: Case) -> list[Comparison]:
    return _postprocessed(case, PRUNE, when="step", history=True, compensate=True, ridge=1.0)


@adapter("memit_prune")
def memit_prune(case: Case) -> list[Comparison]:
    """The total is pruned once, after the last batch, and added to the edited weights (double add)."""
    last = len(case.data["batches"]) - 1

    def extra(editor: PRUNE, solved: dict[str, Any], t: int) -> Iterator[Comparison]:
        if t < last:
            return
        for l in case.hparams["layers"]:
            squashed = as_matrix(editor.lm, l, case.arrays[f"final_adjusted_upd_{l}"])
            final = weight_matrix(editor.lm, case.arrays[f"final_W_{l}"])
            yield compare(f"final_adjusted_upd_{l}", solved[f"squashed_{l}"], squashed, 1e-5, relative=True)
            yield compare(f"final_W_{l}", editor.matrix(l), final, 1e-5, relative=True)

    return sequence(
        case,
        PRUNE,
        extra,
        solve_tol=1e-5,
        weights=lambda editor, l: editor.unsquashed[l],
        when="total",
        double_add=True,
    )
