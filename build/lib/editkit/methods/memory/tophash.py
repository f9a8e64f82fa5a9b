"""TopHash: from the features of a prompt to the sparse mask of memory columns that belongs to it.

With features a_t (the down projection's input at token t) and their mean mu over unrelated prompts,

    abar(x) = mean over prompt tokens of a_t  -  mu,      M(x) = 1[ pi( T_k(abar(x)) ) ]          (MEMOIR, TopHash)

T_k takes the k coordinates of largest absolute value, pi is a permutation of the d columns drawn once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...base.errors import ConfigError
from ...base.progress import bar
from ...models.hooks import trace
from ...models.lm import LM
from ...models.prompts import PromptState


@dataclasses.dataclass(frozen=True)
class TopHash:
    """The hash of one memory. center: mu (d,).   permutation: pi (d,).   k: columns per mask.

    Raises ConfigError if k does not fit the layer.
    """

    center: Tensor
    permutation: Tensor
    k: int

    def __post_init__(self) -> None:
        check_k(self.k, len(self.center))

    def __call__(self, features: Tensor) -> Tensor:
        """Masks (n, d) bool, k ones each, of uncentred mean features (n, d)."""
        top = (features - self.center.to(features)).abs().topk(self.k, dim=-1).indices
        columns = self.permutation.to(top.device)[top]
        mask = torch.zeros(features.shape, dtype=torch.bool, device=features.device)
        return mask.scatter_(-1, columns, True)


def check_k(k: int, d: int) -> None:
    """Raise ConfigError unless 1 <= k <= d."""
    if not 1 <= k <= d:
        raise ConfigError(
            f"k = {k} columns per mask, but the layer has {d}; give 1 <= k <= {d} (paper: 2/7 of it)"
        )


def draw_permutation(d: int, seed: int) -> Tensor:
    """pi (d,), from a seed; on the CPU, so that a seed gives the same one everywhere."""
    return torch.randperm(d, generator=torch.Generator().manual_seed(seed))


def random_masks(prompts: Sequence[Sequence[int]], d: int, k: int, seed: int) -> Tensor:
    """Masks (n, d) bool that are random functions of the prompts' token ids: the ablation without features.

    Equal prompts get equal masks, any other prompt, also a rephrase, an independent one.
    """
    masks = torch.zeros(len(prompts), d, dtype=torch.bool)
    for mask, ids in zip(masks, prompts, strict=True):
        digest = hashlib.sha256(f"{seed}|{','.join(map(str, ids))}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        mask[torch.randperm(d, generator=generator)[:k]] = True
    return masks


def mean_features(lm: LM, layer: int, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """Mean input of the layer's down projection over the tokens of each text, BOS included: (n, d).

    In at least float32. The forward pass ends at that layer.
    """
    return mean_features_of(lm, [layer], texts, batch_size=batch_size)[layer]


@torch.no_grad()
def mean_features_of(
    lm: LM, layers: Sequence[int], texts: Sequence[str], *, batch_size: int = 64
) -> dict[int, Tensor]:
    """`mean_features` of several layers in one pass."""
    names = {layer: lm.down_name(layer) for layer in layers}
    last = names[max(layers)]
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for i in bar(range(0, len(texts), batch_size), "features of prompts", unit="batch"):
        encoding = lm.encode(texts[i : i + batch_size])
        with trace(lm.model, names.values(), inputs=True, outputs=False, stop_at=last) as seen:
            lm.forward(encoding)
        real = encoding.attention_mask.bool()
        state = PromptState(real, real, encoding.lengths, encoding.input_ids, prefill=True)
        for layer, name in names.items():
            rows[layer].append(state.mean(seen.input[name]))
    return {layer: torch.cat(found) for layer, found in rows.items()}
