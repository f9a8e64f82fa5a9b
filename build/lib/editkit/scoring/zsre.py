"""zsRE as ROME/MEMIT's released code evaluates it: one prompt per answer token, made by decoding ids.

Kept to reproduce published numbers; the clean reading is one teacher-forced pass (`engine.score_targets`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ..models.lm import LM
from .engine import Pair, next_tokens


def released_prompts(
    lm: LM, prompt: str, answer: str, *, llama: bool = False, keep_bos: bool = False
) -> list[tuple[str, str]]:
    """(prompt + decoded answer so far, decoded next token), one for each token of " " + answer.

    llama: the Llama branch puts a space between prompt and decoded prefix, which is a double space for
    tokenizers whose pieces keep theirs (Llama-3). keep_bos: the neighbourhood's answer ids keep the begin
    token, so that the first "token" is never predicted and the later prompts contain it as text.
    """
    tokenizer = lm.tokenizer
    ids = tokenizer(" " + answer)["input_ids"]
    if llama and not keep_bos and ids and ids[0] == tokenizer.bos_token_id:
        ids = ids[1:]
    gap = " " if llama and not keep_bos else ""
    return [
        (prompt + (gap if i else "") + tokenizer.decode(ids[:i]) if i else prompt, tokenizer.decode([ids[i]]))
        for i in range(len(ids))
    ]


def released_correct(
    lm: LM, pairs: Sequence[Pair], *, llama: bool = False, keep_bos: bool | Sequence[bool] = False
) -> list[np.ndarray]:
    """For each (prompt, answer): (t,) bool, arg-max equals the first id of the re-tokenised piece."""
    flags = [keep_bos] * len(pairs) if isinstance(keep_bos, bool) else list(keep_bos)
    steps = [
        released_prompts(lm, p, a, llama=llama, keep_bos=k) for (p, a), k in zip(pairs, flags, strict=True)
    ]
    return next_token_correct(lm, steps, llama=llama)


def next_token_correct(
    lm: LM, steps: Sequence[Sequence[tuple[str, str]]], *, llama: bool = False
) -> list[np.ndarray]:
    """For each list of (prompt, piece): (len,) bool, arg-max after the prompt equals the piece's first id."""
    flat = [s for group in steps for s in group]
    predicted = next_tokens(lm, [p for p, _ in flat])
    correct = []
    for (_, piece), token in zip(flat, predicted, strict=True):
        ids = lm.tokenizer(piece)["input_ids"]
        first = 1 if llama and ids and ids[0] == lm.tokenizer.bos_token_id else 0
        correct.append(len(ids) > first and ids[first] == token)
    bounds = np.cumsum([0, *map(len, steps)])
    return [np.array(correct[a:b], dtype=bool) for a, b in itertools.pairwise(bounds)]
