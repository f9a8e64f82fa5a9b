"""Where in the token sequence a fact lives: token positions by character offsets.

Position arithmetic on token counts breaks with BOS tokens, leading spaces and merged pieces. Here every
position comes from the tokenizer's offset mapping, and is checked against the characters of the subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..base.errors import ModelError, RequestError
from .facts import SLOT
from .lm import LM, Encoding

Where = Literal["subject_last", "subject_first", "subject_first_after", "last"]
PADDING = Literal["left", "right"]


def check_where(where: str) -> str:
    """The lookup name, if known; raises RequestError with the list otherwise."""
    if where not in get_args(Where):
        raise RequestError(f"unknown lookup token {where!r}; choose one of {', '.join(get_args(Where))}")
    return where


def subject_characters(template: str, subject: str) -> tuple[str, int, int]:
    """The filled prompt and the character span [start, end) of the subject in it, outer spaces excluded.

    Raises RequestError if the template does not have exactly one slot or the subject is empty.
    """
    if template.count(SLOT) != 1:
        raise RequestError(
            f"the prompt {template!r} (subject {subject!r}) must contain the slot '{{}}' exactly once; "
            "write it as a template, e.g. 'The capital of {} is'"
        )
    if not subject.strip():
        raise RequestError(f"empty subject for the prompt {template!r}; give the text that fills the slot")
    start = template.index(SLOT) + len(subject) - len(subject.lstrip())
    return template.replace(SLOT, subject), start, start + len(subject.strip())


def find_spans(
    lm: LM, prompts: Sequence[tuple[str, str]], padding_side: PADDING = "right"
) -> tuple[Encoding, Tensor, Tensor]:
    """Encode filled prompts and find the subject's tokens.

    prompts: (template, subject) pairs. A template may carry text on both sides of its slot, also a target.
    Returns the encoding and two LongTensors of shape (n,): column of the first and of the last token that
    covers a character of the subject. Raises RequestError naming prompt and subject when no token does,
    or one holds letters of the subject and of its surroundings;
    ModelError for tokenizers without offsets.
    """
    filled = [subject_characters(template, subject) for template, subject in prompts]
    encoding = lm.encode([text for text, _, _ in filled], padding_side)
    if encoding.offsets is None:
        raise ModelError(
            f"the tokenizer of {lm.name} gives no character offsets; load the fast one "
            "(AutoTokenizer, use_fast=True)"
        )
    begin, end = encoding.offsets.unbind(-1)
    start = torch.tensor([s for _, s, _ in filled], device=begin.device)[:, None]
    stop = torch.tensor([e for _, _, e in filled], device=begin.device)[:, None]
    real = (end > begin) & encoding.attention_mask.bool()
    covers_first = real & (begin <= start) & (end > start)
    covers_last = real & (begin < stop) & (end >= stop)
    found = torch.stack([covers_first.any(-1), covers_last.any(-1)]).tolist()
    if not all(map(all, found)):
        i = next(i for i, both in enumerate(zip(*found, strict=True)) if not all(both))
        text, s, e = filled[i]
        character = text[e - 1] if found[0][i] else text[s]
        raise RequestError(
            f"no token of the prompt {text!r} covers the character {character!r} of the subject "
            f"{text[s:e]!r}; the tokenizer dropped it, choose another spelling"
        )
    _refuse_mixed_tokens(filled, begin, end, covers_first, covers_last)
    width = begin.shape[1]
    first = covers_first.to(torch.long).argmax(-1)
    # A character may be split into several byte pieces with equal offsets: the last one ends the subject.
    last = width - 1 - covers_last.flip(-1).to(torch.long).argmax(-1)
    return encoding, first, last


def _refuse_mixed_tokens(
    filled: Sequence[tuple[str, int, int]], begin: Tensor, end: Tensor, covers_first: Tensor, covers_last: Tensor
) -> None:
    """Raise RequestError where a subject is not a word of its own for the tokenizer.

    Where one token holds letters of the subject and of the text around it, its state is not that of the subject.
    """
    for i, (text, start, stop) in enumerate(filled):
        before, behind = text[start - 1 : start].isalnum(), text[stop : stop + 1].isalnum()
        if not (before or behind):  # blanks and punctuation may share a token with the subject
            continue
        mixed = (covers_first[i] & (begin[i] < start)).any() if before else False
        mixed = mixed or ((covers_last[i] & (end[i] > stop)).any() if behind else False)
        if bool(mixed):
            raise RequestError(
                f"the tokenizer splits the subject {text[start:stop]!r} otherwise inside the prompt {text!r}: one "
                "token holds letters of both; write the template so that the subject is a word of its own"
            )


def find_positions(
    lm: LM,
    prompts: Sequence[tuple[str, str]],
    where: Where = "subject_last",
    padding_side: PADDING = "right",
) -> tuple[Encoding, Tensor]:
    """Encode filled prompts and find one lookup token in each.

    prompts: (template, subject) pairs.
    where:   "subject_last"        last token of the subject (ROME, MEMIT),
             "subject_first"       its first token,
             "subject_first_after" the token right after the subject,
             "last"                last token of the prompt's text.
    Returns (encoding, positions): positions (n,) are columns of `encoding.input_ids`, on its device; with
    `hooks.pick(states, positions)` they select from (n, tokens, width).
    Raises RequestError naming prompt and subject.
    """
    check_where(where)
    encoding, first, last = find_spans(lm, prompts, padding_side)
    if where == "subject_first":
        return encoding, first
    if where == "subject_last":
        return encoding, last
    begin, end = encoding.offsets.unbind(-1)
    columns = torch.arange(begin.shape[1], device=begin.device)
    # The text's last token, not a special token that a post-processor may have appended.
    real = (end > begin) & encoding.attention_mask.bool()
    final = torch.where(real, columns, -1).amax(-1)
    if where == "last":
        return encoding, final
    for i, (template, subject) in enumerate(prompts):
        if last[i] >= final[i]:
            raise RequestError(
                f"nothing follows the subject {subject!r} in the prompt {template!r}; "
                "use the lookup token 'subject_last', or a template with text after its slot"
            )
    return encoding, last + 1
