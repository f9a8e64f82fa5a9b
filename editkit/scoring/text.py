"""Statistics of free text: n-gram entropy (fluency), TF-IDF similarity (consistency), perplexity."""

from __future__ import annotations

import collections
import hashlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..base.errors import ConfigError, DataError, RequestError
from ..base.progress import bar
from ..models.batching import token_rows
from ..models.facts import Fact, as_facts, as_texts
from ..models.lm import LM
from ..models.prompts import readers
from .engine import TOKEN_BUDGET, PaddingSide, batches, pad_rows
from .generation import generate, released_text

_COLUMNS = 64  # tokens a row whose logits are held in float32 at a time
_FLUENCY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def words(text: str) -> list[str]:
    """Word tokens: nltk's `word_tokenize` with an untrained Punkt sentence splitter (no download)."""
    # Imported where needed, here and below: a second that most processes would spend for nothing.
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    tokenizer = NLTKWordTokenizer()
    return [w for sentence in PunktSentenceTokenizer().tokenize(text) for w in tokenizer.tokenize(sentence)]


def same_answer(prediction: str, answer: str) -> bool:
    """Equality up to case, punctuation, English articles and white space (SQuAD's exact match; EasyEdit)."""

    def normalized(text: str) -> list[str]:
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    return normalized(prediction) == normalized(answer)


def ngram_counts(text: str, n: int) -> collections.Counter[tuple[str, ...]]:
    """How often each n-gram of word tokens occurs in the text."""
    tokens = words(text)
    return collections.Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def ngram_entropy(text: str) -> float:
    """Fluency of one text: (2/3 H_2 + 4/3 H_3) / 2 with H_n the entropy (bits) of its n-gram distribution.

    ROME section 3.4 / MEMIT code; tables report it times 100. A text with fewer than n words has H_n = 0.
    """
    total = 0.0
    for n, weight in _FLUENCY_WEIGHTS.items():
        counts = np.array(list(ngram_counts(text, n).values()), dtype=float)
        p = counts / counts.sum() if counts.size else counts
        total += weight * float(-(p * np.log2(p)).sum()) if p.size else 0.0
    return total / len(_FLUENCY_WEIGHTS)


