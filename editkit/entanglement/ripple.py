"""What an edit moves: the shift of the logits at the answer position of every probe (clare.md 3.5, 3.6).

Each fact is edited alone, measured on all probes, and the saved weights are written back, bit for bit, before the
next one. Optimised targets are shared between the editors whose targets are the same by definition (MEMIT, PRUNE,
RECT, AlphaEdit at one last layer), so that editors differ by what they write, not by the optimiser's path.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..base.errors import ConfigError, RequestError
from ..base.progress import bar
from ..locate.contexts import ContextTemplates
from ..locate.target_rows import encode_targets
from ..locate.targets import TargetResult, optimize_targets
from ..methods import Editor
from ..methods.delta import Delta
from ..methods.weights.locate_then_edit import LocateEditor
from ..methods.weights.rome import ROME
from ..models.batching import by_length
from ..models.facts import Fact, validate_facts
from ..models.hooks import bypassed, entering, trace
from ..models.lm import LM
from .representations import check_facts

MEASURES: dict[str, str] = {
    "logit_l2": "l2 shift of the logits at the answer position (the paper's ripple)",
    "logit_l2_centered": "the same without the mean over the vocabulary, which no probability depends on",
    "kl": "KL(before || after) of the next-token distribution there",
    "delta_logp": "change of the log-probability of the recorded answer (all tokens, teacher-forced)",
    "delta_p": "change of its probability",
    "flip": "1 if the most likely next token changed",
    "hidden_l2": "l2 shift of the last block's output there",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model says to n probes. logits (n, V): at the answer position. hidden (n, m): last block's output there.
    logp (n,): log-probability of the recorded answer. known (n,): all its tokens are the most likely ones."""

    logits: Tensor
    hidden: Tensor
    logp: Tensor
    known: Tensor


class Watch:
    """Probes, encoded once, and what the model said to them when the watch was made.

    probes: facts; `target` is the recorded answer.
    first_layer: lowest layer that any edit will write to. What enters that block is kept, and later passes begin
    there. Raises RequestError for malformed or repeated probes.
    """

    def __init__(
        self, lm: LM, probes: Sequence[Fact], *, first_layer: int = 0, tokens_per_batch: int = 8192
    ) -> None:
        self.lm, self.probes = lm, check_facts(probes)
        self.first_layer = lm.check_layer(first_layer)
        rows = encode_targets(lm, self.probes, ContextTemplates(), token="last")
        self.batches = [(facts, *rows.take(facts)) for facts in by_length(rows.lengths, tokens_per_batch)]
        self.entries: list[Tensor] = []
        self.before = self.read()

    @torch.no_grad()
    def read(self) -> Reading:
        """Read all probes on the current weights; the first call keeps what enters the first layer."""
        lm = self.lm
        last, entry = lm.block_name(lm.n_layers - 1), lm.block_name(self.first_layer)
        first_time = not self.entries
        parts: list[tuple[list[int], Tensor, Tensor, Tensor, Tensor]] = []
        for k, (facts, encoding, _, places) in enumerate(self.batches):
            with ExitStack() as stack:
                if first_time:
                    start = stack.enter_context(trace(lm.model, [entry], inputs=True, outputs=False))
                else:
                    below = [lm.block_name(i) for i in range(self.first_layer)]
                    stack.enter_context(bypassed(lm.model, below, as_tuple=lm.spec.block_output == "tuple"))
                    stack.enter_context(entering(lm.model, entry, self.entries[k]))
                seen = stack.enter_context(trace(lm.model, [last], stop_early=True))
                lm.forward(encoding)
            if first_time:
                self.entries.append(start.input[entry])
            states = seen.output[last]
            fact, row, column, token = (x.to(states.device) for x in places.unbind(-1))
            h = states[row, column]
            logits = lm.head(h).float()
            said = log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0].double()
            logp = said.new_zeros(len(facts)).index_add(0, fact, said)
            wrong = said.new_zeros(len(facts)).index_add(0, fact, (logits.argmax(-1) != token).to(said))
            first = torch.cat([torch.ones_like(fact[:1], dtype=torch.bool), fact[1:] != fact[:-1]])
            parts.append((facts, logits[first], h[first].float(), logp, wrong == 0))
        back = torch.tensor([i for part in parts for i in part[0]]).argsort()
        return Reading(*(torch.cat([part[k].cpu() for part in parts])[back] for k in range(1, 5)))

    def shift(self) -> dict[str, np.ndarray]:
        """Every measure of MEASURES for the current weights against those of the start, each (n,) float64."""
        now, then = self.read(), self.before
        step = (now.logits - then.logits).double()
        p, q = log_softmax(then.logits.double(), -1), log_softmax(now.logits.double(), -1)
        found = {
            "logit_l2": step.norm(dim=-1),
            "logit_l2_centered": (step - step.mean(-1, keepdim=True)).norm(dim=-1),
            "kl": (p.exp() * (p - q)).sum(-1).clamp(min=0),
            "delta_logp": now.logp - then.logp,
            "delta_p": now.logp.exp() - then.logp.exp(),
            "flip": (now.logits.argmax(-1) != then.logits.argmax(-1)).double(),
            "hidden_l2": (now.hidden - then.hidden).double().norm(dim=-1),
        }
        return {name: value.numpy() for name, value in found.items()}


