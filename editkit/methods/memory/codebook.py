"""GRACE's codebook: keys with radii that grow, shrink and split (Hartvigsen et al. 2023, algorithm 1).

An entry is a key k_i (d,), a value v_i (o,), a radius eps_i and the answer it stands for. A query q belongs
to its nearest entry i* if ||q - k_i*|| <= eps_i*. Nothing here knows about models.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ...base.errors import NumericsError

Expand = Literal["coverage", "moving_average"]
Match = Literal["answer", "released"]
Place = Literal["new", "split", "replaced", "expanded", "inside"]
_SAME = 1e-5  # relative distance below which two float32 queries are one (see `slack`)
_GAP = 1e-5  # the older entry's radius after a split, so that the two balls do not touch (released code)


@dataclasses.dataclass(frozen=True)
class Label:
    """What an entry answers, and for which prompt.

    ids: the answer's tokens.   n_prompt: length of the prompt (used by match="released" only).
    prompt: the prompt's tokens; a prompt edited again is known by them. Empty: by its distance alone.
    """

    ids: tuple[int, ...]
    n_prompt: int = 0
    prompt: tuple[int, ...] = ()

    @property
    def released_mean(self) -> float:
        """Mean of the label vector with -100 at the prompt's positions: what the released code compares."""
        return float(torch.tensor([-100] * self.n_prompt + list(self.ids)).float().mean())


def rounding(dtype: torch.dtype) -> float:
    """Relative difference that two readings of one prompt may have at a dtype."""
    return max(_SAME, 2 * torch.finfo(dtype).eps)


def slack(queries: Tensor) -> Tensor:
    """How far two readings of the same queries (..., d) may lie apart, (...): rounding at their dtype.

    The same prompt gives other last bits in a batch of another width, with padding or with an answer behind
    it. A radius that was set to a distance must still cover that distance when it is measured again.
    """
    return rounding(queries.dtype) * (1 + queries.float().norm(dim=-1))


class Codebook:
    """The entries, and the rules by which an edit finds or makes its entry.

    d, o:     widths of keys and values.   radius: eps_init of a new entry.
    expand:   "coverage" sets the radius of the nearest entry to the distance; "moving_average" moves its key
              half way to the query too.
    match:    "answer" compares the answers' tokens. "released" compares means of label vectors that include
              the prompt's -100s, and reads the labels in reverse order of the keys, as the released code
              does from the second key on.

    keys (n, d), values (n, o), radii (n,), labels: n of them.
    """

    def __init__(
        self, d: int, o: int, radius: float = 1.0, expand: Expand = "coverage", match: Match = "answer"
    ) -> None:
        self.radius, self.expand, self.match = radius, expand, match
        self.keys, self.values, self.radii = torch.zeros(0, d), torch.zeros(0, o), torch.zeros(0)
        self.labels: list[Label] = []

    def __len__(self) -> int:
        return len(self.keys)

    def distances(self, queries: Tensor) -> Tensor:
        """Euclidean distances (n, b) of the entries to the queries (b, d), in float32."""
        queries = queries.to(self.keys.device).float()
        # Exact differences, not inner products: an entry must be at distance 0 from its own key.
        return torch.cdist(self.keys, queries, compute_mode="donot_use_mm_for_euclid_dist")

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest entry, its distance, and whether the query lies within its radius; each (b,).

        Within means up to rounding (`slack`). An entry whose radius is below 0 (a released split) is never read.
        """
        distance, nearest = self.distances(queries).min(0)
        radius = self.radii[nearest]
        return nearest, distance, (radius >= 0) & (distance <= radius + slack(queries).to(radius))

    def place(self, query: Tensor, value: Tensor, label: Label) -> tuple[int, Place]:
        """Make room for an edit; returns the entry whose value has to be trained, and what happened.

        query (d,), value (o,): key and start value, used if the edit becomes a new entry.
        "new":      farther than eps_init + eps of the nearest entry.
        "split":    nearer, but the nearest answers something else: both get half the distance as radius.
        "replaced": the nearest entry was made for the same prompt (its tokens, or its key up to rounding) and
                    answers something else: a prompt edited again. A split would leave two entries of radius
                    0 of which the older one is found, so with match="answer" the entry takes the new answer,
                    and a new value.
        "expanded": the same answer outside its radius: the radius grows to the distance.   "inside": covered.
        Raises NumericsError for NaN or Inf.
        """
        if not torch.isfinite(query).all():
            raise NumericsError("the query of this edit has NaN or Inf; check the model's activations")
        noise = slack(query).to(self.keys)
        query = query.detach().to(self.keys)
        if not len(self):
            return self._append(query, value, label), "new"
        distance, nearest = self.distances(query[None])[:, 0].min(0)
        near = int(nearest)
        if distance > self.radius + self.radii[near]:
            return self._append(query, value, label), "new"
        if not self._same(label, near):
            same_prompt = bool(label.prompt) and label.prompt == self.labels[near].prompt
            if self.match == "answer" and (same_prompt or distance <= noise):
                self.values[near], self.labels[near] = value.detach().to(self.values), label
                return near, "replaced"
            new = self._append(query, value, label)
            self.radii[near] = distance / 2 - _GAP
            self.radii[new] = distance / 2
            return self._nearest(query), "split"
        if distance <= self.radii[near]:
            return near, "inside"
        self.radii[near] = distance
        if self.expand == "moving_average":
            self.keys[near] = 0.5 * self.keys[near] + 0.5 * query
        return self._nearest(query), "expanded"

    def _nearest(self, query: Tensor) -> int:
        """The entry that a forward pass will choose; with equal keys the first one."""
        return int(self.distances(query[None])[:, 0].argmin())

    def _same(self, label: Label, near: int) -> bool:
        if self.match == "answer":
            return label.ids == self.labels[near].ids
        return label.released_mean == self.labels[len(self) - 1 - near].released_mean

    def _append(self, query: Tensor, value: Tensor, label: Label) -> int:
        self.keys = torch.cat([self.keys, query[None]])
        self.values = torch.cat([self.values, value.detach().to(self.values)[None]])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([self.radius])])
        self.labels.append(label)
        return len(self) - 1

    def to(self, device: torch.device) -> Codebook:
        """Move the tensors; returns self."""
        self.keys, self.values, self.radii = (x.to(device) for x in (self.keys, self.values, self.radii))
        return self

    def state(self) -> tuple[list, dict[str, Tensor]]:
        """Labels as JSON-able values, and the tensors."""
        labels = [[list(x.ids), x.n_prompt, list(x.prompt)] for x in self.labels]
        return labels, {"keys": self.keys, "values": self.values, "radii": self.radii}

    def load_state(self, labels: list, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        device = self.keys.device
        self.keys, self.values, self.radii = (tensors[k].to(device) for k in ("keys", "values", "radii"))
        # Files written before prompts were kept have two values a label.
        self.labels = [Label(tuple(ids), n, tuple(*prompt)) for ids, n, *prompt in labels]
