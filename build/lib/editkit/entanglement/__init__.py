"""Which other facts an edit will move, told before the edit (CLaRE; Baser et al. 2026).

    H = represent(lm, facts, layer)                  # one forward pass per fact, stopped at the layer
    scores = cosine(H)                               # CLaRE's entanglement, all pairs
    Y = represent(lm, facts, layer, module="down_input")
    scores = whitened(Y, second_moment)              # exact to first order for one edited layer

Symbols: n facts, m hidden size, d key width; representations hold one fact per row, (n, width).
May import `base` to `methods`.
"""

from __future__ import annotations

from .representations import MODULES, TOKENS, check_facts, represent, represent_many
from .similarity import Score, blocks, centered_cosine, cosine, whitened, whitened_cosine

__all__ = [
    "MODULES", "TOKENS", "Score", "blocks", "centered_cosine", "check_facts", "cosine", "represent",
    "represent_many", "whitened", "whitened_cosine",
]  # fmt: skip
