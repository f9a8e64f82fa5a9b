"""A real model and real facts: what it knows of them, and which text its second moments are taken from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from ..base.cached import found_or_made
from ..base.errors import ConfigError, DataError
from ..corpora import real
from ..corpora.table import FactTable, Key
from ..models.facts import Fact
from ..models.lm import LM
from ..scoring import protocols, score
from ..scoring.generation import generate

Source = Literal["english", "prompts", "both", "samples"]
SOURCES: dict[str, str] = {
    "english": "definitions and examples",
    "prompts": "prompts of facts",
    "both": "both, half and half",
    "samples": "the model's own text",
}


def sample(table: FactTable, n: int, seed: int = 0, relations: Sequence[str] | None = None) -> list[Key]:
    """At most n facts of each relation that may be asked, drawn; n = 0: all. The first k are the same for every n."""
    keys: list[Key] = []
    for r in relations or table.relations:
        subjects = table.subjects(r)
        rng = np.random.default_rng([seed, table.seed, int(hashlib.sha256(r.encode()).hexdigest()[:8], 16)])
        order = rng.permutation(len(subjects))
        keys += [(r, subjects[i]) for i in (order[:n] if n else order)]
    return keys


def recall(
    lm: LM,
    table: FactTable,
    keys: Collection[Key] | None = None,
    *,
    template: int = 0,
    cache_dir: str | Path | None = None,
) -> pd.DataFrame:
    """What the model says to the prompts of facts, by greedy free generation; one row per fact.

    keys: all that may be asked if None.   template: which wording.
    Columns relation, subject, answer, text (the continuation), exact (the answer, then the sentence ends), prefix (the
    answer, then a word ends). Kept in cache_dir by relation, under the model's hash and the prompts.
    Raises DataError if there is nothing to ask.
    """
    keys = sample(table, 0) if keys is None else list(keys)
    if not keys:
        raise DataError("no facts to ask: the table has none of these relations")
    fingerprint = lm.fingerprint() if cache_dir is not None else ""
    parts = []
    for relation in dict.fromkeys(r for r, _ in keys):
        subjects = [s for r, s in keys if r == relation]
        wording = table.relation(relation).templates[template].text
        facts = [Fact(wording, s, table.value(relation, s), relation=relation) for s in subjects]

        def ask(_: Sequence[str] = (), facts=facts) -> dict[str, dict[str, torch.Tensor]]:
            rows = score(lm, facts, "generate", ["efficacy"])
            text = json.dumps(list(rows["text"])).encode()
            flags = {k: torch.tensor(rows[k].to_numpy(dtype=np.float32)) for k in ("exact", "prefix")}
            return {"all": {**flags, "text": torch.frombuffer(bytearray(text), dtype=torch.uint8)}}

        asked = hashlib.sha256(repr([(f.text, f.target) for f in facts]).encode()).hexdigest()
        content = {"fingerprint": fingerprint, "asked": asked}
        kept = {} if cache_dir is None else found_or_made(cache_dir, "recall", content, ask, protocols.__file__)
        said = (kept or ask())["all"]
        columns = {"relation": relation, "subject": subjects, "answer": [f.target for f in facts]}
        texts = json.loads(bytes(said["text"].numpy()))
        parts.append(pd.DataFrame({**columns, "text": texts, **{k: said[k].numpy() for k in ("exact", "prefix")}}))
    return pd.concat(parts, ignore_index=True)


def known(
    lm: LM,
    table: FactTable,
    n: int = 0,
    *,
    seed: int = 0,
    relations: Sequence[str] | None = None,
    match: Literal["exact", "prefix"] = "prefix",
    cache_dir: str | Path | None = None,
) -> FactTable:
    """The table restricted to facts that the model says: edits and protected probes are then drawn from these.

    n: at most that many facts of each relation are asked (0: all).   match: what counts, see `recall`.
    To edit facts that the model does not know, draw from `table` itself.
    Raises DataError if it knows none.
    """
    rows = recall(lm, table, sample(table, n, seed, relations), cache_dir=cache_dir)
    hit = rows[rows[match] == 1]
    if hit.empty:
        raise DataError(f"{lm.name} says none of the {len(rows)} facts that were asked; is it the right model?")
    return table.restricted(set(zip(hit["relation"], hit["subject"], strict=True)))


def moment_texts(
    source: Source, n_tokens: int, lm: LM, table: FactTable, *, seed: int = 0, length: int = 48
) -> list[str]:
    """Texts of about n_tokens tokens from one source, drawn with `seed`.

    english: definitions and examples of WordNet.   prompts: statements of the table, with worked examples.   both: half
    of each.   samples: the model's own text, sampled (top 50) behind two words of definitions, `length` tokens each.
    Raises ConfigError for an unknown source.
    """
    if source not in SOURCES:
        raise ConfigError(f"unknown source of text {source!r}; choose from {', '.join(SOURCES)}")
    if source == "both":
        halves = [moment_texts(s, n_tokens // 2, lm, table, seed=seed) for s in ("prompts", "english")]
        return halves[0] + halves[1]
    rng = np.random.default_rng([seed, 21])
    if source == "prompts":
        keys = sample(table, 0, seed)
        texts = real.prompts(table, [keys[i] for i in rng.permutation(len(keys))[: n_tokens // 6 + 1]])
    else:
        english = real.english()
        texts = [english[i] for i in rng.permutation(len(english))]
    if source == "samples":
        starts = [" ".join(t.split(": ")[-1].split()[:2]) for t in texts[: -(-n_tokens // length)]]
        draws = torch.Generator().manual_seed(seed)
        made = generate(lm, starts, max_total_tokens=length, top_k=50, generator=draws, batch_size=64)
        return [g.prompt + g.text for g in made]
    texts = texts[: n_tokens // 6 + 1]  # none is shorter than that
    lengths = np.cumsum([len(ids) for ids in lm.tokenizer(texts)["input_ids"]])
    return texts[: int(np.searchsorted(lengths, n_tokens)) + 1]


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two second moments (d, d) as vectors, each with its trace scaled to one; 1 for proportional ones."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def cost_of_keys(C: torch.Tensor, keys: torch.Tensor) -> float:
    """Mean of k^T C^-1 k over keys (d, n), C (d, d) scaled to trace d: how freely updates may go along these keys.

    The larger, the less the moment protects these directions (MEMIT eq. 14: the update is spread by C^-1 k).
    C is regularised by a thousandth of its mean diagonal, for directions that no text has.
    """
    d = C.shape[0]
    scaled = C * (d / C.trace()) + 1e-3 * torch.eye(d, dtype=C.dtype, device=C.device)
    return float((keys * torch.linalg.solve(scaled, keys)).sum(0).mean())
