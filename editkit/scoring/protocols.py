"""Evaluation protocols, each under its own name. Scores of different protocols are never comparable.

    rome             compares two likelihoods: is the new object more likely than the old one? (CounterFact)
    rome_zsre        share of answer tokens that are arg-max, always against the true answer (ROME's zsRE)
    easyedit         teacher-forced token accuracy; what must not change is compared with the unedited model
    multiple_choice  is the answer the most likely one among the candidates of its relation?
    generate         does the model, left alone, say the answer and stop?

Sources: ROME section 3.4 and MEMIT code (rome, rome_zsre), EasyEdit (easyedit).
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from ..base.errors import ConfigError, RequestError
from ..models.facts import Fact, as_texts
from ..models.joining import stem
from ..models.lm import LM
from ..models.prompts import readers
from .engine import TOKEN_BUDGET, PaddingSide, Pair, score_targets, split_tokens
from .generation import generate
from .probes import KEEP_AXES, Item, expand
from .zsre import released_correct

PROTOCOLS = ("rome", "rome_zsre", "easyedit", "multiple_choice", "generate")
Match = Literal["exact", "prefix"]
_EXTRA_TOKENS = 4  # room behind the answer, so that going on is seen
_SENTENCE_END = re.compile(r"\s*($|[.!?;\n])")
_WORD_END = re.compile(r"$|[^\w'’-]")


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What the unedited model says on the probes, taken with `Baseline.of` before editing.

    argmax: (prompt, answer) -> arg-max tokens on the answer's span (teacher-forced).
    texts:  (prompt, answer) -> greedy continuation.
    """

    argmax: Mapping[Pair, np.ndarray]
    texts: Mapping[Pair, str]

    @classmethod
    def of(
        cls, lm: LM, facts: Sequence[Fact], axes: Sequence[str] | None = None, *,
        protocols: Sequence[str] = ("easyedit",), **options,
    ) -> Baseline:  # fmt: skip
        """Read the model as it is now (a warning says if it carries edits).

        protocols: those that will use it, "easyedit" and/or "generate".

        options: batch_size, token_budget, padding_side, whole_texts as in `score`.
        """
        note_edits(lm)
        pairs = list(dict.fromkeys(x.pair(x.answer) for x in expand(facts, axes)))
        reader = _Reader(lm, **options)
        argmax = {}
        if "easyedit" in protocols:
            argmax = {p: s.argmax for p, s in zip(pairs, reader.targets(pairs), strict=True)}
        texts = dict(zip(pairs, reader.continuations(pairs), strict=True)) if "generate" in protocols else {}
        return cls(argmax, texts)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A model with the batching options of a scoring run."""

    lm: LM
    batch_size: int | None = None
    token_budget: int = TOKEN_BUDGET
    padding_side: PaddingSide = "left"
    whole_texts: bool = False

    def targets(self, pairs: Sequence[Pair], desc: str = "scoring"):
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "lm"}
        return score_targets(self.lm, pairs, desc=desc, **options)

    def continuations(self, pairs: Sequence[Pair]) -> list[str]:
        """Greedy continuation of each prompt, with room for its answer and a few more tokens."""
        unique = list(dict.fromkeys(pairs))
        most = self.lm.max_tokens or sys.maxsize
        tokens = split_tokens(self.lm, unique)
        room = [min(len(ids) + _EXTRA_TOKENS, most) - start for ids, start in tokens]
        made = generate(
            self.lm, [stem(p) for p, _ in unique], max_new_tokens=room, batch_size=self.batch_size,
            token_budget=self.token_budget,
        )  # fmt: skip
        text = {pair: g.text.strip() for pair, g in zip(unique, made, strict=True)}
        return [text[p] for p in pairs]


def note_edits(lm: LM) -> None:
    """Warn that what is measured as "before" is an edited model."""
    edited = lm.edited()
    what = [f"edited weights ({', '.join(edited[:3])}{', ...' if edited[3:] else ''})"] * bool(edited)
    what += ["an attached memory"] * bool(readers(lm))
    if what:
        warnings.warn(
            f"{lm.name} carries {' and '.join(what)}: scores 'before' and what must not change are measured against "
            "the edited model; restore() first to compare with the unedited one",
            stacklevel=3,
        )


def says(text: str, answer: str, match: Match = "exact") -> bool:
    """Whether a continuation says the answer first (case-sensitive).

    "prefix": the answer, then the end of a word ("New York" in "New York City" counts).
    "exact": the answer, then the end of the text or of the sentence (it does not).
    """
    if match not in ("exact", "prefix"):
        raise ConfigError(f"match must be 'exact' or 'prefix', got {match!r}")
    text = text.strip()
    if not text.startswith(answer):
        return False
    return bool((_SENTENCE_END if match == "exact" else _WORD_END).match(text[len(answer) :]))


def score(
    lm: LM,
    facts: Sequence[Fact],
    protocol: str = "rome",
    axes: Sequence[str] | None = None,
    *,
    baseline: Baseline | None = None,
    candidates: Mapping[str, Sequence[str]] | None = None,
    max_candidates: int | None = 64,
    match: Match = "exact",
    released: bool = False,
    llama: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    padding_side: PaddingSide = "left",
    whole_texts: bool = False,
    from_baseline: bool = False,
) -> pd.DataFrame:
    """Score the model as it is now on every probe of the facts, one row per probe.

    Columns of all protocols: fact_id, axis, kind, prompt, answer, contrast, protocol, success (0..1; NaN
    where the protocol does not apply to the probe, e.g. no old object to compare with), and

    rome: nll_new, nll_true (nats per token), magnitude (difference of exp(-nll), positive in the wanted
        direction), acc (all tokens of the answer are arg-max). On the axes that must not change, success
        means that the true answer is more likely than the fact's new object.
    rome_zsre: token_acc. released=True runs the released code's token-by-token prompts with their quirks
        (llama=True: those of its Llama branch) instead of one clean teacher-forced pass.
    easyedit: token_acc, all_tokens, agreement (share of arg-max tokens equal to the unedited model's; needs
        `baseline`, required if an axis that must not change is scored). success is agreement on those axes,
        token_acc on the others.
    multiple_choice: rank (1 = best), margin (nats per token to the best other), n_candidates. candidates:
        lists by relation (efficacy, paraphrase, neighborhood) or probe kind (other axes), default: all
        objects that occur there in `facts`. At most max_candidates are compared, drawn with `seed`.
    generate: text, exact, prefix, unchanged (same text as the unedited model; NaN without baseline). success
        is the column that `match` names, see `says`.

    whole_texts, batch_size, token_budget, padding_side: see `score_targets`.
    from_baseline: protocol generate on the unedited model itself: read its texts from the baseline, which has them.
    Raises ConfigError, RequestError or DataError before the model runs if something does not fit.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    if match not in ("exact", "prefix"):
        raise ConfigError(f"match must be 'exact' or 'prefix', got {match!r}")
    items = expand(facts, axes)
    reader = _Reader(lm, batch_size, token_budget, padding_side, whole_texts)
    if protocol == "rome":
        extra = _rome(reader, items)
    elif protocol == "rome_zsre":
        extra = _rome_zsre(reader, items, released, llama)
    elif protocol == "easyedit":
        extra = _easyedit(reader, items, baseline)
    elif protocol == "multiple_choice":
        extra = _multiple_choice(reader, items, candidates, max_candidates, seed)
    else:
        extra = _generate(reader, items, baseline, match, from_baseline)
    return pd.DataFrame([{**x.row, "protocol": protocol, **e} for x, e in zip(items, extra, strict=True)])


