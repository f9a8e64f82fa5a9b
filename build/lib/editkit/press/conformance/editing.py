"""What the adapters of weight editors share: reading requests and options, replaying recorded values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...methods.base import Editor
from ...methods.weights.locate_then_edit import LocateConfig
from ...models.facts import Fact
from ...models.lm import LM
from ...models.lookup import find_positions
from .case import Case, Comparison, compare, compare_equal

# hparams of the official files -> options here
_OPTIONS = {
    "layers": "layers", "fact_token": "token", "v_lr": "z_lr", "v_num_grad_steps": "z_steps",
    "v_weight_decay": "z_weight_decay", "clamp_norm_factor": "z_clamp_factor", "kl_factor": "z_kl_factor",
    "v_loss_layer": "z_loss_layer", "mom2_update_weight": "lam",
}  # fmt: skip


def tolerance(case: Case, float32: float, float64: float = 1e-9) -> float:
    """Tolerance by the precision of the recording."""
    return float64 if case.dtype == torch.float64 else float32


def facts_of(requests: list[Mapping[str, Any]]) -> list[Fact]:
    """Facts of recorded requests; the official code writes the target behind one space, stored with it or
    not.
    """
    return [
        Fact(r["prompt"], r["subject"], r["target_new"]["str"].strip(), case_id=str(r["case_id"]))
        for r in requests
    ]


def options_of(case: Case, known: type[LocateConfig]) -> dict[str, Any]:
    """Editor options from the recorded hyper-parameters, those that the editor's Config has."""
    names = known.__dataclass_fields__
    found = {ours: case.hparams[theirs] for theirs, ours in _OPTIONS.items() if theirs in case.hparams}
    return {name: value for name, value in found.items() if name in names}


def statistics_of(case: Case) -> dict[int, Tensor]:
    """Recorded second moments of the edited layers."""
    return {layer: torch.from_numpy(case.covariance(layer)) for layer in case.hparams["layers"]}


def make(cls: type[Editor], case: Case, lm: LM, seen: dict[str, Tensor] | None = None, **more: Any) -> Editor:
    """The editor with the case's options, contexts and statistics; `seen` collects what it records."""
    record = None if seen is None else seen.__setitem__
    config = {**options_of(case, cls.Config), **more}
    return cls(
        lm, config, statistics=statistics_of(case), contexts=case.data["context_templates"], record=record
    )


def as_matrix(lm: LM, layer: int, array: np.ndarray) -> np.ndarray:
    """A recorded matrix of either orientation as (m, d)."""
    return array if array.shape == lm.weight_shape(layer) else array.T


def weight_matrix(lm: LM, array: np.ndarray) -> np.ndarray:
    """A recorded weight, in the model's orientation, as (m, d)."""
    return array.T if lm.spec.orientation == "conv1d" else array


def set_weights(lm: LM, case: Case, prefix: str) -> None:
    """Write recorded weights `{prefix}{layer}` into the model."""
    for layer in case.hparams["layers"]:
        lm.set_matrix(layer, torch.from_numpy(weight_matrix(lm, case.arrays[f"{prefix}{layer}"])))


def compare_targets(case: Case, prefix: str, Z: Tensor, losses: Tensor, tol: float) -> list[Comparison]:
    """Targets and losses against `{prefix}z_i` and `{prefix}zloss_i`; the number of iterations has to be
    equal.
    """
    out = []
    for i in range(Z.shape[1]):
        recorded = case.arrays[f"{prefix}zloss_{i}"]
        ran = int(torch.isfinite(losses[i, :, 0]).sum())
        out.append(compare(f"{prefix}z_{i}", Z[:, i], case.arrays[f"{prefix}z_{i}"], tol))
        out.append(compare_equal(f"{prefix}iterations_{i}", ran, len(recorded)))
        out.append(compare(f"{prefix}zloss_{i}", losses[i, :ran], recorded[:ran], tol))
    return out


def compare_lookups(case: Case, lm: LM) -> list[Comparison]:
    """Recorded token positions [text, index, word]: the word ends the subject."""
    subjects = {r["subject"] for r in case.data.get("requests", [])}
    pairs, recorded = [], []
    for text, index, _ in case.data.get("lookups", []):
        subject = next((s for s in subjects if s in text), None)
        if subject is not None:
            start = text.rindex(subject)
            pairs.append((text[:start] + "{}" + text[start + len(subject) :], subject))
            recorded.append(index)
    if not pairs:
        return []
    _, found = find_positions(lm, pairs)
    return [compare_equal("lookups", found.tolist(), recorded)]


class Replay:
    """Mix-in for locate-then-edit editors: recorded targets, keys and states instead of those of the model.

    Set `replay` to {"z": Z, "K_<layer>": K, "curz_<layer>": states} before each `edit`.
    """

    replay: dict[str, Tensor]

    def targets(self, facts: list[Fact]) -> Tensor:
        self._layer = iter(self.config.layers)  # type: ignore[attr-defined]
        return self.replay["z"]

    def keys(self, facts: list[Fact], layer: int) -> Tensor:
        return self.replay[f"K_{layer}"]

    def current(self, facts: list[Fact]) -> Tensor:
        layer = next(self._layer, None)
        return self.replay["z" if layer is None else f"curz_{layer}"]


def replaying(cls: type[Editor]) -> type[Editor]:
    """The editor class with recorded intermediates."""
    return type(f"Replayed{cls.__name__}", (Replay, cls), {})


def recorded_batch(case: Case, prefix: str, n: int) -> dict[str, Tensor]:
    """What `Replay` needs of one batch of n requests, as float64."""
    Z = np.stack([case.arrays[f"{prefix}z_{i}"] for i in range(n)], axis=1)
    out = {"z": torch.from_numpy(Z).double()}
    for layer in case.hparams["layers"]:
        for name in (f"K_{layer}", f"curz_{layer}"):
            out[name] = torch.from_numpy(case.arrays[prefix + name]).double()
    return out
