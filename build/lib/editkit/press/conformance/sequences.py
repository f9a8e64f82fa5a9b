"""Adapters for sequences of batches: AlphaEdit, MEMIT with history, memorize-the-latest, RECT, PRUNE.

Each batch is checked twice. Its targets, and keys and states of the first layer, are computed on the recorded
weights before it. Its solves, weights and history are computed by our editor running through the whole
sequence from recorded targets, keys and states, so that optimiser noise of one batch does not reach the next.
The first batch also runs end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...linear.normal import null_projector
from ...locate.targets import optimize_targets
from ...methods.weights.accumulate import AccumulateEditor
from ...methods.weights.alphaedit import AlphaEdit
from ...methods.weights.latest import MemorizeLatest
from ...methods.weights.locate_then_edit import LayerwiseEditor
from ...methods.weights.memit import MEMITSeq
from .case import Case, Comparison, adapter, compare, compare_equal
from .editing import (
    as_matrix,
    compare_targets,
    facts_of,
    make,
    recorded_batch,
    replaying,
    set_weights,
    tolerance,
    weight_matrix,
)

Extra = Callable[[LayerwiseEditor, dict[str, torch.Tensor], int], Iterator[Comparison]]


def sequence(
    case: Case, cls: type[LayerwiseEditor], extra: Extra | None = None, *, solve_tol: float = 1e-5,
    weights: Callable[[LayerwiseEditor, int], torch.Tensor] | None = None, **options: Any,
) -> list[Comparison]:  # fmt: skip
    """Compare one recorded sequence. weights(editor, layer): W (m, d) that `b?_W_l` recorded, by default the
    model's.
    """
    measured = compare_measurements(case, cls, **options)
    return measured + compare_solves(case, cls, extra, solve_tol=solve_tol, weights=weights, **options)


def compare_measurements(case: Case, cls: type[LayerwiseEditor], **options: Any) -> list[Comparison]:
    """The first batch end to end; targets and first-layer keys of every batch on the recorded weights before
    it.
    """
    batches = [facts_of(batch) for batch in case.data["batches"]]
    layers = case.hparams["layers"]
    tol = tolerance(case, 1e-4)
    out: list[Comparison] = []
    lm = case.load_model()
    seen: dict[str, torch.Tensor] = {}
    end_to_end = make(cls, case, lm, seen, **options)
    end_to_end.edit(batches[0])
    for l in layers:
        for name in ("K", "curz"):
            out.append(
                compare(f"b0_{name}_{l} end to end", seen[f"{name}_{l}"], case.arrays[f"b0_{name}_{l}"], tol)
            )
        upd = as_matrix(lm, l, case.arrays[f"b0_upd_{l}"])
        out.append(compare(f"b0_upd_{l} end to end", seen[f"upd_{l}"], upd, tol))
    end_to_end.restore()

    for t, facts in enumerate(batches):
        if t:
            set_weights(lm, case, f"b{t - 1}_W_")
        found = optimize_targets(
            lm,
            facts,
            layers[-1],
            end_to_end.config.targets,
            contexts=end_to_end.contexts,
            token=end_to_end.config.token,
        )
        out += compare_targets(case, f"b{t}_", found.z, found.losses, tol)
        first = layers[0]
        out.append(
            compare(f"b{t}_K_{first}", end_to_end.keys(facts, first), case.arrays[f"b{t}_K_{first}"], tol)
        )
        out.append(
            compare(f"b{t}_curz_{first}", end_to_end.current(facts), case.arrays[f"b{t}_curz_{first}"], tol)
        )
    return out


def compare_solves(
    case: Case, cls: type[LayerwiseEditor], extra: Extra | None = None, *, solve_tol: float,
    weights: Callable[[LayerwiseEditor, int], torch.Tensor] | None = None, **options: Any,
) -> list[Comparison]:  # fmt: skip
    """Updates, weights and history of the whole sequence from recorded targets, keys and states."""
    batches = [facts_of(batch) for batch in case.data["batches"]]
    layers = case.hparams["layers"]
    out: list[Comparison] = []
    lm = case.load_model()
    solved: dict[str, torch.Tensor] = {}
    editor = make(replaying(cls), case, lm, solved, **options)
    for t, facts in enumerate(batches):
        editor.replay = recorded_batch(case, f"b{t}_", len(facts))
        editor.edit(facts)
        for l in layers:
            upd = as_matrix(lm, l, case.arrays[f"b{t}_upd_{l}"])
            out.append(compare(f"b{t}_upd_{l}", solved[f"upd_{l}"], upd, solve_tol, relative=True))
            W = editor.matrix(l) if weights is None else weights(editor, l)
            out.append(compare(f"b{t}_W_{l}", W, weight_matrix(lm, case.arrays[f"b{t}_W_{l}"]), solve_tol))
            post = f"b{t}_Kpost_{l}"
            if post in case.arrays and list(layers) == sorted(layers):
                # A layer's keys depend on lower layers only, so they are those of its solve.
                out.append(compare(post, editor.replay[f"K_{l}"], case.arrays[post], 1e-5))
        if extra is not None:
            out += extra(editor, solved, t)
    editor.restore()
    fresh = case.load_model()
    out += [
        compare_equal(f"restored W_{l}", torch.equal(lm.weight(l), fresh.weight(l)), True) for l in layers
    ]
    return out


def compare_cache(case: Case, editor: AccumulateEditor, t: int) -> Iterator[Comparison]:
    """The history: sum of k k^T per layer, recorded in float32."""
    name = f"b{t}_cache_c"
    if name not in case.arrays:
        return
    for i, layer in enumerate(case.hparams["layers"]):
        K = [torch.from_numpy(case.arrays[f"b{s}_K_{layer}"]).double() for s in range(t + 1)]
        ours = sum(k @ k.T for k in K)
        if editor.config.history and editor.config.solver == "released":
            ours = editor.caches[layer]
        elif editor.config.history:
            ours = editor.gram(layer) - editor.prior(layer)[0]
        yield compare(f"{name}[{i}]", ours, case.arrays[name][i], 1e-5, relative=True)


@adapter("alphaedit")
def alphaedit(case: Case) -> list[Comparison]:
    """Released float32 solve; and the default symmetric float64 solve against it, within float32 rounding."""
    h = case.hparams
    options = {
        "threshold": h["nullspace_threshold"], "ridge": float(h["L2"]),
        "history": bool(h.get("cache_c", True)),
        "lam": 0.0,  # recorded as mom2_update_weight, which AlphaEdit does not use
    }  # fmt: skip

    def extra(editor: AlphaEdit, solved: dict, t: int) -> Iterator[Comparison]:
        yield from compare_cache(case, editor, t)

    out = []
    for layer in h["layers"]:
        P = null_projector(case.covariance(layer), h["nullspace_threshold"])
        out.append(compare(f"P_{layer}", P.P, case.arrays[f"P_{layer}"], 1e-4))
        if f"null_dim_{layer}" in case.data:
            out.append(compare_equal(f"null_dim_{layer}", P.rank, case.data[f"null_dim_{layer}"]))
    out += sequence(case, AlphaEdit, extra, solve_tol=1e-4, solver="released", **options)
    exact = compare_solves(case, AlphaEdit, None, solve_tol=5e-4, solver="symmetric", **options)
    return out + [dataclasses.replace(c, name=f"symmetric {c.name}") for c in exact if "_upd_" in c.name]


@adapter("memit_seq")
def memit_seq(case: Case) -> list[Comparison]:
    def extra(editor: MEMITSeq, solved: dict, t: int) -> Iterator[Comparison]:
        yield from compare_cache(case, editor, t)

    out = sequence(case, MEMITSeq, extra, solve_tol=2e-6, solver="released")
    # The default keeps the history in float64, the recording in float32.
    exact = compare_solves(case, MEMITSeq, extra, solve_tol=5e-5)
    return out + [dataclasses.replace(c, name=f"float64 {c.name}") for c in exact if "Kpost" not in c.name]


@adapter("memit_forgetting")
def memit_forgetting(case: Case) -> list[Comparison]:
    def extra(editor: MemorizeLatest, solved: dict, t: int) -> Iterator[Comparison]:
        for layer in case.hparams["layers"]:
            total = as_matrix(editor.lm, layer, case.arrays[f"b{t}_total_{layer}"])
            yield compare(f"b{t}_total_{layer}", editor.total[layer], total, 1e-5)

    return sequence(case, MemorizeLatest, extra)
