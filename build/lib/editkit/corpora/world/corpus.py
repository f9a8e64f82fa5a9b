"""Training text of the companion: examples with the positions on which they are scored.

An example is a token sequence with a mask. Statements ("prompt answer.") are scored on the answer, the full
stop and nothing else, so that capacity goes to facts; biographies are scored on every token, so that the model
also speaks. Several examples are joined into one sequence, which teaches the model to answer after a prefix,
as edits with context templates need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Example:
    """One training text. spans: character ranges whose tokens are scored (None = all). group: fact it states."""

    text: str
    spans: tuple[tuple[int, int], ...] | None
    source: str
    group: str = ""


def statement_example(prompt: str, answer: str, source: str, group: str = "") -> Example:
    """ "prompt answer." scored on answer and full stop."""
    text = f"{prompt} {answer}."
    return Example(text, ((len(prompt), len(text)),), source, group)


def encode_examples(tokenizer, examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and score masks, one pair per example (1-d arrays of equal length; mask True = predict me)."""
    encoded = []
    batch = tokenizer([e.text for e in examples], return_offsets_mapping=True, add_special_tokens=False)
    for example, ids, offsets in zip(examples, batch["input_ids"], batch["offset_mapping"], strict=True):
        if example.spans is None:
            mask = np.ones(len(ids), bool)
        else:
            # a token belongs to a span if it ends inside it (byte-level offsets may start at the blank before)
            mask = np.array([any(a < end <= b for a, b in example.spans) for _, end in offsets])
        mask[0] = False  # nothing precedes it
        encoded.append((np.asarray(ids, np.int64), mask))
    return encoded


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6000):
    """Byte-level BPE tokenizer (GPT-2 style, no BOS) trained on the texts; "<|endoftext|>" is end and padding.

    A blank is put before the first word, so that a name has the same pieces at the start of a text and inside it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


class Sampler:
    """Draws batches of packed sequences, harder examples more often.

    Every example keeps its latest loss per scored token; it is drawn with probability proportional to
    floor + min(loss, ceiling). Long sequences are made of whole examples until `length` tokens are reached.
    """

    def __init__(
        self,
        encoded,
        end_id: int,
        *,
        length: int,
        seed: int,
        floor: float = 0.05,
        ceiling: float = 2.0,
        weight: np.ndarray | None = None,
    ):
        self.encoded, self.end_id, self.length = encoded, end_id, length
        self.floor, self.ceiling = floor, ceiling
        self.rng = np.random.default_rng(seed)
        self.loss = np.full(len(encoded), 10.0)
        self.weight = np.ones(len(encoded)) if weight is None else weight
        self.sizes = np.array([len(ids) for ids, _ in encoded])

    def draw(self, n_tokens: int):
        """ids, targets mask, owner arrays of shape (rows, length); owner = example index of each scored token."""
        rows = max(1, n_tokens // self.length)
        p = self.weight * (self.floor + np.minimum(self.loss, self.ceiling))
        n_wanted = int(rows * self.length / max(1.0, self.sizes.mean() * 0.8)) + rows
        chosen = self.rng.choice(len(p), size=n_wanted, p=p / p.sum())
        ids = np.full((rows, self.length), self.end_id, np.int64)
        mask = np.zeros((rows, self.length), bool)
        owner = np.full((rows, self.length), -1, np.int64)
        used = np.zeros(rows, np.int64)
        row = 0
        for k in chosen:
            tokens, scored = self.encoded[k]
            size = min(len(tokens), self.length)
            if used[row] + size > self.length:
                row += 1
                if row == rows:
                    break
            a, b = used[row], used[row] + size
            ids[row, a:b], mask[row, a:b] = tokens[:size], scored[:size]
            owner[row, a:b] = k
            used[row] = b + 1 if self.rng.random() < 0.5 else b  # sometimes a separator between examples
        return ids, mask, owner

    def update(self, owners: np.ndarray, losses: np.ndarray) -> None:
        """Store the mean loss per scored token of the examples just seen."""
        order = np.unique(owners)
        total = np.bincount(owners, weights=losses, minlength=len(self.loss))[order]
        count = np.bincount(owners, minlength=len(self.loss))[order]
        self.loss[order] = 0.5 * np.minimum(self.loss[order], 5.0) + 0.5 * total / count

    def state_dict(self) -> dict:
        return {"loss": self.loss.copy(), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.loss = np.asarray(state["loss"]).copy()
        self.rng.bit_generator.state = state["rng"]
