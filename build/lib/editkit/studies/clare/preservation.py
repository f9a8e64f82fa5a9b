"""Preservation sets: facts that an edit would disturb join the side of its equations that is kept.

    rows = preservation_set(scores, requests, pool, k=20)            # the most entangled facts of each request
    editor = preserving_editor("memit", lm, [pool[i] for i in rows], weight=1.0, statistics=C0, **preset)
    editor.edit(requests)

MEMIT and AlphaEdit minimise a prior plus  ||Delta K - R||^2  over the written facts. A preserved fact is one
more column: its key k_p with residual zero, counted `weight` times, so that

    Delta (M_0 + S + mu K_p K_p^T + K K^T) = R K^T        (book, page on applications)

Nothing else in the methods changes; every solver of `linear.engines`, AlphaEdit's projection and the history of
keys go on working. Keys of preserved facts are those of the bare prompts, read on the weights of the moment
at which their layer is written, as MEMIT reads its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.config import check_known
from ...base.errors import ConfigError, RequestError
from ...entanglement.representations import check_facts
from ...locate.keys import compute_keys
from ...methods import EDITORS
from ...methods.weights.accumulate import AccumulateEditor
from ...models.facts import Fact
from ...models.lm import LM


def may_be_kept(edits: Sequence[Fact], pool: Sequence[Fact]) -> np.ndarray:
    """(n_edits, n_pool) bool: whether an edit leaves a fact of the pool true.

    False where subject and relation (or prompt) are those of the edit, whatever the answer (one of several
    valid answers to a prompt is the same question), and where the fact's prompt is a paraphrase or a
    consequence of the edit. Consequences that the edits do not list cannot be known here.
    """
    found = np.ones((len(edits), len(pool)), dtype=bool)
    prompts = np.array([(f.prompt, f.subject) for f in pool], dtype=object).reshape(len(pool), 2)
    relations = np.array([f.relation for f in pool], dtype=object)
    texts = np.array([f.text for f in pool], dtype=object)
    for row, edit in zip(found, edits):
        same = prompts[:, 0] == edit.prompt
        if edit.relation is not None:
            same |= relations == edit.relation
        row &= ~(same & (prompts[:, 1] == edit.subject))
        changed = [edit.text, *edit.paraphrases, *(p.prompt for p in edit.consequences)]
        row &= ~np.isin(texts, np.array(changed, dtype=object))
    return found


def preservation_set(
    scores: Tensor | np.ndarray,
    edits: Sequence[Fact],
    pool: Sequence[Fact],
    k: int,
    *,
    allowed: np.ndarray | None = None,
) -> list[int]:
    """Rows of the pool that are most entangled with the edits: the k strongest of each, together.

    scores:  (n_edits, n_pool), high: expected to be disturbed (any score of `similarity`, `gradsim`, or the
             rows of a graph).
    allowed: (n_edits, n_pool), default `may_be_kept`; a fact that one of the edits has to change is never
             kept. Facts of several lists are named once, so the set has at most k n_edits; sorted.
    Raises RequestError: shapes, or fewer than k facts that may be kept.
    """
    scores = torch.as_tensor(scores).detach().cpu().double().numpy().copy()
    if scores.shape != (len(edits), len(pool)):
        raise RequestError(
            f"scores have shape {scores.shape}; expected (edits, pool) = {(len(edits), len(pool))}"
        )
    keep = (may_be_kept(edits, pool) if allowed is None else allowed).all(0)
    if k < 1 or k > keep.sum():
        raise RequestError(
            f"k = {k}, but {int(keep.sum())} facts of the pool may be kept by all edits; lower k or give a larger pool"
        )
    scores[:, ~keep] = -np.inf
    strongest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return sorted({int(i) for i in strongest.ravel()})


class _Preserving(AccumulateEditor):
    """Adds `preserve` to an editor of the MEMIT family; made by `preserving`."""

    kept: tuple[Fact, ...] = ()
    weight: float = 1.0

    def preserve(self, facts: Iterable[Fact], weight: float = 1.0) -> None:
        """Facts whose prompts must go on giving what they give, from the next edit on; replaces earlier ones.

        weight: how much one of them counts against one written fact (mu above). Editors with history keep the
        constraints of earlier edits in force. Raises RequestError for duplicates, ConfigError for a weight < 0.
        """
        facts = list(facts)
        if not np.isfinite(weight) or weight < 0:
            raise ConfigError(f"weight = {weight}; give a number >= 0")
        self.kept = tuple(check_facts(facts)) if facts else ()
        self.weight = float(weight)

    def reset_history(self) -> None:
        super().reset_history()
        self._held: dict[int, set[tuple]] = {}  # layer -> prompts whose keys are in the history already

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        wrong = ~may_be_kept(facts, self.kept).all(0)
        if wrong.any():
            fact = self.kept[int(wrong.argmax())]
            raise RequestError(
                f"{fact.text!r} is to be kept and changed at once; choose kept facts with preservation_set"
            )
        details = super().write_facts(facts)
        if self.kept:
            details |= {"preserved": [f.key for f in self.kept], "preserve_weight": self.weight}
        return details

    def stream(self, layer: int):
        fresh = not (self.config.history and layer in self.streams)
        stream = super().stream(layer)
        if fresh:
            self._held.pop(layer, None)
        K = self._new_keys(layer)
        if K is not None:
            stream.engine.add(K, K.new_zeros(self.lm.weight_shape(layer)[0], K.shape[1]))
        return stream

    def solve(self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor, E: Tensor | None = None):
        if self.config.solver != "released":
            return super().solve(facts, layer, K, R, W, E)
        kept, before = self._new_keys(layer), self.caches.get(layer)
        if kept is not None:
            G = (kept.float() @ kept.float().T).to(K.device)
            self.caches[layer] = G if before is None else before + G
        Delta = super().solve(facts, layer, K, R, W, E)
        if not self.config.history:
            self.caches.pop(layer, None)
        return Delta

    def load_history(self, values, tensors) -> None:
        kept, self.kept = self.kept, ()  # their keys are in the saved history
        super().load_history(values, tensors)
        self.kept = kept
        for layer in self.config.layers:
            self._held[layer] = {(f.prompt, f.subject) for f in kept}

    def _new_keys(self, layer: int) -> Tensor | None:
        """sqrt(weight) K_p (d, p) of kept facts that are not in the layer's history yet; notes them if it lasts."""
        held = self._held.get(layer, set())
        facts = [f for f in dict.fromkeys((f.prompt, f.subject) for f in self.kept) if f not in held]
        if not facts or not self.weight:
            return None
        if self.config.history:
            self._held[layer] = held | set(facts)
        cfg = self.config
        K = compute_keys(self.lm, facts, layer, token=cfg.token, tokens_per_batch=cfg.tokens_per_batch)
        self.record(f"K_kept_{layer}", K)
        return self.weight**0.5 * K


@functools.cache
def preserving(cls: type[AccumulateEditor]) -> type[AccumulateEditor]:
    """The class of an editor with history or prior (MEMIT, AlphaEdit, ...) that can also `preserve` facts.

    Without a call of `preserve` it does what `cls` does, to the bit. Raises ConfigError for other editors.
    """
    if not issubclass(cls, AccumulateEditor):
        raise ConfigError(
            f"{cls.name} has no normal equations that facts could join; use "
            + ", ".join(sorted(n for n, c in EDITORS.items() if issubclass(c, AccumulateEditor)))
        )
    return type(f"Preserving{cls.__name__}", (_Preserving, cls), {"__doc__": cls.__doc__})


def preserving_editor(
    name: str,
    lm: LM,
    facts: Sequence[Fact] = (),
    weight: float = 1.0,
    *,
    statistics: Mapping | None = None,
    contexts=None,
    record=None,
    **config: Any,
) -> _Preserving:
    """`make_editor` for an editor that keeps `facts`; the arguments after `weight` are those of `make_editor`."""
    check_known([name], sorted(EDITORS), "editor")
    editor = preserving(EDITORS[name])(lm, config, statistics=statistics, contexts=contexts, record=record)
    editor.preserve(facts, weight)
    return editor
