"""Interchange interventions: where does the state that decides the answer sit?

The state of one prompt ("source", subject A) is put into the run of the same template with another subject
("base", subject B). If the answer changes to A's, that state decides it. Unlike noise tracing, both runs stay
on states the model knows, and the outcome is an answer, not a probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ..base.errors import ConfigError, RequestError
from ..base.progress import bar
from ..models.batching import by_length
from ..models.facts import Fact
from ..models.hooks import pick
from ..models.lm import LM
from .keys import TOKENS_PER_BATCH
from .patching import GROUPS, Kind, Positions, chunks, final_logits, module_names, position_groups, put
from .replay import Replay
from .sites import Site

PATCHED = (*GROUPS, "subject")


@dataclasses.dataclass(frozen=True)
class Interchange:
    """Result of `interchange` for n pairs.

    flips: (n, groups, layers) 1.0 where the patched run gives the source's answer, 0.0 where not, NaN where
    the pair cannot tell: both prompts have one answer, the group is absent, or has different lengths in both.
    source_answers, base_answers: (n,) top token ids of the clean runs. layers: patched layers.
    """

    flips: np.ndarray
    source_answers: np.ndarray
    base_answers: np.ndarray
    layers: tuple[int, ...]
    kind: Kind
    groups: tuple[str, ...] = PATCHED

    def rates(self) -> np.ndarray:
        """Flip rate over usable pairs, (groups, layers); NaN where no pair is usable."""
        present = ~np.isnan(self.flips)
        count = present.sum(0)
        total = np.where(present, self.flips, 0.0).sum(0)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def rate(self, group: str) -> np.ndarray:
        """Flip rates of one group, (layers,)."""
        if group not in self.groups:
            raise ConfigError(f"unknown position group {group!r}; choose one of {', '.join(self.groups)}")
        return self.rates()[self.groups.index(group)]

    def to_frame(self) -> pd.DataFrame:
        """Table with columns group, layer, rate, n (usable pairs)."""
        rates, n = self.rates(), (~np.isnan(self.flips)).sum(0)
        rows = [
            {"group": g, "layer": layer, "rate": rates[i, j], "n": int(n[i, j])}
            for i, g in enumerate(self.groups)
            for j, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)


def make_pairs(facts: Sequence[Fact], n: int, seed: int = 0) -> list[tuple[Fact, Fact]]:
    """Up to n random pairs (source, base) with one template, different subjects and different true answers.

    Facts without target_true count as different. Raises RequestError if there is no such pair.
    """
    by_template: dict[str, list[Fact]] = {}
    for fact in facts:
        by_template.setdefault(fact.prompt, []).append(fact)
    place: dict[int, int] = {}  # of the first equal fact of its template
    for same in by_template.values():
        first: dict[Fact, int] = {}
        for k, fact in enumerate(same):
            place[id(fact)] = first.setdefault(fact, k)
    order = np.random.default_rng(seed).permutation(len(facts))
    pairs = []
    for turn in range(max(map(len, by_template.values()), default=1) - 1):
        # In round `turn` every fact is paired with its turn-th neighbor of the same template.
        for i in order:
            source = facts[i]
            same = by_template[source.prompt]
            base = same[(place[id(source)] + turn + 1) % len(same)]
            differ = source.target_true is None or source.target_true != base.target_true
            if turn + 1 < len(same) and source.subject != base.subject and differ:
                pairs.append((source, base))
                if len(pairs) == n:
                    return pairs
    if not pairs:
        raise RequestError(
            "no two facts share a template and differ in subject and answer; interchange needs such pairs"
        )
    return pairs


def interchange(
    lm: LM,
    pairs: Sequence[tuple[Fact, Fact]],
    *,
    layers: Sequence[int] | None = None,
    groups: Sequence[str] = PATCHED,
    kind: Kind = "block",
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Interchange:
    """Patch states of a source prompt into a base prompt, for each position group and layer.

    pairs:  (source, base) facts with the same template and different subjects, see `make_pairs`. layers:
    patched one at a time; default all. groups: position groups of `patching.GROUPS`, or "subject" for all
    tokens of the subject at once. A group of
            several tokens is patched only where it is equally long in both prompts.
    kind:   which outputs are patched, "block", "mlp" or "attn".
    Answers are the model's own top tokens. The output of block 0 has passed one attention, so the whole
    subject patched there need not flip every answer.
    Returns an Interchange. Raises RequestError, ConfigError, ModelError.
    """
    if not pairs:
        raise RequestError("no pairs to interchange: the list is empty")
    for source, base in pairs:
        if source.prompt != base.prompt or source.subject == base.subject:
            raise RequestError(
                f"a pair needs one template and two subjects, got {source.text!r} and {base.text!r}; "
                "build pairs with make_pairs"
            )
    unknown = [g for g in groups if g not in PATCHED]
    if unknown or not groups:
        raise ConfigError(f"unknown position groups {unknown}; choose among {', '.join(PATCHED)}")
    groups = tuple(groups)
    layers = tuple(range(lm.n_layers)) if layers is None else tuple(lm.check_layer(i) for i in layers)
    names = module_names(lm, kind, layers)
    sources = position_groups(lm, [a for a, _ in pairs])
    bases = position_groups(lm, [b for _, b in pairs])
    flips = np.full((len(pairs), len(groups), len(layers)), np.nan)
    answers = np.zeros((2, len(pairs)), dtype=np.int64)
    lengths = torch.maximum(sources.encoding.lengths, bases.encoding.lengths).tolist()
    for rows in bar(by_length(lengths, tokens_per_batch), f"interchange of {len(pairs)} pairs", unit="batch"):
        answers[:, rows], flips[rows] = _interchange_batch(
            lm, sources, bases, rows, dict(zip(layers, names, strict=True)), kind, groups, tokens_per_batch
        )
    return Interchange(flips, answers[0], answers[1], layers, kind, groups)


def _columns(positions: Positions, row: int, group: str) -> list[int]:
    found = positions.groups[row]
    parts = GROUPS[:3] if group == "subject" else (group,)
    return sorted(c for part in parts for c in found.get(part, []))


def _interchange_batch(
    lm: LM,
    sources: Positions,
    bases: Positions,
    rows: list[int],
    names: dict[int, str],
    kind: Kind,
    groups: Sequence[str],
    tokens_per_batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Answers (2, rows) and flips (rows, groups, layers) of some pairs (right-padded: columns stay)."""
    source_batch, base_batch = sources.encoding.take(rows)[0], bases.encoding.take(rows)[0]
    index = torch.tensor(rows)
    source_final, base_final = (p.final[index.to(p.final.device)] for p in (sources, bases))
    source_logits, states = final_logits(lm, source_batch, source_final, record=list(names.values()))
    # Nothing changes before the base's subject, nor below the patched layer: passes run from there on.
    first = torch.tensor([_columns(bases, i, "subject")[0] for i in rows], device=base_final.device)
    first = first if Replay.possible(lm, base_batch) else torch.zeros_like(first)
    top = lm.block_name(lm.n_layers - 1)
    replays, kept = Replay.several(
        lm, base_batch, first, list(names), stop_at=top, after=kind == "block", record=[top]
    )
    wanted, other = source_logits.argmax(-1), lm.head(pick(kept[top], base_final - first)).argmax(-1)
    tokens = kept[top].shape[1]
    sites, masks, origins = [], [], []  # one site per usable (pair, group)
    for k, i in enumerate(rows):
        if wanted[k] == other[k]:
            continue
        for g, group in enumerate(groups):
            to, of = _columns(bases, i, group), _columns(sources, i, group)
            if not to or len(to) != len(of):
                continue
            mask, origin = torch.zeros(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.long)
            to = [c - int(first[k]) for c in to]
            mask[to] = True
            origin[to] = torch.tensor(of)
            sites.append((k, g))
            masks.append(mask)
            origins.append(origin)
    flips = np.full((len(rows), len(groups), len(names)), np.nan)
    if sites:
        pair = torch.tensor([k for k, _ in sites])
        group = np.array([g for _, g in sites])
        mask, origin = torch.stack(masks), torch.stack(origins)
        for part in chunks(len(sites), tokens, tokens_per_batch):
            rows_here = pair[part]
            final = (base_final - first)[rows_here.to(base_final.device)]
            answer = wanted[rows_here.to(wanted.device)]
            for j, (layer, name) in enumerate(names.items()):
                batch = replays[layer].take(rows_here.tolist())
                values = states[name][rows_here.to(states[name].device)]
                logits, _ = final_logits(lm, batch, final, edit={name: put(values, mask[part], origin[part])})
                hit = (logits.argmax(-1) == answer).cpu().numpy()
                flips[rows_here.numpy(), group[part], j] = hit
    return torch.stack([wanted, other]).cpu().numpy(), flips


