"""GradSim (Qin et al. 2024), the baseline that CLaRE is compared with: cosine of the gradients of two facts.

    GradSim(i, j) = cos(grad P(answer_i | prompt_i), grad P(answer_j | prompt_j))

The gradient of P is P times that of log P, so the cosine is that of the gradients of the summed negative
log-likelihood, which is what is computed. One forward and one backward pass per fact, and a vector as long as the
parameters: for all pairs of a corpus it has to be restricted to some parameters, or projected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError, NumericsError
from ..base.progress import bar
from ..locate.contexts import ContextTemplates
from ..locate.target_rows import encode_targets
from ..models.answers import log_probs_of
from ..models.facts import Fact
from ..models.hooks import frozen, trace
from ..models.lm import LM
from .representations import check_facts
from .similarity import Score, cosine

Params = Literal["all", "mlp", "down"]


def parameter_names(lm: LM, params: Params | Sequence[str] = "all", layer: int | None = None) -> list[str]:
    """Names of the parameters whose gradient counts.

    "all": every parameter (the definition); "mlp": the matrices of one layer's MLP; "down": its down projection, the
    matrix that editors write; or a list of names. Raises ConfigError without a layer, ModelError for unknown names.
    """
    known = [name for name, _ in lm.model.named_parameters()]
    if not isinstance(params, str):
        for name in params:
            lm.parameter(name)
        names = list(params)
    elif params == "all":
        names = known
    elif params in ("mlp", "down"):
        if layer is None:
            raise ConfigError(f"params={params!r} needs the layer, e.g. layer=3")
        inside = lm.mlp_name(layer) + "." if params == "mlp" else lm.down_name(layer) + "."
        names = [name for name in known if name.startswith(inside) and lm.parameter(name).ndim == 2]
    else:
        raise ConfigError(f"params must be 'all', 'mlp', 'down' or a list of names, got {params!r}")
    if not names:
        raise ConfigError("no parameters to take the gradient of; name at least one")
    return names


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A seeded random projection to `width` numbers: every coordinate is added, with a random sign, to a random entry
    (count sketch). It keeps inner products in the mean; the error of a cosine has a standard deviation of at most
    about sqrt(2 / width). Needs 5 bytes per parameter, not a dense matrix.
    """

    width: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"the width of a sketch must be at least 1, got {self.width}")

    def plan(self, n: int) -> tuple[Tensor, Tensor]:
        """Entry and sign of each of n coordinates."""
        draw = torch.Generator().manual_seed(self.seed)
        index = torch.randint(self.width, (n,), generator=draw, dtype=torch.int32)
        sign = torch.randint(2, (n,), generator=draw, dtype=torch.int8) * 2 - 1
        return index, sign

    def apply(self, parts: Sequence[Tensor], plan: tuple[Tensor, Tensor]) -> Tensor:
        """Parts of a vector, in order, n numbers in all -> (width,)."""
        out, start = parts[0].new_zeros(self.width), 0
        for part in parts:
            index, sign = (x[start : start + part.numel()].to(out.device) for x in plan)
            out.index_add_(0, index, part.to(out.device) * sign)
            start += part.numel()
        return out


@torch.enable_grad()
def _gradients(lm: LM, facts: Sequence[Fact], names: Sequence[str]) -> Iterator[list[Tensor]]:
    """The gradient of each fact's summed NLL, float32, one flat part per parameter; never two at a time."""
    params = [lm.parameter(name) for name in names]
    rows = encode_targets(lm, facts, ContextTemplates(), token="last")
    last = lm.block_name(lm.n_layers - 1)
    with frozen(lm.model):
        for p in params:
            p.requires_grad_(True)
        for i in range(len(facts)):
            encoding, _, places = rows.take([i])
            with trace(lm.model, [last], stop_early=True) as seen:
                lm.forward(encoding)
            loss = -log_probs_of(lm, seen.output[last], places[:, 1:]).sum()
            found = list(torch.autograd.grad(loss, params, allow_unused=True))
            parts = []
            for k, p in enumerate(params):  # flattening may copy: give each one back before the next
                g, found[k] = found[k], None
                parts.append((torch.zeros_like(p) if g is None else g).detach().reshape(-1).float())
                del g
            del found, loss, seen
            yield parts
            del parts


