"""What the MEMOIR notebooks measure: overlaps of prompts with edits, and scores by edit.

Routing depends on frozen features alone, so overlaps need no trained memory: the masks of thousands of edits cost
one partial forward pass each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...methods.memory.masks import MaskStore
from ...methods.memory.memoir import Lookup
from ...methods.memory.tophash import TopHash, draw_permutation, mean_features_of
from ...models.facts import Fact
from ...models.lm import LM
from ...scoring import score
from ...scoring.protocols import Baseline

# name on the pages -> probes of a fact
GROUPS = ("edit prompt", "rephrase", "same subject", "neighbor", "unrelated fact")
SCORED = ("efficacy", "paraphrase", "locality", "neighborhood", "same_subject")


def probes(facts: Sequence[Fact]) -> pd.DataFrame:
    """All prompts that are looked up: columns group, fact (index of its fact), prompt."""
    rows = []
    for i, fact in enumerate(facts):
        found = {
            "edit prompt": [fact.text], "rephrase": fact.paraphrases,
            "same subject": [p.prompt for p in fact.same_subject],
            "neighbor": [p.prompt for p in fact.neighborhood],
            "unrelated fact": [p.prompt for p in fact.locality],
        }  # fmt: skip
        rows += [{"group": g, "fact": i, "prompt": p} for g in GROUPS for p in found[g]]
    return pd.DataFrame(rows)


@dataclasses.dataclass(frozen=True)
class Routing:
    """The hash of one layer and the masks of some edits under it.

    hash: TopHash.   store: masks of the edits.   owner: for each stored mask the indices of its edits.
    """

    hash: TopHash
    store: MaskStore
    owner: list[list[int]]

    @classmethod
    def of(cls, hash_: TopHash, features: Tensor) -> Routing:
        """From the mean features (n, d) of the edit prompts."""
        store, owner = MaskStore(features.shape[1], features.device), []
        for i, mask in enumerate(hash_(features)):
            index = store.add(mask)
            if index == len(owner):
                owner.append([])
            owner[index].append(i)
        return cls(hash_, store, owner)

    def look_up(self, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(overlap ratio with the nearest mask, index of that mask), each (n,), of mean features (n, d)."""
        overlap, index = self.store.best(self.hash(features))
        return (overlap.float() / self.hash.k).numpy(), index.numpy()

    def finds(self, mask: np.ndarray, fact: np.ndarray) -> np.ndarray:
        """Whether the nearest mask is that of the probe's own edit, (n,) bool."""
        return np.array([f in self.owner[m] for m, f in zip(mask, fact, strict=True)])


def make_hash(features: Tensor, k: int, seed: int, *, centered: bool = True, permute: bool = True) -> TopHash:
    """TopHash from the mean features (n, d) of background texts."""
    d = features.shape[1]
    center = features.mean(0) if centered else torch.zeros(d)
    return TopHash(center, draw_permutation(d, seed) if permute else torch.arange(d), k)


def features_of(lm: LM, layers: Sequence[int], texts: Sequence[str]) -> dict[int, Tensor]:
    """Mean features of texts at several layers, each distinct text once."""
    unique = list(dict.fromkeys(texts))
    row = {t: i for i, t in enumerate(unique)}
    index = torch.tensor([row[t] for t in texts])
    return {layer: found[index] for layer, found in mean_features_of(lm, layers, unique).items()}


def auc(yes: np.ndarray, no: np.ndarray) -> float:
    """Probability that a random member of `yes` lies above one of `no` (ties count half)."""
    order = np.sort(no)
    below = np.searchsorted(order, yes, "left")
    ties = np.searchsorted(order, yes, "right") - below
    return float((below + ties / 2).mean() / len(no))


def scores(lm: LM, facts: Sequence[Fact], baseline: Baseline) -> pd.DataFrame:
    """Teacher-forced scores (protocol "easyedit") of what the model says now, with the position of each edit.

    success is token accuracy on efficacy (Rel) and paraphrase (Gen), agreement with the unedited model elsewhere.
    """
    table = score(lm, facts, "easyedit", [a for a in SCORED if _has(facts, a)], baseline=baseline)
    position = {f.case_id or f.key: i for i, f in enumerate(facts)}
    return table.assign(position=table["fact_id"].map(position))


def take_baseline(lm: LM, facts: Sequence[Fact]) -> Baseline:
    """What the unedited model says on the scored probes."""
    return Baseline.of(lm, facts, [a for a in SCORED if _has(facts, a)], protocols=("easyedit",))


def gated(always: pd.DataFrame, base: pd.DataFrame, found: Lookup, threshold: float) -> pd.DataFrame:
    """Scores under a threshold from two tables over the same probes: memory always on, and never.

    Exact, because a prompt's output is that of one or the other: below the threshold the base model's, from it on
    that of the nearest mask.
    """
    active = found.overlap.numpy() >= threshold
    rows = always.copy()
    rows["success"] = np.where(active, always["success"], base["success"])
    return rows.assign(active=active)


def _has(facts: Sequence[Fact], axis: str) -> bool:
    return axis == "efficacy" or any(
        getattr(f, "paraphrases" if axis == "paraphrase" else axis) for f in facts
    )