@dataclasses.dataclass(frozen=True)
class Ripple:
    """Ripples of n_e edits on n_p probes by one editor.

    measures: name -> (n_e, n_p) float64.   success: (n_e,) the edited prompt gives the new object (all tokens).
    known: (n_p,) the unedited model knew the probe.   seconds: per edit, without targets and measurement.
    """

    editor: str
    edits: list[Fact]
    probes: list[Fact]
    measures: dict[str, np.ndarray]
    success: np.ndarray
    known: np.ndarray
    seconds: float

    def __getitem__(self, measure: str) -> np.ndarray:
        return self.measures[measure]

    def to_frame(self) -> pd.DataFrame:
        """One row per (edit, probe): edit and probe (indices), success, known and all measures."""
        i, j = np.indices((len(self.edits), len(self.probes))).reshape(2, -1)
        frame = pd.DataFrame({"edit": i, "probe": j, "success": self.success[i], "known": self.known[j]})
        return frame.assign(**{name: value.reshape(-1) for name, value in self.measures.items()})


def check_pairs(edits: Sequence[Fact], probes: Sequence[Fact]) -> None:
    """Raise RequestError if an edited prompt is also a probe: two answers of one prompt are one fact to a model."""
    edited = {(f.prompt, f.subject): i for i, f in enumerate(edits)}
    for j, probe in enumerate(probes):
        i = edited.get((probe.prompt, probe.subject))
        if i is not None:
            raise RequestError(
                f"probe {j} asks what edit {i} writes, {probe.text!r}; "
                "drop every probe with an edited prompt and subject (several answers count as one pair)"
            )


def measure(
    editor: Editor, edits: Sequence[Fact], watch: Watch, *, keep: list[Delta] | None = None
) -> Ripple:
    """Edit each fact alone, read the probes, restore.

    editor: on the watched model, which must be as it was when the watch was made. keep: collects the deltas.
    The weights are restored after each edit, also after an error. Raises RequestError (edits, shared pairs),
    ConfigError for an editor of another model or one that carries edits.
    """
    edits = validate_facts(edits, allow_conflicts=True)
    check_pairs(edits, watch.probes)
    if editor.lm is not watch.lm:
        raise ConfigError("editor and watch belong to different models; make both on the same one")
    lowest = min((i for i in range(watch.lm.n_layers) for name in editor.parameter_names()
                  if name.startswith(watch.lm.block_name(i) + ".")), default=0)  # fmt: skip
    if lowest < watch.first_layer:
        raise ConfigError(
            f"{editor.name} writes to layer {lowest}, but the watch reads from layer {watch.first_layer} on; "
            "make the watch with a lower first_layer"
        )
    if editor.n_facts:
        raise ConfigError("this editor has written facts already; ripples are measured from restored weights")
    found: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    success, seconds = [], 0.0
    for fact in bar(edits, f"ripples of {editor.name}", unit="edit"):
        start = time.perf_counter()
        try:
            delta = editor.edit([fact])
            seconds += time.perf_counter() - start
            for name, value in watch.shift().items():
                found[name].append(value)
            success.append(bool(Watch(watch.lm, [fact]).before.known[0]))
        finally:
            editor.restore()
        if keep is not None:
            keep.append(delta)
    measures = {name: np.stack(rows) for name, rows in found.items()}
    known = watch.before.known.numpy()
    return Ripple(
        editor.name, list(edits), list(watch.probes), measures, np.array(success), known, seconds / len(edits)
    )