def _rome(reader: _Reader, items: Sequence[Item]) -> list[dict]:
    for x in items:
        if x.axis in ("efficacy", "paraphrase") and x.true is None:
            raise RequestError(
                f"fact {x.fact} ({x.fact_id}) has no target_true to compare with; set it, or use protocol "
                "'rome_zsre', 'easyedit' or 'generate'"
            )
    pairs = [x.pair(a) for x in items for a in (x.new, x.true) if a is not None]
    scores = dict(zip(pairs, reader.targets(pairs, "rome"), strict=True))
    rows = []
    for x in items:
        new = scores[x.pair(x.new)]
        true = None if x.true is None else scores[x.pair(x.true)]
        row = {
            "success": np.nan, "nll_new": new.nll, "nll_true": true.nll if true else np.nan,
            "magnitude": np.nan, "acc": float(scores[x.pair(x.answer)].correct.all()),
        }  # fmt: skip
        if true is not None and x.new != x.true:
            sign = -1 if x.axis in KEEP_AXES else 1
            row["success"] = float(sign * (true.nll - new.nll) > 0)
            row["magnitude"] = sign * float(np.exp(-new.nll) - np.exp(-true.nll))
        rows.append(row)
    return rows


def _rome_zsre(reader: _Reader, items: Sequence[Item], released: bool, llama: bool) -> list[dict]:
    if released:
        pairs = [(x.prompt, x.answer) for x in items]  # the released code puts a space everywhere
        bos = [llama and x.axis in KEEP_AXES for x in items]
        accuracy = [float(np.mean(c)) for c in released_correct(reader.lm, pairs, llama=llama, keep_bos=bos)]
    else:
        found = reader.targets([x.pair(x.answer) for x in items], "rome_zsre")
        accuracy = [s.token_accuracy for s in found]
    return [{"success": a, "token_acc": a} for a in accuracy]