class TfIdf:
    """TF-IDF weighting of lower-cased words of two letters or more: scikit-learn's, as in ROME's code.

    vocabulary: word -> column; idf: (columns,) weights. ROME's `tfidf_vocab.json` and `idf.npy` fit in; `fit`
    makes them from texts. Raises DataError if the two do not belong together.
    """

    def __init__(self, vocabulary: Mapping[str, int], idf: np.ndarray) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(vocabulary=dict(vocabulary))
        try:
            self._vectorizer.idf_ = np.asarray(idf, dtype=np.float64)
        except ValueError as error:
            sizes = f"{np.shape(idf)} TF-IDF weights for {len(vocabulary)} words"
            raise DataError(f"{sizes} do not fit together: {error}") from None

    @classmethod
    def fit(cls, texts: Sequence[str]) -> TfIdf:
        """Smoothed weights ln((1 + N) / (1 + df)) + 1 over N texts. Raises DataError if they hold no word."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            fitted = TfidfVectorizer().fit(as_texts(texts))
        except ValueError as error:
            raise DataError(f"no TF-IDF weights from these reference texts: {error}") from None
        return cls(fitted.vocabulary_, fitted.idf_)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._vectorizer.vocabulary_

    @property
    def idf(self) -> np.ndarray:
        return self._vectorizer.idf_

    def similarity(self, a: str, b: str) -> float:
        """Cosine of two texts' weighted counts (ROME's consistency, reported times 100); 0 without words."""
        x, y = self._vectorizer.transform([a, b])
        return float((x @ y.T).sum())


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (rows, columns) of ids, at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(2, ids[..., None])[..., 0] - logits.logsumexp(-1)


@torch.no_grad()
def text_logprobs(
    lm: LM,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    padding_side: PaddingSide = "right",
) -> list[np.ndarray]:
    """Natural-log probability of tokens 2..N of each text given what precedes them, arrays of length N - 1.

    Special tokens as in `batching.token_rows`: an end token that a tokenizer appends is not part of the text.
    max_length truncates on the right. Raises RequestError for a text of fewer than two tokens or beyond the
    model.
    """
    texts = as_texts(texts)
    rows, _ = token_rows(lm.tokenizer, texts) if texts else ([], None)
    rows = [r if max_length is None else r[:max_length] for r in rows]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise RequestError(f"the text {text!r} has fewer than two tokens; nothing can be predicted in it")
        if lm.max_tokens is not None and len(row) > lm.max_tokens:
            raise RequestError(
                f"a text has {len(row)} tokens, {lm.name} allows {lm.max_tokens}; pass max_length"
            )
    result: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch in bar(list(batches([len(r) for r in rows], batch_size, token_budget)), "perplexity"):
        inputs = pad_rows(lm, [rows[i] for i in batch], padding_side)
        logits = lm.model(**inputs, use_cache=False, return_dict=True).logits
        targets = inputs["input_ids"][:, 1:]
        picked = torch.cat([_picked(part, ids) for part, ids in zip(
            logits[:, :-1].split(_COLUMNS, 1), targets.split(_COLUMNS, 1), strict=True)], 1)  # fmt: skip
        del logits
        for r, i in enumerate(batch):
            n, width = len(rows[i]), picked.shape[1]
            columns = slice(width - n + 1, width) if padding_side == "left" else slice(0, n - 1)
            result[i] = picked[r, columns].double().cpu().numpy()
    return result


def perplexity(
    lm: LM, texts: Sequence[str], *, divisor: Literal["n-1", "n"] = "n-1", **options
) -> np.ndarray:
    """Perplexity of each text, (texts,): exp of the mean negative log-likelihood of tokens 2..N.

    divisor "n-1" is the mean over the N - 1 predicted tokens; "n" is what ROME/MEMIT's released code divides
    by (smaller values, the more so for short texts). options: those of `text_logprobs`.
    """
    if divisor not in ("n-1", "n"):
        raise ConfigError(f"divisor must be 'n-1' or 'n' (ROME's released code), got {divisor!r}")
    extra = 1 if divisor == "n" else 0
    return np.array([np.exp(-lp.sum() / (len(lp) + extra)) for lp in text_logprobs(lm, texts, **options)])


def confident_share(lm: LM, texts: Sequence[str], *, threshold: float = 0.8, **options) -> np.ndarray:
    """Share of tokens 2..N with a probability above `threshold`, (texts,).

    EasyEdit's "ood_ppl", the score of the Temporal data set: it reads the whole text, not a target.
    """
    return np.array([float((np.exp(lp) > threshold).mean()) for lp in text_logprobs(lm, texts, **options)])


def _fact_seed(seed: int, fact: Fact) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{fact.case_id or fact.key}".encode()).digest()[:7])


def score_text(
    lm: LM,
    facts: Sequence[Fact],
    *,
    seed: int,
    max_total_tokens: int = 100,
    top_k: int = 5,
    tfidf: TfIdf | None = None,
    stop: bool = False,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Fluency and consistency on the facts' generation prompts, one row per fact that has any.

    Columns: fact_id, fluency (mean n-gram entropy of its generations, bits), consistency (cosine of all its
    generations joined with its reference texts joined; NaN without references), text (the generations
    joined). As in ROME/MEMIT: one top-5 sample per prompt up to 100 tokens in total, going on behind an end
    token (stop=False), but seeded per fact, so that a fact's text does not depend on the other facts. tfidf:
    weights; without them they are fitted on the facts' reference texts.
    """
    facts = [f for f in as_facts(facts, "score") if f.generation]
    if not facts:
        raise DataError("no fact has generation prompts; fill Fact.generation")
    references = [" ".join(f.reference) for f in facts]
    options = {"max_total_tokens": max_total_tokens, "top_k": top_k, "stop": stop, "batch_size": batch_size}
    if tfidf is None and any(references):
        tfidf = TfIdf.fit([r for r in references if r])
    rows = []
    for fact, reference, texts in zip(
        facts, references, _free_texts(lm, facts, seed, **options), strict=True
    ):
        joined = " ".join(texts)
        rows.append({
            "fact_id": fact.case_id or fact.key,
            "fluency": float(np.mean([ngram_entropy(t) for t in texts])),
            "consistency": tfidf.similarity(joined, reference) if reference and tfidf else np.nan,
            "text": joined,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _free_texts(
    lm: LM, facts: Sequence[Fact], seed: int, batch_size: int | None, **options
) -> Iterator[list[str]]:
    """The generations of each fact. All facts run in one batch, each with a generator of its own; one after the other
    with a memory attached, whose batches are made by length, or under a given batch_size.
    """
    draws = [torch.Generator().manual_seed(_fact_seed(seed, fact)) for fact in facts]
    if readers(lm) or batch_size is not None:
        for fact, draw in zip(bar(facts, "free text"), draws, strict=True):
            made = generate(lm, fact.generation, generator=draw, batch_size=batch_size, **options)
            yield [released_text(lm, g.ids) for g in made]
        return
    prompts = [prompt for fact in facts for prompt in fact.generation]
    per_prompt = [draw for fact, draw in zip(facts, draws, strict=True) for _ in fact.generation]
    made = iter(generate(lm, prompts, generator=per_prompt, desc="free text", **options))
    for fact in facts:
        yield [released_text(lm, next(made).ids) for _ in fact.generation]