def gradients(
    lm: LM,
    facts: Sequence[Fact],
    *,
    params: Params | Sequence[str] = "all",
    layer: int | None = None,
    sketch: Sketch | None = None,
) -> Tensor:
    """One gradient per fact, (n, number of parameters) or (n, sketch.width), float32 on the CPU.

    Without a sketch this is as large as n models: use it for few facts, or use `gradsim`.
    Raises RequestError (facts), ConfigError (params).
    """
    facts = check_facts(facts)
    names = parameter_names(lm, params, layer)
    size = sum(lm.parameter(name).numel() for name in names)
    plan = sketch.plan(size) if sketch else None
    out = torch.empty(len(facts), sketch.width if sketch else size)
    found = _gradients(lm, facts, names)
    # Asked for one by one: a bar around the generator would hold on to the last gradient while the next is made.
    for i in bar(range(len(facts)), f"gradients of {len(facts)} facts", unit="fact"):
        parts = next(found)
        if not all(bool(torch.isfinite(part).all()) for part in parts):  # part by part: no second copy of it all
            raise NumericsError("a gradient has NaN or Inf; load the model in float32")
        if sketch:
            out[i] = sketch.apply(parts, plan)
        else:
            for part, where in zip(parts, _slices(parts), strict=True):
                out[i, where] = part
            del part
        parts.clear()  # the generator holds the list, too; now, before the next one is made
    return out


def _slices(parts: Sequence[Tensor]) -> list[slice]:
    ends = np.cumsum([part.numel() for part in parts]).tolist()
    return [slice(end - part.numel(), end) for end, part in zip(ends, parts, strict=True)]


def gradsim(
    lm: LM,
    edits: Sequence[Fact],
    probes: Sequence[Fact],
    *,
    params: Params | Sequence[str] = "all",
    layer: int | None = None,
    answers: Literal["true", "target"] = "true",
    held: int = 64,
) -> np.ndarray:
    """GradSim of every edit with every probe, (n_e, n_p) float64, exactly (no projection).

    answers: the answer of an edited fact is its true one, what the model knows ("true"; `target_true` where there is
             one), or the one that will be written ("target").
    held: gradients of so many edits are held at a time; those of the probes are recomputed for every such group and
          never stored, so the memory is held x parameters.
    """
    if held < 1:
        raise ConfigError(f"held must be at least 1, got {held}")
    if answers not in ("true", "target"):
        raise ConfigError(f"answers must be 'true' or 'target', got {answers!r}")
    if answers == "true":
        edits = [f.replace(target=f.target_true) if f.target_true else f for f in edits]
    edits, probes = check_facts(edits), check_facts(probes)
    names = parameter_names(lm, params, layer)
    out = np.empty((len(edits), len(probes)))
    for start in range(0, len(edits), held):
        G = gradients(lm, edits[start : start + held], params=names)
        norms = G.norm(dim=-1)
        found = _gradients(lm, probes, names)
        label = f"gradients of {len(probes)} probes"
        for j in bar(range(len(probes)), label, unit="fact"):
            parts = next(found)
            products = sum(G[:, w] @ part.to(G.device) for part, w in zip(parts, _slices(parts), strict=True))
            norm = torch.stack([part.norm() for part in parts]).norm().to(G.device)
            out[start : start + held, j] = (products / (norms * norm)).numpy()
            del parts
    if not np.isfinite(out).all():
        raise NumericsError("a gradient is zero, NaN or Inf; load the model in float32")
    return out


def sketched_gradsim(
    lm: LM, facts: Sequence[Fact], *, sketch: Sketch, params: Params = "all", layer: int | None = None
) -> Score:
    """Approximate GradSim of all pairs, as factors of width `sketch.width`."""
    return dataclasses.replace(
        cosine(gradients(lm, facts, params=params, layer=layer, sketch=sketch)), name="sketched GradSim"
    )
