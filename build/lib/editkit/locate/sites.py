"""An editing site: which lookup token and which layers, and by which rule they were chosen."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Site:
    """token: a lookup name of `editkit.models.lookup`. layers: block indices, ascending. rule: how both were
    derived.
    """

    token: str
    layers: tuple[int, ...]
    rule: str
