"""Where should the representation be read? The same ripples, predicted from every layer, module and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ...base.errors import RequestError
from ...entanglement.representations import MODULES, represent_many
from ...entanglement.similarity import centered_cosine, cosine, whitened
from ...locate.moments import Covariance
from ...models.facts import Fact
from ...models.lm import LM


def ablate(
    lm: LM,
    facts: Sequence[tuple[Sequence[Fact], Sequence[Fact]]],
    ripples: dict[str, Sequence[np.ndarray]],
    layer: int,
    *,
    layers: Sequence[int] | None = None,
    tokens: Sequence[str] = ("last", "subject_last", "mean"),
    statistics: Mapping[int, Covariance] | None = None,
) -> pd.DataFrame:
    """Pooled Spearman correlation of the cosine with measured ripples, by place.

    facts: (edits, probes) per seed.   ripples: editor -> (edits, probes) tables per seed.
    layers: swept at token "last" with all modules (None: all). Tokens are varied at `layer`, each also with the answer
    appended where that is another text.   statistics: second moments; their layers also get the whitened keys at
    "last". Returns editor, layer, module, token, with_answer, score, spearman.
    """
    if not facts or any(len(r) != len(facts) for r in ripples.values()):
        raise RequestError("give one ripple table per pair of edits and probes")
    measured = {name: np.concatenate([t.reshape(-1) for t in r]) for name, r in ripples.items()}
    rows = []

    def add(layers: Sequence[int], token: str, with_answer: bool, centered: bool) -> None:
        sides = [
            tuple(
                represent_many(
                    lm, [_true(f) for f in side], layers, MODULES, token=token, with_answer=with_answer
                )
                for side in pair
            )
            for pair in facts
        ]
        for site in sides[0][0]:
            scores = {"cosine": cosine, **({"centered cosine": centered_cosine} if centered else {})}
            if centered and site[1] == "down_input" and site[0] in (statistics or {}):
                C = statistics[site[0]].C
                scores["whitened"] = lambda a, b, C=C: whitened(a, C, b)
            for score, make in scores.items():
                x = np.concatenate([make(a[site], b[site]).matrix().numpy().reshape(-1) for a, b in sides])
                for editor, y in measured.items():
                    rows.append({
                        "editor": editor, "layer": site[0], "module": site[1], "token": token,
                        "with_answer": with_answer, "score": score,
                        "spearman": float(stats.spearmanr(x, y).statistic),
                    })  # fmt: skip

    add(range(lm.n_layers) if layers is None else layers, "last", False, True)
    for token in tokens:
        if token != "last":
            add([layer], token, False, False)
        if token in ("last", "mean"):
            add([layer], token, True, False)
    return pd.DataFrame(rows)


def _true(fact: Fact) -> Fact:
    """The fact as the model knows it, for texts with the answer."""
    return fact.replace(target=fact.target_true) if fact.target_true else fact