class SharedTargets:
    """Targets of facts, optimised in batches on the unedited model and given to several editors.

    `give(editor)` makes the editor write them. Editors whose targets are defined alike share one optimisation: block
    outputs at the same last layer (MEMIT family), or MLP outputs at the same layer (ROME), with the same options.
    """

    def __init__(self, lm: LM, facts: Sequence[Fact]) -> None:
        self.lm, self.facts = lm, list(facts)
        self._index = {f.key: i for i, f in enumerate(self.facts)}
        self._found: dict[tuple, TargetResult] = {}

    def of(self, editor: LocateEditor) -> TargetResult:
        """The targets that this editor's options define; columns in the order of the facts."""
        cfg, rome = editor.config, isinstance(editor, ROME)
        contexts = editor.templates()
        key = (cfg.layers[-1], cfg.token, repr(cfg.targets), contexts, rome)
        if key not in self._found:
            self._found[key] = optimize_targets(
                self.lm, self.facts, cfg.layers[-1], cfg.targets, contexts=contexts, token=cfg.token,
                module="mlp" if rome else "block",
            )  # fmt: skip
        return self._found[key]

    def give(self, editor: LocateEditor) -> LocateEditor:
        """The editor, writing the shared targets instead of optimising its own."""
        if not isinstance(editor, LocateEditor):
            raise ConfigError(f"{editor.name} optimises no targets; measure it without SharedTargets")
        found = self.of(editor)

        def pick(facts: Sequence[Fact]) -> list[int]:
            missing = [f.text for f in facts if f.key not in self._index]
            if missing:
                raise ConfigError(f"no shared target for {missing[0]!r}; pass the fact to SharedTargets")
            return [self._index[f.key] for f in facts]

        if isinstance(editor, ROME):

            def value(fact: Fact) -> TargetResult:
                i = pick([fact])
                return TargetResult(found.z[:, i], found.init[:, i], found.losses[i])

            editor.value = value
        else:
            editor.targets = lambda facts: found.z[:, pick(facts)]
        return editor

    def residuals(self, editor: LocateEditor) -> Tensor:
        """z - h (m, n) of the editor's targets: what the edit wants to add at its last layer."""
        found = self.of(editor)
        return found.z - found.init


def choose(
    edits: Sequence[Fact], pool: Sequence[Fact], n_probes: int, seed: int, *, avoid_subjects: bool = False
) -> list[Fact]:
    """n_probes facts of the pool at random, none of which shares prompt and subject (or subject) with an edit.

    One fact per prompt and subject at most. Raises RequestError if the pool is too small.
    """
    taken = {(f.prompt, f.subject) for f in edits}
    subjects = {f.subject for f in edits} if avoid_subjects else set()
    distinct: dict[tuple[str, str], Fact] = {}
    for fact in pool:
        if (fact.prompt, fact.subject) not in taken and fact.subject not in subjects:
            distinct.setdefault((fact.prompt, fact.subject), fact)
    usable = list(distinct.values())
    if len(usable) < n_probes:
        raise RequestError(f"the pool has {len(usable)} usable probes, {n_probes} asked for; ask for fewer")
    picks = np.random.default_rng([seed, 29]).choice(len(usable), n_probes, replace=False)
    return [usable[i] for i in picks]


def overview(measured: Mapping[str, Ripple], measure_name: str = "logit_l2") -> pd.DataFrame:
    """Editor, success rate, median and 95th percentile of a measure, share of flips, seconds per edit."""
    return pd.DataFrame([
        {"editor": name, "success": float(r.success.mean()), "median": float(np.median(r[measure_name])),
         "p95": float(np.quantile(r[measure_name], 0.95)), "flips": float(r["flip"].mean()),
         "seconds": r.seconds}
        for name, r in measured.items()
    ])  # fmt: skip
