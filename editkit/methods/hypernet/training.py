"""Training of hypernetworks: caching, shifts, meta loss on the edited model, two-phase update; checkpoints.

One step edits `n_edits` facts at once:

1. rows of the edit prompts on the unedited model (`cache`), taken into the normaliser,
2. the plan: one shift for every module (`Hypernetwork.plan`),
3. phase 1: with the shifts in the model, G_l = d(sum over batches of CE(paraphrases) + loc_coef * locality)/dW_l,
   asked about all facts or, with `n_probes`, about a random few: the same expectation, at a cost that does not
   grow with the number of edits,
4. phase 2: `plan.backward(G)`, clip to a norm, Adam.

What a step sees is a function of (seed, step), so a resumed training continues to the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ...base.config import Config, option
from ...base.errors import ConfigError, NumericsError
from ...base.progress import bar
from ...base.stored import read_stored, write_stored
from ...models.lm import LM
from .cache import RowFiles, RowMemory, check_memory, count_rows
from .data import (
    Draw,
    EditRecord,
    Pair,
    TupleBatch,
    answer_logits,
    cross_entropy,
    draw,
    encode_pairs,
    kl_divergence,
)
from .meta import Pass, mean, weight_gradients
from .network import Hypernetwork, Rows
from .prefix import StateMemory, entering
from .rledit import RLEdit, Walk
from .sites import edited

_FORMAT = "editkit-hypertraining-1"
Locality = Literal["kl", "cross_entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How a hypernetwork is trained."""

    n_edits: int = option(
        512, "facts edited at once in a step (RLEdit: in each batch)", source="data.n_edits", low=1
    )
    length: int = option(400, "RLEdit: batches of a sequence", source="num_seq", low=1)
    meta_lr: float = option(1e-5, "Adam's step size", source="editor.meta_lr", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", source="max_grad_norm", above=0)
    locality: Locality = option(  # noqa: RUF009
        "kl", "KL(before || after) on unrelated prompts, or cross entropy of their answers (HORSE as published)"
    )  # fmt: skip
    loc_coef: float = option(1.0, "weight of the locality loss; published HORSE: 1", source="loc_coef", low=0)
    batch_size: int = option(32, "rows of the language model", source="data.batch_size", low=1)
    n_probes: int | None = option(
        None,
        "edited facts of a step that its loss asks about, a random choice; None: all, as published",
        low=1,
    )
    seed: int = option(0, "seed of the draws", low=0)
    memory_limit: float | None = option(None, "bytes that rows may take; None: what is free", above=0)


@dataclasses.dataclass(frozen=True)
class StepLog:
    """One training step: mean losses over batches, norm of the gradient before clipping, seconds."""

    step: int
    generalization: float
    locality: float
    grad_norm: float
    seconds: float


class Trainer:
    """Trains one hypernetwork on one model.

    lm:      the unedited model; every step leaves its weights as they were, bit for bit.
    records: training facts (`data.records_of`), disjoint from what is evaluated (`data.disjoint`).
    config:  a `TrainConfig`, a mapping or None.
    folder:  keep the rows of a step in shards there; None keeps the rows of every fact in memory.
    """

    def __init__(
        self,
        lm: LM,
        net: Hypernetwork,
        records: Sequence[EditRecord],
        config: TrainConfig | dict[str, Any] | None = None,
        *,
        folder: str | os.PathLike | None = None,
    ) -> None:
        self.lm, self.net, self.records = lm, net, list(records)
        self.config = TrainConfig.make(config)
        net.check_model(lm)
        self.on_disk = folder is not None
        size = self.config.batch_size, net.config.tokens
        self.rows = (
            RowFiles(lm, net.sites, *size, folder=folder) if self.on_disk else RowMemory(lm, net.sites, *size)
        )
        self.optimizer = torch.optim.Adam(net.parameters(), lr=self.config.meta_lr)
        self.log: list[StepLog] = []
        self.states = None if self.on_disk else StateMemory(lm, net.sites)
        self._before: dict[Pair, Tensor] = {}
        self._model: str | None = None
        self._since = 0  # first step whose facts are in memory
        self._stale = False  # a checkpoint was loaded, its memory is not there yet
        if self.records:
            self._draw(0)  # refuses too few records before any work

    # --- running --------------------------------------------------------------------------------------------

    def train(self, steps: int) -> list[StepLog]:
        """Run that many more steps and return their logs. Raises ModelError if the model is another one."""
        self._check_unedited()
        for _ in bar(range(steps), f"training {self.net.name}", unit="step"):
            self.step()
        return self.log[-steps:]

    def step(self) -> StepLog:
        """One step (RLEdit: one sequence) with the facts drawn for it."""
        start, number = time.perf_counter(), len(self.log)
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.net, RLEdit):
            gen, loc = self.sequence([self._draw(number, t) for t in range(self.config.length)])
        else:
            seen = self._draw(number)
            self._check_memory(seen.edits)
            batches = [
                encode_pairs(self.lm, p, self.config.batch_size) for p in (seen.paraphrases, seen.unrelated)
            ]
            found = self.accumulate(self.rows.take(seen.edits), *batches)
            gen, loc = mean(found.generalization), mean(found.locality)
        norm = self.update()
        entry = StepLog(number, gen, loc, norm, time.perf_counter() - start)
        self.log.append(entry)
        return entry

    def accumulate(
        self, rows: Rows, paraphrases: Sequence[TupleBatch], unrelated: Sequence[TupleBatch]
    ) -> Pass:
        """Both phases for one batch of edits; the network's gradients are added up in `.grad`."""
        self.net.observe(rows)
        plan = self.net.plan(rows)
        losses = [(1.0, self._entered(cross_entropy, b)) for b in paraphrases]
        losses += self._locality(unrelated)
        with edited(self.lm, self.net.sites, plan.shifts):
            grads, values = weight_gradients(self.lm, self.net, losses)
        plan.backward(grads)
        return Pass(plan, grads, values[: len(paraphrases)], values[len(paraphrases) :])

    def sequence(self, draws: Sequence[Draw]) -> tuple[float, float]:
        """RLEdit's step: a sequence of batches whose shifts stay in the model until its end."""
        size, tokens = self.config.batch_size, self.net.config.tokens
        memory = RowMemory(self.lm, self.net.sites, size, tokens)
        asked = [
            (encode_pairs(self.lm, d.paraphrases, size), encode_pairs(self.lm, d.unrelated, size))
            for d in draws
        ]
        gen, loc = [], []
        with Walk(self, asked) as walk:
            for seen in draws:
                memory.clear()
                found = walk.batch(memory.take(seen.edits))
                gen.append(mean(found.generalization[: len(asked[len(gen)][0])]))
                loc.append(mean(found.locality))
        return mean(gen), mean(loc)

    def clip(self) -> float:
        """Clip the gradients; returns their norm before it."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.max_grad_norm))
        if norm != norm or norm == float("inf"):
            raise NumericsError(f"the gradient of the hypernetwork is {norm}; lower lr or raise the ridge")
        return norm

    def update(self) -> float:
        """Clip the gradients, step Adam; returns the norm before clipping."""
        norm = self.clip()
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def validate(self, records: Sequence[EditRecord], seed: int = 0) -> dict[str, float]:
        """Token accuracy on held-out facts edited at once: edit, paraphrase, unrelated (teacher-forced).

        Neither the normaliser nor the network changes.
        """
        seen = draw(records, len({r.edit[0] for r in records}), seed, 0)
        size = self.config.batch_size
        self._check_memory(seen.edits)
        rows = RowMemory(self.lm, self.net.sites, size, self.net.config.tokens).take(seen.edits)
        out = {}
        with edited(self.lm, self.net.sites, self.net.plan(rows).shifts):
            for name in ("edits", "paraphrases", "unrelated"):
                batches = encode_pairs(self.lm, getattr(seen, name), size)
                hits = [
                    (answer_logits(self.lm, b).argmax(-1).to(b.targets) == b.targets).float() for b in batches
                ]
                out[name] = float(torch.cat(hits).mean())
        return out

    # --- helpers --------------------------------------------------------------------------------------------

    def _draw(self, step: int, batch: int = 0) -> Draw:
        cfg = self.config
        return draw(self.records, cfg.n_edits, cfg.seed, step * cfg.length + batch, cfg.n_probes)

    def _entered(self, loss: Callable[..., Tensor], batch: TupleBatch, *more: Tensor) -> Callable[[], Tensor]:
        """A loss of the edited model that starts, where they are known, from the states below the edits."""
        states = self.states.take(batch) if self.states is not None else None
        if states is None:
            return lambda: loss(self.lm, batch, *more)

        def start_above() -> Tensor:
            with entering(self.lm, self.states.block, states):
                return loss(self.lm, batch, *more)

        return start_above

    def _locality(self, batches: Sequence[TupleBatch]) -> list:
        """(weight, loss) of each batch; for KL the unedited model is read now, or was when the pair came first."""
        weight = self.config.loc_coef
        if not weight:
            return []
        if self.config.locality == "cross_entropy":
            return [(weight, self._entered(cross_entropy, b)) for b in batches]
        before = [self._unedited(batch) for batch in batches]
        pairs = zip(batches, before, strict=True)
        return [(weight, self._entered(kl_divergence, b, x)) for b, x in pairs]

    @torch.no_grad()
    def _unedited(self, batch: TupleBatch) -> Tensor:
        """(answer tokens, vocabulary) log-probabilities; remembered by pair when rows are kept in memory."""
        if not batch.pairs or any(p not in self._before for p in batch.pairs):
            found = log_softmax(self._entered(answer_logits, batch)(), -1)
            if self.on_disk or not batch.pairs:
                return found
            parts = found.split(batch.asked.sum(-1).tolist())
            self._before.update((pair, part.clone()) for pair, part in zip(batch.pairs, parts, strict=True))
        return torch.cat([self._before[p] for p in batch.pairs])

    def _check_memory(self, pairs: Sequence[Pair]) -> None:
        rows = count_rows(encode_pairs(self.lm, pairs, self.config.batch_size), self.net.config.tokens)
        check_memory(len(pairs), rows, self.net.sites, self.config.memory_limit, self.on_disk)

    def _check_unedited(self) -> None:
        """Forget cached rows when the model has changed since they were taken."""
        self.net.check_model(self.lm)
        now = self.lm.fingerprint()
        if now == self._model and not self._stale:
            return
        self.forget()
        if not self._stale or now != self._model:
            self._since = len(self.log)
        for step in range(self._since, len(self.log)):
            self.remember(step)
        self._model, self._stale = now, False

    def forget(self) -> None:
        """Empty the memory of rows, states and unedited answers."""
        self.rows.clear()
        self._before.clear()
        if self.states is not None:
            self.states.clear()

    def held(self) -> int:
        """Bytes that rows, states and unedited answers take in memory (0 for rows on disk)."""
        kept = list(self._before.values())
        if not self.on_disk:
            kept += self.rows.tensors() + self.states.tensors()
        return sum(t.numel() * t.element_size() for t in kept)

    def remember(self, step: int) -> None:
        """Read the facts of a step into memory, in the batches of that step: a row's last bits depend on them."""
        if self.on_disk:
            return
        sequence, size = isinstance(self.net, RLEdit), self.config.batch_size
        draws = [self._draw(step, t) for t in range(self.config.length if sequence else 1)]
        paraphrases = [b for d in draws for b in encode_pairs(self.lm, d.paraphrases, size)]
        unrelated = [b for d in draws for b in encode_pairs(self.lm, d.unrelated, size)]
        if sequence:
            self._locality(unrelated)
        else:
            self.rows.take(draws[0].edits)
        for batch in paraphrases:
            self._entered(cross_entropy, batch)
        if not sequence:
            self._locality(unrelated)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write network, normaliser, Adam's state and the log, so that `load` continues to the same bits."""
        tensors = {f"net:{k}": v for k, v in self.net.state_dict().items()}
        for k, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam:{k}:{name}": torch.as_tensor(v) for name, v in state.items()}
        meta = {
            "net": self.net.describe(), "config": self.config.to_dict(),
            "log": [dataclasses.astuple(entry) for entry in self.log], "since": self._since, "model": self._model,
        }  # fmt: skip
        return write_stored(path, tensors, meta, form=_FORMAT, key="training")

    def load(self, path: str | os.PathLike) -> None:
        """Continue a saved training. Raises DataError for another kind of file, ConfigError if method, options
        or model differ.
        """
        meta, tensors = read_stored(
            path, form=_FORMAT, key="training", what="a training checkpoint", saver="Trainer.save"
        )
        mine = {**self.net.describe(), **self.config.to_dict()}
        other = {**meta["net"], **meta["config"]}
        differ = [
            k for k in mine if json.dumps(mine[k], sort_keys=True) != json.dumps(other.get(k), sort_keys=True)
        ]
        if differ:
            raise ConfigError(
                f"the checkpoint was made with another {', '.join(differ)}; make network and trainer as then, "
                "on the same model"
            )
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam:"):
                _, k, name = key.split(":")
                state.setdefault(int(k), {})[name] = value
        self.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net:")})
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.log = [StepLog(*entry) for entry in meta["log"]]
        self._since, self._model, self._stale = meta["since"], meta["model"], True
