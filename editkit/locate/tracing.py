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
from ..models.hooks import EditFn, pick
from ..models.joining import marked
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
from .replay import Replay
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
    sever: Literal["mlp", "attn"] | None = None,
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
    sever:   hold the MLP or attention outputs of the layers above, at the restored tokens, at their corrupted
             values: what then still arrives does without them (ROME figure 3). For kind="block".
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
    if sever is not None and kind != "block":
        raise ConfigError(f"sever = {sever!r} goes with kind = 'block', got {kind!r}")
    names = module_names(lm, kind)
    cut = [] if sever is None else module_names(lm, sever)
    starts = [window_layers(layer, window, lm.n_layers)[0] for layer in range(lm.n_layers)]
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
        corrupt[rows] = run.corrupted(sorted({*starts}), cut)
        for layer in range(lm.n_layers):
            restored = run.restored(
                [names[i] for i in window_layers(layer, window, lm.n_layers)],
                starts[layer],
                restore,
                cut[layer + 1 :],
            )
            effect[rows, :, layer] = restored - corrupt[rows, None]
    return CausalTrace(clean, corrupt, effect, answers, predicted, sigma, kind, window, samples)


def _true_ids(lm: LM, facts: Sequence[Fact]) -> Tensor:
    missing = [i for i, fact in enumerate(facts) if not fact.target_true]
    if missing:
        raise RequestError(f"answer='true' needs target_true, which facts {missing[:5]} do not have")
    return first_answer_ids(lm, [(f.text, marked(f.target_true, f.space)) for f in facts])


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
        # Passes run from the subject on; where attention looks back over a window only, from the first token on.
        subject = torch.tensor([min(_subject(g)) for g in self.groups], device=self.final.device)
        self.first = subject if Replay.possible(lm, self.batch) else torch.zeros_like(subject)
        tokens = self.batch.input_ids.shape[1]
        draws = np.zeros((len(rows), samples, tokens, lm.d_model), dtype=np.float32)
        for k, i in enumerate(rows):
            subject = _subject(self.groups[k])
            normal = np.random.default_rng([seed, i]).standard_normal((samples, len(subject), lm.d_model))
            draws[k][:, subject] = sigma * normal
        self.noise = torch.from_numpy(draws)

    def clean(self, wanted: Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability of the answer, its id, and the top token; keeps the clean states from the subject on."""
        logits, states = final_logits(self.lm, self.batch, self.final, record=self.names)
        self.states = {name: self._from_subject(value) for name, value in states.items()}
        top = logits.argmax(-1)
        self.answer = top if wanted is None else wanted.to(logits.device)
        p = logits.double().softmax(-1).gather(-1, self.answer[:, None]).squeeze(-1)
        return p.cpu().numpy(), self.answer.cpu().numpy(), top.cpu().numpy()

    def _from_subject(self, states: Tensor) -> Tensor:
        """States (facts, tokens, m) with the first subject token moved to column 0."""
        first = self.first.to(states.device)[:, None]
        index = (first + torch.arange(states.shape[1], device=states.device)).clamp(max=states.shape[1] - 1)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    @torch.no_grad()
    def corrupted(self, starts: list[int], cut: list[str]) -> np.ndarray:
        """P* of the answer without restoration, (facts,). Keeps what later passes start from: nothing changes before
        the subject, nor below the first restored block.

        starts: layers from which they will run.   cut: modules whose corrupted outputs are needed.
        """
        fact = torch.arange(len(self.groups)).repeat_interleave(self.samples)
        noise = self.noise.flatten(0, 1)
        top = self.lm.block_name(self.lm.n_layers - 1)
        self.replays, kept = Replay.several(
            self.lm, self.batch.select(fact), self.first[fact.to(self.first.device)], starts, stop_at=top,
            edit={self.lm.embed_name: lambda h: h + noise.to(h.device, h.dtype)}, record=[*cut, top],
        )  # fmt: skip
        self.cut = {name: kept[name] for name in cut}
        where = (self.final - self.first)[fact.to(self.final.device)]
        return (
            self._probability(self.lm.head(pick(kept[top], where)), fact)
            .reshape(-1, self.samples)
            .mean(-1)
            .numpy()
        )

    def restored(self, names: list[str], start: int, restore: str, cut: list[str]) -> np.ndarray:
        """P* of the answer with states of some modules restored, (facts, groups); NaN for absent groups.

        start: layer of the first of them.   cut: modules held at their corrupted outputs where states are restored.
        """
        sites = []  # (fact, group, columns restored together)
        for fact, groups in enumerate(self.groups):
            for name, columns in groups.items():
                parts = [[c] for c in columns] if restore == "each" else [columns]
                sites += [(fact, GROUPS.index(name), part) for part in parts]
        values = self._run(sites, names, start, cut)
        total, count = np.zeros((2, len(self.groups), len(GROUPS)))
        for value, (fact, group, _) in zip(values, sites, strict=True):
            total[fact, group] += value
            count[fact, group] += 1
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def _run(self, sites: list, names: list[str], start: int, cut: list[str]) -> np.ndarray:
        """Mean probability over noise draws for each site."""
        replay = self.replays[start]
        tokens = replay.entry.shape[1]
        fact = torch.tensor([f for f, _, _ in sites]).repeat_interleave(self.samples)
        draw = torch.arange(self.samples).repeat(len(sites))
        mask = torch.zeros(len(sites), tokens, dtype=torch.bool)
        for k, (f, _, part) in enumerate(sites):
            mask[k, [c - int(self.first[f]) for c in part]] = True
        mask = mask.repeat_interleave(self.samples, 0)
        found = []
        for part in chunks(len(fact), tokens, self.budget):
            rows = fact[part]
            runs = rows * self.samples + draw[part]
            edit: dict[str, EditFn] = {}
            for name in names:
                clean = self.states[name]
                edit[name] = put(clean[rows.to(clean.device), :tokens], mask[part])
            for name in cut:
                edit[name] = put(self.cut[name][runs.to(self.cut[name].device)], mask[part])
            where = (self.final - self.first)[rows.to(self.final.device)]
            logits, _ = final_logits(self.lm, replay.take(runs.tolist()), where, edit=edit)
            found.append(self._probability(logits, rows))
        return torch.cat(found).reshape(len(sites), self.samples).mean(-1).numpy()

    def _probability(self, logits: Tensor, fact: Tensor) -> Tensor:
        """Probability of each row's answer, (rows,), on the host."""
        answer = self.answer[fact.to(self.answer.device)]
        return logits.double().softmax(-1).gather(-1, answer[:, None]).squeeze(-1).cpu()


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
