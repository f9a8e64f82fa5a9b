"""Causal tracing: which states carry a fact (ROME section 2; MEMIT section 4.1).

Three runs per fact: a clean one; a corrupted one, with noise on the embeddings of the subject; and, for each
position and layer, a corrupted one in which that state is restored to its clean value. The indirect effect is
the probability of the answer that the restored state brings back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..base.errors import ConfigError, RequestError
from ..base.progress import bar
from ..models.batching import by_length
from ..models.facts import Fact
from ..models.hooks import EditFn
from ..models.lm import LM
from .interchange import Interchange, choose_site, interchange, make_pairs
from .keys import TOKENS_PER_BATCH
from .patching import (
    GROUPS,
    Kind,
    Positions,
    chunks,
    final_logits,
    first_answer_ids,
    module_names,
    position_groups,
    put,
    window_layers,
)
from .sites import Site

__all__ = [
    "GROUPS",
    "CausalTrace",
    "Interchange",
    "Site",
    "causal_trace",
    "choose_site",
    "critical_layers",
    "interchange",
    "make_pairs",
]


@dataclasses.dataclass(frozen=True)
class CausalTrace:
    """Result of `causal_trace` for n facts.

    clean, corrupt: (n,) probability of the answer in the clean run and, averaged over noise samples, in the
    corrupted one (ROME: P[o], P*[o]). effect: (n, groups, layers) indirect effect, P*[o, clean state] -
    P*[o]; NaN where a prompt has no such position. answers: (n,) token id of the answer. predicted:
    (n,) top token of the clean run; `predicted == answers` selects the facts the model knows. sigma: standard
    deviation of the noise. kind, window, samples: as asked for.
    """

    clean: np.ndarray
    corrupt: np.ndarray
    effect: np.ndarray
    answers: np.ndarray
    predicted: np.ndarray
    sigma: float
    kind: Kind
    window: int
    samples: int
    groups: tuple[str, ...] = GROUPS

    @property
    def total_effect(self) -> np.ndarray:
        """(n,) P[o] - P*[o]."""
        return self.clean - self.corrupt

    def average(self, select: np.ndarray | None = None) -> np.ndarray:
        """Average indirect effect over (selected) facts, (groups, layers); NaN for a group that none has."""
        effect = self.effect if select is None else self.effect[select]
        present = ~np.isnan(effect)
        count = present.sum(0)
        total = np.where(present, effect, 0.0).sum(0)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def to_frame(self) -> pd.DataFrame:
        """Long table with columns fact (index in the input), group, layer, effect; absent groups left out."""
        n, groups, layers = self.effect.shape
        index = np.indices((n, groups, layers)).reshape(3, -1)
        frame = pd.DataFrame(
            {
                "fact": index[0],
                "group": np.array(self.groups)[index[1]],
                "layer": index[2],
                "effect": self.effect.reshape(-1),
            }
        )
        return frame.dropna(subset=["effect"]).reset_index(drop=True)


def subject_noise_scale(lm: LM, positions: Positions) -> float:
    """Standard deviation of the embeddings of all subject tokens of some prompts (ROME appendix B.1)."""
    tokens = positions.encoding.input_ids
    ids = torch.cat([tokens[i, _subject(groups)] for i, groups in enumerate(positions.groups)])
    return float(lm.embeddings()[ids].double().std(correction=0))


def _subject(groups: dict[str, list[int]]) -> list[int]:
    return [c for name in GROUPS[:3] for c in groups.get(name, [])]


def causal_trace(
    lm: LM,
    facts: Sequence[Fact],
    *,
    noise: float = 3.0,
    samples: int = 10,
    window: int = 1,
    kind: Kind = "block",
    restore: Literal["each", "group"] = "each",
    answer: Literal["predicted", "true"] = "predicted",
    seed: int = 0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> CausalTrace:
    """Noise tracing of the prompts of some facts.

    noise:   strength in standard deviations of the subject tokens' embeddings (ROME: 3).
    samples: noise draws per fact (ROME: 10). The draws of a fact depend on `seed` and its index only.
    kind:    which outputs are restored: "block" (hidden states), "mlp" or "attn".
    window:  number of layers restored together around each layer (ROME uses 10 for mlp and attn).
    restore: "each" restores one token at a time and averages over the tokens of a group (ROME);
             "group" restores all tokens of a group together, which is cheaper.
    answer:  "predicted" follows the model's own top token after the clean prompt; "true" the first token of
             `target_true`.
    Cost: about (tokens from the subject on) x layers x samples forward passes of one prompt per fact.

    Returns a CausalTrace. Raises RequestError, ConfigError.
    """
    if not facts:
        raise RequestError("no facts to trace: the list is empty")
    if samples < 1 or window < 1:
        raise ConfigError(f"samples and window must be at least 1, got {samples} and {window}")
    if restore not in ("each", "group") or answer not in ("predicted", "true"):
        raise ConfigError(
            f"restore must be 'each' or 'group', answer 'predicted' or 'true'; got {restore!r}, {answer!r}"
        )
    names = module_names(lm, kind)
    positions = position_groups(lm, facts)
    wanted = _true_ids(lm, facts) if answer == "true" else None
    sigma = noise * subject_noise_scale(lm, positions)
    n = len(facts)
    clean, corrupt = np.zeros(n), np.zeros(n)
    answers, predicted = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    effect = np.full((n, len(GROUPS), lm.n_layers), np.nan)
    lengths = positions.encoding.lengths.tolist()
    budget = max(1, tokens_per_batch // samples)  # clean states and noise of a batch are held in memory
    for rows in bar(by_length(lengths, budget), f"causal tracing of {n} facts", unit="batch"):
        run = _TraceBatch(lm, positions, rows, names, sigma, samples, seed, tokens_per_batch)
        clean[rows], answers[rows], predicted[rows] = run.clean(None if wanted is None else wanted[rows])
        corrupt[rows] = run.corrupted()
        for layer in range(lm.n_layers):
            restored = run.restored([names[i] for i in window_layers(layer, window, lm.n_layers)], restore)
            effect[rows, :, layer] = restored - corrupt[rows, None]
    return CausalTrace(clean, corrupt, effect, answers, predicted, sigma, kind, window, samples)


def _true_ids(lm: LM, facts: Sequence[Fact]) -> Tensor:
    missing = [i for i, fact in enumerate(facts) if not fact.target_true]
    if missing:
        raise RequestError(f"answer='true' needs target_true, which facts {missing[:5]} do not have")
    return first_answer_ids(lm, [fact.text for fact in facts], [fact.target_true for fact in facts])


class _TraceBatch:
    """The runs of one batch of facts; a row of a forward pass is a fact, a noise draw and a restored site."""

    def __init__(
        self,
        lm: LM,
        positions: Positions,
        rows: list[int],
        names: list[str],
        sigma: float,
        samples: int,
        seed: int,
        tokens_per_batch: int,
    ) -> None:
        self.lm, self.names, self.samples, self.budget = lm, names, samples, tokens_per_batch
        self.batch, cut = positions.encoding.take(rows)
        self.final = positions.final[rows] - cut
        self.groups = [
            {name: [c - cut for c in columns] for name, columns in positions.groups[i].items()} for i in rows
        ]
        tokens = self.batch.input_ids.shape[1]
        draws = np.zeros((len(rows), samples, tokens, lm.d_model), dtype=np.float32)
        for k, i in enumerate(rows):
            subject = _subject(self.groups[k])
            normal = np.random.default_rng([seed, i]).standard_normal((samples, len(subject), lm.d_model))
            draws[k][:, subject] = sigma * normal
        self.noise = torch.from_numpy(draws)

    def clean(self, wanted: Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability of the answer, its id, and the top token; keeps the clean states."""
        logits, self.states = final_logits(self.lm, self.batch, self.final, record=self.names)
        top = logits.argmax(-1)
        self.answer = top if wanted is None else wanted.to(logits.device)
        p = logits.double().softmax(-1).gather(-1, self.answer[:, None]).squeeze(-1)
        return p.cpu().numpy(), self.answer.cpu().numpy(), top.cpu().numpy()

    def restored(self, names: list[str], restore: str) -> np.ndarray:
        """P* of the answer with states of some modules restored, (facts, groups); NaN for absent groups."""
        sites = []  # (fact, group, columns restored together)
        for fact, groups in enumerate(self.groups):
            for name, columns in groups.items():
                parts = [[c] for c in columns] if restore == "each" else [columns]
                sites += [(fact, GROUPS.index(name), part) for part in parts]
        values = self._run([fact for fact, _, _ in sites], names, [part for _, _, part in sites])
        total, count = np.zeros((2, len(self.groups), len(GROUPS)))
        for value, (fact, group, _) in zip(values, sites, strict=True):
            total[fact, group] += value
            count[fact, group] += 1
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def corrupted(self) -> np.ndarray:
        """P* of the answer without restoration, (facts,)."""
        everyone = list(range(len(self.groups)))
        return self._run(everyone, [], [[] for _ in everyone])

    def _run(self, facts: list[int], names: list[str], columns: list[list[int]]) -> np.ndarray:
        """Mean probability over noise draws for each (fact, restored columns)."""
        tokens = self.batch.input_ids.shape[1]
        fact = torch.tensor(facts).repeat_interleave(self.samples)
        draw = torch.arange(self.samples).repeat(len(facts))
        mask = torch.zeros(len(facts), tokens, dtype=torch.bool)
        for k, part in enumerate(columns):
            mask[k, part] = True
        mask = mask.repeat_interleave(self.samples, 0)
        found = []
        for part in chunks(len(fact), tokens, self.budget):
            rows, noise = fact[part], self.noise[fact[part], draw[part]]
            edit: dict[str, EditFn] = {self.lm.embed_name: lambda h, z=noise: h + z.to(h.device, h.dtype)}
            for name in names:
                edit[name] = put(self.states[name][rows.to(self.states[name].device)], mask[part])
            batch = self.batch.select(rows)
            where = rows.to(self.final.device)
            logits, _ = final_logits(self.lm, batch, self.final[where], edit=edit)
            answer = self.answer[rows.to(self.answer.device)]
            found.append(logits.double().softmax(-1).gather(-1, answer[:, None]).squeeze(-1).cpu())
        return torch.cat(found).reshape(len(facts), self.samples).mean(-1).numpy()


def critical_layers(trace: CausalTrace, group: str = "subject_last", share: float = 0.9) -> Site:
    """The layers whose average indirect effect at a position group is at least `share` of its maximum.

    Meant for kind="mlp" (MEMIT section 4.1 selects the MLPs that mediate recall). Returns a Site whose `rule`
    says how it was chosen. Raises ConfigError for a group that is no lookup token or that no fact has.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1], got {share}")
    tokens = ("subject_first", "subject_last", "last")
    if group not in tokens:
        raise ConfigError(f"group must be a lookup token, one of {', '.join(tokens)}; got {group!r}")
    effect = trace.average()[trace.groups.index(group)]
    if np.isnan(effect).all():
        raise ConfigError(f"no traced fact has the position group {group!r}; choose another one")
    best = float(effect.max())
    layers = tuple(int(i) for i in np.flatnonzero(effect >= share * best)) if best > 0 else ()
    rule = (
        f"layers whose average indirect effect ({trace.kind}, window {trace.window}) at {group} is at least "
        f"{share:g} of the maximum {best:.4f}"
    )
    return Site(group, layers, rule)