def _easyedit(reader: _Reader, items: Sequence[Item], baseline: Baseline | None) -> list[dict]:
    needed = {x.pair(x.answer) for x in items if x.axis in KEEP_AXES}
    known = set() if baseline is None else baseline.argmax.keys()
    if needed - known:
        raise ConfigError(
            "protocol 'easyedit' compares with the unedited model: take baseline = Baseline.of(lm, facts) "
            "before editing and pass it, or score only efficacy, paraphrase and consequence"
        )
    pairs = [x.pair(x.answer) for x in items]
    rows = []
    for x, pair, s in zip(items, pairs, reader.targets(pairs, "easyedit"), strict=True):
        agreement = float((s.argmax == baseline.argmax[pair]).mean()) if pair in known else np.nan
        success = agreement if x.axis in KEEP_AXES else s.token_accuracy
        rows.append({
            "success": success, "token_acc": s.token_accuracy, "all_tokens": float(s.correct.all()),
            "agreement": agreement,
        })  # fmt: skip
    return rows


def _generate(
    reader: _Reader, items: Sequence[Item], baseline: Baseline | None, match: Match, from_baseline: bool
) -> list[dict]:
    pairs = [x.pair(x.answer) for x in items]
    if from_baseline and (baseline is None or not baseline.texts.keys() >= set(pairs)):
        raise ConfigError(
            "the baseline lacks texts of these probes; take it with Baseline.of on the same facts"
        )
    texts = [baseline.texts[p] for p in pairs] if from_baseline else reader.continuations(pairs)
    rows = []
    for x, pair, text in zip(items, pairs, texts, strict=True):
        row: dict = {m: float(says(text, x.answer, m)) for m in ("exact", "prefix")}
        before = None if baseline is None else baseline.texts.get(pair)
        row["unchanged"] = np.nan if before is None else float(text == before)
        rows.append({"success": row[match], "text": text, **row})
    return rows


def _pool_key(x: Item) -> str:
    own = x.relation if x.axis in ("efficacy", "paraphrase", "neighborhood") else x.kind
    return own or f"({x.axis})"


def candidate_pools(items: Sequence[Item]) -> dict[str, list[str]]:
    """Objects seen per relation or probe kind, sorted: the default candidates of multiple choice."""
    pools: dict[str, set[str]] = {}
    for x in items:
        objects = (x.answer,) if x.axis in ("locality", "same_subject") else (x.answer, x.contrast)
        pools.setdefault(_pool_key(x), set()).update(o for o in objects if o)
    return {k: sorted(v) for k, v in pools.items()}


def _multiple_choice(
    reader: _Reader, items: Sequence[Item], candidates: Mapping[str, Sequence[str]] | None,
    max_candidates: int | None, seed: int,
) -> list[dict]:  # fmt: skip
    pools = {**candidate_pools(items), **{k: as_texts(v, f"candidates[{k!r}]") for k, v in (candidates or {}).items()}}
    rng = np.random.default_rng(seed)
    order = {k: [v[i] for i in rng.permutation(len(v))] for k, v in sorted(pools.items())}
    choices = []
    for x in items:
        typed = x.axis in ("efficacy", "paraphrase", "neighborhood", "consequence")
        fixed = [x.answer] + ([x.contrast] if typed and x.contrast else [])
        every = list(dict.fromkeys(fixed + order[_pool_key(x)]))
        choices.append(every if max_candidates is None else every[: max(2, max_candidates)])
    pairs = [x.pair(c) for x, options in zip(items, choices, strict=True) for c in options]
    nll = {p: s.nll for p, s in zip(pairs, reader.targets(pairs, "multiple choice"), strict=True)}
    rows = []
    for x, options in zip(items, choices, strict=True):
        own = nll[x.pair(x.answer)]
        others = np.array([nll[x.pair(c)] for c in options[1:]])
        if not others.size:
            rows.append({"success": np.nan, "rank": np.nan, "margin": np.nan, "n_candidates": 1})
            continue
        rank = 1 + int((others <= own).sum())
        margin = float(others.min() - own)
        rows.append(
            {"success": float(rank == 1), "rank": rank, "margin": margin, "n_candidates": len(options)}
        )
    return rows
