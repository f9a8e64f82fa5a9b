"""One plan at many strengths: the fair way to compare spreads.

Shifts are linear in the residuals, so a scale on them is a scale of the step size eta. A spread that writes less
disturbs less and says less; whether it is better shows in what it disturbs at the same success (book, derivation
of the residual spread).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ...base.errors import ConfigError
from ...models.lm import LM
from .data import Draw, answer_logits, encode_pairs
from .sites import Site, edited


@torch.no_grad()
def strength_curve(
    lm: LM,
    sites: Sequence[Site],
    shifts: Sequence[Tensor],
    asked: Draw,
    scales: Sequence[float],
    batch_size: int = 64,
) -> pd.DataFrame:
    """What the model says with the shifts times each scale in its weights; it is unedited afterwards.

    shifts: (m, d), one a site.   asked: edit, paraphrase and unrelated (prompt, answer) pairs.
    Columns: scale, norm (Frobenius, all sites), edits, paraphrases, unrelated (share of answer tokens that are the
    argmax), edit_nll, paraphrase_nll, and drift: mean KL(before || after) over the unrelated answers' tokens, nats.
    """
    groups = {
        name: encode_pairs(lm, getattr(asked, name), batch_size)
        for name in ("edits", "paraphrases", "unrelated")
    }
    before = [log_softmax(answer_logits(lm, b), -1) for b in groups["unrelated"]]
    norm = float(sum(s.square().sum() for s in shifts)) ** 0.5
    rows = []
    for scale in scales:
        row = {"scale": float(scale), "norm": abs(float(scale)) * norm}
        with edited(lm, sites, [scale * s for s in shifts]):
            for name, batches in groups.items():
                logs = [log_softmax(answer_logits(lm, b), -1) for b in batches]
                said = [
                    x.gather(-1, b.targets.to(x.device)[:, None])[:, 0]
                    for x, b in zip(logs, batches, strict=True)
                ]
                hits = [x.argmax(-1) == b.targets.to(x.device) for x, b in zip(logs, batches, strict=True)]
                row[name] = float(torch.cat(hits).double().mean())
                if name != "unrelated":
                    row[f"{name[:-1]}_nll"] = -float(torch.cat(said).double().mean())
                else:
                    kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, logs, strict=True)]
                    row["drift"] = float(torch.cat(kl).double().mean())
        rows.append(row)
    return pd.DataFrame(rows)


def drift_at(curve: pd.DataFrame, success: float, column: str = "paraphrases") -> float:
    """Drift at the first strength, in the order of scales, at which `column` reaches `success`; linear between
    measured scales, NaN if none reaches it. Raises ConfigError unless scales ascend.
    """
    if not curve["scale"].is_monotonic_increasing:
        raise ConfigError("the scales of a strength curve must ascend")
    y, x = curve[column].to_numpy(), curve["drift"].to_numpy()
    reached = np.flatnonzero(y >= success)
    if not len(reached):
        return float("nan")
    i = int(reached[0])
    if i == 0 or y[i] == y[i - 1]:
        return float(x[i])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (success - y[i - 1]) / (y[i] - y[i - 1]))
