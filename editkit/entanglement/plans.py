"""The exact first-order predictor for ROME, MEMIT and AlphaEdit, for one and for several edited layers.

One fact with key k and residual r is written as  Delta = r p^T  with  p = M^-1 k / (1 + k^T M^-1 k), so a probe with
key k_j receives  Delta k_j = r (p . k_j).  With several layers the contributions r^l (p^l . k_j^l) add up in the
residual stream, signs included, and the keys of the edited fact move while its lower layers are written. `plan_edits`
follows that with forward passes of the edited prompt alone; nothing is written and no probe is run more than once.
Derivation: book, chapter CLaRE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..base.config import check_known
from ..base.errors import ConfigError, NumericsError
from ..locate.patching import first_answer_ids
from ..methods.delta import Delta
from ..methods.weights.accumulate import AccumulateEditor
from ..methods.weights.locate_then_edit import LocateEditor
from ..methods.weights.rome import ROME
from ..models.facts import Fact, validate_facts
from ..models.hooks import frozen, pick, submodule, trace
from ..models.joining import marked
from ..models.lm import LM
from ..models.lookup import find_positions
from .representations import represent_many
from .similarity import _cholesky

Direction = Literal["keys", "readout", "gradient"]
DIRECTIONS: tuple[str, ...] = ("keys", "readout", "gradient")


@dataclasses.dataclass(frozen=True)
class Memory:
    """M^-1 of one layer, as M = L L^T, possibly on a subspace with orthonormal basis U (d, r): U (U^T M U)^-1 U^T.

    limit: ROME, where the residual is met exactly, p = M^-1 k / (k^T M^-1 k).
    """

    L: Tensor
    U: Tensor | None = None
    limit: bool = False

    @classmethod
    def of(
        cls,
        C: Tensor,
        lam: float | None = None,
        *,
        history: Tensor | None = None,
        ridge: float = 0.0,
        U: Tensor | None = None,
    ) -> Memory:
        """M = lam C + history + ridge I, restricted to U; lam=None is ROME's limit (M = C).

        C: (d, d) second moment. history: (d, d) sum of k k^T over facts written before.
        Raises NumericsError if M is not positive definite.
        """
        M = C.double() * (1.0 if lam is None else lam)
        if history is not None:
            M = M + history.double()
        if ridge:
            M = M + ridge * torch.eye(len(M), dtype=M.dtype, device=M.device)
        if U is not None:
            M = U.T @ M @ U
        return cls(_cholesky(M, M), U, limit=lam is None)

    def solve(self, K: Tensor) -> Tensor:
        """p of each key: (n, d) -> (n, d), float64."""
        K = K.to(self.L)
        inner = K if self.U is None else K @ self.U
        P = torch.cholesky_solve(inner.T, self.L).T
        energy = (P * inner).sum(-1, keepdim=True)
        if self.limit and (energy <= 0).any():
            raise NumericsError("a key is zero; drop the fact or read another layer")
        P = P / (energy if self.limit else 1 + energy)
        return P if self.U is None else P @ self.U.T


def memories(editor: LocateEditor) -> dict[int, Memory]:
    """Layer -> Memory of an editor as it stands: lam, ridge, projector, and the history it has accumulated.

    RECT and PRUNE change the solved update afterwards; theirs is that of the MEMIT they start from.
    """
    found: dict[int, Memory] = {}
    for layer in editor.config.layers:
        if isinstance(editor, ROME):
            d = editor.lm.weight_shape(layer)[1]
            C = editor.second_moment(layer) if editor.config.whiten else torch.eye(d, dtype=torch.float64)
            found[layer] = Memory.of(C)
        elif isinstance(editor, AccumulateEditor):
            _, U = editor.prior(layer)
            found[layer] = Memory.of(editor.gram(layer), 1.0, U=U)
        else:
            raise ConfigError(
                f"no closed form is known for {editor.name}; use rome, memit, alphaedit, rect or prune"
            )
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """What n edits add to the residual stream: at layer l a probe with key k receives  R_l[i] (P_l[i] . k).

    P: layer -> (n, d).   R: layer -> (n, m); (n, 1) where directions are unknown and taken as equal in all layers.
    """

    P: dict[int, Tensor]
    R: dict[int, Tensor]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.P)

    def shares(self, layer: int, keys: Tensor) -> Tensor:
        """s_ij = P_l[i] . k_j, signed, (n, n')."""
        return self.P[layer] @ keys.to(self.P[layer]).T

    def shift(self, keys: Mapping[int, Tensor], scale: Tensor | None = None) -> np.ndarray:
        """|| sum_l r_i^l s_ij^l || / scale_j, (n, n') float64.

        keys: layer -> (n', d) keys of the probes. scale: (n',), their ||h||, by which the final norm divides; None: 1.
        Only Gram matrices of the residuals are formed: p^2 numbers per edit instead of m per pair.
        """
        total: Tensor | None = None
        S = {layer: self.shares(layer, keys[layer]) for layer in self.layers}
        for a in self.layers:
            for b in self.layers:
                gram = (self.R[a].double() * self.R[b].double()).sum(-1, keepdim=True)
                term = gram * S[a] * S[b]
                total = term if total is None else total + term
        size = total.clamp(min=0).sqrt()
        return (size if scale is None else size / scale.to(size)).cpu().numpy()


def probe_representations(lm: LM, probes: Sequence, layers: Sequence[int], token: str = "last", **options):
    """(keys: layer -> (n', d), scale (n',)): what `Plan.shift` needs of the probes, from one early-stopped pass.

    scale: norm of the block output at the last edited layer.
    """
    top = max(layers)
    found = represent_many(lm, probes, sorted(layers), ["down_input", "block_output"], token=token, **options)
    return {layer: found[layer, "down_input"] for layer in layers}, found[top, "block_output"].norm(dim=-1)


def plan_edits(
    editor: LocateEditor,
    facts: Sequence[Fact],
    *,
    direction: Direction | Tensor = "keys",
    length: float = 0.65,
) -> Plan:
    """Predict what an editor would inject for each fact, edited alone, without writing anything.

    direction: where the residual delta at the last edited layer points. None of the first two needs a gradient.
        "keys"      unknown: keys of the unedited model, one common direction for all layers, ||delta|| ~ ||h_i||.
        "readout"   head weights of the first token of the new object minus those of the old one (or of the model's
                    own top token).
        "gradient"  gradient of the new object's first token, one backward pass of the edited prompt.
        (m, n) tensor: the residuals z - h themselves, once targets are optimised (`SharedTargets.residuals`).
    length: ||delta|| / ||h_i|| for "readout" and "gradient"; 0.65 is the mean of optimised targets on the seed that
        the predictor was designed on.

    Raises ConfigError for editors without a closed form or with another residual spread than MEMIT's.
    """
    facts = validate_facts(facts, allow_conflicts=True)
    lm, cfg = editor.lm, editor.config
    if getattr(cfg, "spread", "linear_decay") != "linear_decay":
        raise ConfigError(f"plans follow MEMIT's spread of the residual, not {cfg.spread!r}")
    if isinstance(direction, str):
        check_known([direction], DIRECTIONS, "direction")
    memory = memories(editor)
    contexts = editor.templates()
    weights = torch.tensor(
        contexts.weights("flat" if isinstance(editor, ROME) else "groups"), dtype=torch.float64
    )
    rows = [(filled, f.subject) for f in facts for filled in contexts.fill(f.prompt)]
    run = _Run(lm, rows, cfg.token, len(facts), len(weights))
    top = cfg.layers[-1]
    h = run.read([lm.block_name(top)], {})[lm.block_name(top)][:, 0]
    size = h.norm(dim=-1, keepdim=True)
    if isinstance(direction, Tensor):
        if tuple(direction.shape) != (h.shape[1], len(facts)):
            raise NumericsError(
                f"residuals must be (m, n) = {(h.shape[1], len(facts))}, got {tuple(direction.shape)}"
            )
        delta = direction.T.to(h)
    elif direction == "keys":
        delta = None
    else:
        toward = _readout(lm, facts) if direction == "readout" else run.gradient(facts, top)
        delta = length * size * toward / toward.norm(dim=-1, keepdim=True)

    P, R, added = {}, {}, {}
    for i, layer in enumerate(cfg.layers):
        names = [lm.down_name(layer), lm.block_name(top)]
        states = run.read(names, {} if delta is None else added)
        keys = states[names[0]].double()
        mean = (keys * weights[None, :, None]).sum(1)
        P[layer] = memory[layer].solve(mean)
        if isinstance(editor, ROME) and cfg.key == "released":  # v is imposed at the bare prompt's key
            P[layer] = P[layer] / (P[layer] * keys[:, 0]).sum(-1, keepdim=True)
        if delta is None:
            R[layer] = size.double()
            continue
        R[layer] = ((h + delta - states[names[1]][:, 0]) / (len(cfg.layers) - i)).double()
        if (
            isinstance(editor, ROME) and cfg.key == "mean"
        ):  # v replaces W k of the mean key, not of the bare one
            R[layer] = R[layer] + (keys[:, 0] - mean) @ lm.get_matrix(layer).to(mean).T
        received = (P[layer][:, None] * keys).sum(-1)  # by each context's own key
        added[lm.block_name(layer)] = (received[..., None] * R[layer][:, None]).float()
    return Plan(P, R)


def delta_shift(lm: LM, delta: Delta, keys: Mapping[int, Tensor], scale: Tensor | None = None) -> np.ndarray:
    """|| sum_l Delta_l k_j^l || / scale_j, (n',): the first-order shift of a finished edit of any editor.

    keys, scale: of the probes (`probe_representations`). Parameters that are no down projection are refused.
    """
    names = {lm.weight_name(layer): layer for layer in range(lm.n_layers)}
    other = [name for name in delta.names if name not in names]
    if other:
        raise ConfigError(f"{other[0]} is no down projection; the first-order shift covers edits of those")
    total = sum(keys[names[name]].double() @ lm.to_matrix(delta.update(name)).T for name in delta.names)
    size = total.norm(dim=-1)
    return (size if scale is None else size / scale.to(size)).numpy()


class _Run:
    """Forward passes of the edited prompts in their contexts, with vectors added at the edited token."""

    def __init__(self, lm: LM, rows: Sequence[tuple[str, str]], token: str, n: int, contexts: int) -> None:
        self.lm, self.n, self.contexts = lm, n, contexts
        self.encoding, self.positions = find_positions(lm, rows, token)
        _, self.final = find_positions(lm, rows, "last")
        self.index = torch.arange(len(rows), device=self.positions.device)

    def _adder(self, value: Tensor):
        def add(out: Tensor) -> Tensor:
            where = (self.index.to(out.device), self.positions.to(out.device))
            return out.index_put(where, out[where] + value.reshape(-1, value.shape[-1]).to(out))

        return add

    @torch.no_grad()
    def read(self, names: Sequence[str], added: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys (inputs of down projections) or outputs of other modules, (n, contexts, width)."""
        lm = self.lm
        downs = {lm.down_name(layer) for layer in range(lm.n_layers)}
        edit = {name: self._adder(value) for name, value in added.items()}
        with trace(lm.model, names, inputs=True, edit=edit, stop_early=True) as seen:
            lm.forward(self.encoding)
        return {
            name: pick((seen.input if name in downs else seen.output)[name], self.positions)
            .reshape(self.n, self.contexts, -1).float()
            for name in names
        }  # fmt: skip

    @torch.enable_grad()
    def gradient(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """d log P(first token of the new object | prompt) / d block output at the edited token, (n, m)."""
        lm = self.lm
        bare = torch.arange(0, self.n * self.contexts, self.contexts)
        encoding, final = self.encoding.select(bare), self.final[bare]
        positions, index = self.positions[bare], torch.arange(self.n)
        delta = torch.zeros(self.n, lm.d_model, requires_grad=True)
        last = lm.block_name(lm.n_layers - 1)

        def add(out: Tensor) -> Tensor:
            where = (index.to(out.device), positions.to(out.device))
            return out.index_put(where, out[where] + delta.to(out))

        with frozen(lm.model):
            with trace(lm.model, [last], edit={lm.block_name(layer): add}) as seen:
                lm.forward(encoding)
            logits = lm.head(pick(seen.output[last], final)).float()
            tokens = first_answer_ids(lm, [f.pair for f in facts]).to(logits.device)
            said = logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()
            return torch.autograd.grad(said, delta)[0]


def _readout(lm: LM, facts: Sequence[Fact]) -> Tensor:
    """Rows of the head, times the final norm's gain, of the new object minus those of the old one, (n, m)."""
    head, norm = submodule(lm.model, lm.spec.head).weight.detach(), submodule(lm.model, lm.spec.norm)
    W = head.float() * norm.weight.detach().float().to(head.device)
    new = first_answer_ids(lm, [f.pair for f in facts]).cpu()
    if any(f.target_true is None for f in facts):
        encoding, final = find_positions(lm, [(f.prompt, f.subject) for f in facts], "last")
        with torch.no_grad():
            old = pick(lm.logits(encoding), final).argmax(-1)
    else:
        old = first_answer_ids(lm, [(f.text, marked(f.target_true, f.space)) for f in facts]).cpu()
    toward = W[new] - W[old.to(new.device)]
    same = toward.norm(dim=-1) == 0
    toward[same] = W[new[same]]  # both objects begin with one token: all that is known is the new one
    return toward
