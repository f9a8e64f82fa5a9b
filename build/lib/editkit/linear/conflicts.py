"""Conflicting edits (Proposition 3.5): a fact is written again with another value.

The right one-time problem holds the latest value only, so the old pair leaves the constraint set when the new
one enters:

    Delta_t C_t = R_t K_t^T - (V_O - W_{t-1} K_O) K_O^T,    C_t = C_{t-1} - K_O K_O^T + K_t K_t^T

For a literally equal key C does not change and ``Delta_t C_{t-1} = (V_t - V_O) K_t^T``: only the value
difference is written. Shapes: K (d, n), V (m, n), W and Delta (m, d).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from editkit.base.errors import ConfigError, NumericsError, RequestError
from editkit.linear.recursive import AccumulatedLeastSquares
from editkit.linear.system import as_float64, as_gram, factorize

POLICIES = ("replace", "append", "refuse")


def retire_replace(K_old, V_old, K_new, V_new, W, C_prev) -> tuple[Tensor, Tensor]:
    """Closed form of Proposition 3.5; returns Delta (m, d) and the new Gram matrix C_t (d, d).

    K_old (d, n_o), V_old (m, n_o) the pairs to retire as they were written, K_new (d, n), V_new (m, n) their
    successors (any number), W (m, d) the current weights, C_prev (d, d) = M_0 + sum of all pairs in force.

    Raises NumericsError: C_t is not positive definite, i.e. a retired pair was never written.
    """
    K_old = as_float64(K_old, "K_old", (None, None))
    d = K_old.shape[0]
    K_new = as_float64(K_new, "K_new", (d, None))
    W = as_float64(W, "W", (None, d))
    V_old = as_float64(V_old, "V_old", (W.shape[0], K_old.shape[1]))
    V_new = as_float64(V_new, "V_new", (W.shape[0], K_new.shape[1]))
    C = as_gram(C_prev, "C_prev", d) - K_old @ K_old.T + K_new @ K_new.T
    B = (V_new - W @ K_new) @ K_new.T - (V_old - W @ K_old) @ K_old.T
    return factorize(C, "C_t after retiring").solve(B), C


class EditStream:
    """A stream of keyed facts on one matrix: which pairs are in force, what happens when a fact comes again.

    engine: any `AccumulatedLeastSquares`. policy "replace" (retire the old pair, write the new one), "append"
    (keep both; the fit tends to the mean of all values), "refuse" (RequestError). cosine: when given, a
    stored key with a cosine above it is treated as the same fact even under another id (0.999 is a sensible
    value).

    Facts carry a hashable id such as (subject, relation). Stored per fact: d + m numbers.
    """

    def __init__(self, engine: AccumulatedLeastSquares, policy: str = "replace", cosine: float | None = None):
        if policy not in POLICIES:
            raise ConfigError(f"policy={policy!r} is unknown; use one of {', '.join(POLICIES)}")
        if cosine is not None and not 0.0 < cosine < 1.0:
            raise ConfigError(f"cosine is {cosine!r}; it must lie between 0 and 1, or be None")
        self.engine, self.policy, self.cosine = engine, policy, cosine
        self.pairs: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}

    def _conflicts(self, ids: Sequence[Hashable], K: Tensor) -> list[Hashable]:
        """Stored ids that the new facts overwrite, each once, in order."""
        found = [i for i in ids if i in self.pairs]
        if self.cosine is not None and self.pairs:
            owners = [i for i, pairs in self.pairs.items() for _ in pairs]
            stored = torch.stack([key for pairs in self.pairs.values() for key, _ in pairs])
            stored = stored / torch.linalg.vector_norm(stored, dim=1, keepdim=True)
            near = (stored @ (K / torch.linalg.vector_norm(K, dim=0, keepdim=True))).amax(dim=1) > self.cosine
            found += [i for i, hit in zip(owners, near.tolist()) if hit]
        return list(dict.fromkeys(found))

    def write(self, ids: Sequence[Hashable], K, V, W, E=None) -> Tensor:
        """Write facts under the policy and return Delta (m, d).

        ids n distinct ids, K (d, n), V (m, n) absolute targets, W (m, d) the current weights (all earlier
        Deltas in), E (m, d) the compensation cache of post-processed updates or None.

        Raises RequestError: an id twice in the batch, or a conflict under policy "refuse" (nothing is
        changed).
        """
        W = as_float64(W, "W", (None, self.engine.d))
        K = as_float64(K, "K", (self.engine.d, len(ids))).to(W.device)
        V = as_float64(V, "V", (W.shape[0], len(ids))).to(W.device)
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if list(ids).count(i) > 1)
            raise RequestError(f"fact {twice!r} occurs twice in one batch; keep its latest value only")
        old = self._conflicts(ids, K) if self.policy != "append" else []
        if old and self.policy == "refuse":
            raise RequestError(f"{len(old)} facts are already written, first {old[0]!r}; drop them from the "
                               "batch or use policy='replace'")
        R = V - W @ K
        if old:
            K_old, V_old = self._collect(old)
            delta = self.engine.revise(K_old, V_old - W @ K_old, K, R, E)
            for i in old:
                del self.pairs[i]
        else:
            delta = self.engine.add(K, R, E)
        for i, key, value in zip(ids, K.T, V.T):
            self.pairs.setdefault(i, []).append((key.clone(), value.clone()))
        return delta

    def retire(self, ids: Sequence[Hashable], W) -> Tensor:
        """Take facts back without a successor; returns Delta (m, d).

        Raises NumericsError for an id that was never written.
        """
        W = as_float64(W, "W", (None, self.engine.d))
        missing = [i for i in ids if i not in self.pairs]
        if missing:
            raise NumericsError(f"fact {missing[0]!r} was never written or is already retired; "
                                f"{len(self.pairs)} facts are in force")
        K, V = self._collect(list(dict.fromkeys(ids)))
        delta = self.engine.retire(K, V - W @ K)
        for i in dict.fromkeys(ids):
            del self.pairs[i]
        return delta

    def _collect(self, ids: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
        pairs = [pair for i in ids for pair in self.pairs[i]]
        return torch.stack([k for k, _ in pairs], dim=1), torch.stack([v for _, v in pairs], dim=1)

    def constraints(self) -> tuple[list[Hashable], Tensor, Tensor]:
        """All pairs in force: ids (N), K (d, N), V (m, N); the stream equals their one-time solution."""
        if not self.pairs:
            raise NumericsError("no fact is in force; write one first")
        ids = [i for i, pairs in self.pairs.items() for _ in pairs]
        return (ids, *self._collect(list(self.pairs)))

    def state_dict(self) -> dict[str, Any]:
        """{"engine": its state, "ids": list, "K": (d, N), "V": (m, N)} of the pairs in force."""
        state: dict[str, Any] = {"engine": self.engine.state_dict(), "policy": self.policy, "ids": []}
        if self.pairs:
            state["ids"], state["K"], state["V"] = self.constraints()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; NumericsError when the history belongs to another engine, model or layer."""
        self.engine.load_state_dict(state["engine"])
        self.pairs = {}
        for n, i in enumerate(state["ids"]):
            self.pairs.setdefault(i, []).append((state["K"][:, n].clone(), state["V"][:, n].clone()))