def choose_site(result: Interchange, *, enough: float = 0.8, share: float = 0.9, width: int = 3) -> Site:
    """Derive the lookup token and the layers to edit from block-output interchange.

    An edit at a token can only work where the state of that token decides the answer, hence the rule:

    1. If patching the subject's last token alone flips at least `enough` of the answers at some layer, the
       token is "subject_last", and the top layer is the last one whose rate is at least `share` of the
       maximum: above it the fact has been read out already.
    2. Otherwise the token is "last", and the top layer is the first one whose rate reaches `share` of the
       maximum: from there on the answer is fixed at the last token of the prompt.

    The layers are the `width` ones that end at the top layer, cut at 0. Raises ConfigError for another kind
    or missing groups, RequestError if no pair is usable.
    """
    if result.kind != "block" or not {"subject_last", "last"} <= set(result.groups):
        raise ConfigError("choose_site needs interchange of kind 'block' with groups subject_last and last")
    if width < 1 or not 0 < share <= 1:
        raise ConfigError(f"width must be at least 1 and share in (0, 1], got {width} and {share}")
    subject, last = np.nan_to_num(result.rate("subject_last")), np.nan_to_num(result.rate("last"))
    if max(subject.max(), last.max()) == 0:
        raise RequestError(
            "no patch flips an answer; use pairs of prompts that the model answers differently"
        )
    if subject.max() >= enough:
        token, at = "subject_last", np.flatnonzero(subject >= share * subject.max())[-1]
        sign, which = ">=", "last"
    else:
        token, at = "last", np.flatnonzero(last >= share * last.max())[0]
        sign, which = "<", "first"
    top = result.layers[int(at)]
    rule = (
        f"patching subject_last flips up to {subject.max():.3f} of the answers ({sign} {enough:g}); "
        f"top layer {top} is the {which} where patching {token} has {share:g} of its maximum; "
        f"{width} layers up to it"
    )
    return Site(token, tuple(range(max(0, top - width + 1), top + 1)), rule)
