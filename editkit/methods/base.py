"""What all weight editors share: life cycle, checks, masters, saved state, and the registry.

An editor belongs to one model. `edit(facts)` changes the model and returns the change as a `Delta`; a later
`edit` continues from there; `restore()` puts the model back to where the editor's first edit found it.
Everything an editor remembers (history of keys, contexts, float32 masters) lives in the instance and is saved
by `save`.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.config import Config, check_known
from ..base.device import with_room
from ..base.errors import ConfigError, ModelError, NumericsError
from ..base.stored import read_stored, refuse_other_options, write_stored
from ..locate.contexts import ContextTemplates
from ..locate.moments import Covariance
from ..models.capacity import memory_plan
from ..models.facts import Fact, validate_facts
from ..models.hooks import check_gradients
from ..models.lm import LM
from ..models.prompts import check_unread
from .delta import Delta, carries, cast_loss, describe_facts, snapshot

_FORMAT = "editkit-editor-1"
Record = Callable[[str, Tensor], None]


class Editor(ABC):
    """Base of the editors that change weights.

    lm:         the model; changed in place by `edit`.
    config:     an instance of the class's `Config`, a mapping, or None for the defaults; unknown keys are
                refused.
    statistics: layer -> second moment of the keys (`statistics.second_moment`), for methods that need it.
    contexts:   context templates; None lets the editor sample them from the model at its first edit.
    cache_dir:  folder in which targets are kept and found again, also by other methods; None keeps none.
    record:     called as record(name, tensor) with intermediate results (conformance, plots).
    force:      use statistics (or a hypernetwork) of another model all the same; the difference becomes a warning.

    Raises ConfigError, ModelError or NumericsError before any work if something does not fit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]

    def __init__(
        self,
        lm: LM,
        config: Config | Mapping[str, Any] | None = None,
        *,
        statistics: Mapping[int, Covariance | Tensor] | None = None,
        contexts: ContextTemplates | Sequence | None = None,
        record: Record | None = None,
        cache_dir: str | os.PathLike | None = None,
        force: bool = False,
    ) -> None:
        self.lm, self.force = lm, force
        self.cache_dir = cache_dir
        self.config = self.Config.make(config)
        self.record: Record = record or (lambda name, value: None)
        self.statistics = {
            layer: C if isinstance(C, Covariance) else Covariance.from_array(C)
            for layer, C in (statistics or {}).items()
        }
        self.contexts = None if contexts is None else ContextTemplates.of(contexts)
        self._places: dict[int, torch.device] = {}
        self._trusted: set[int] = set()
        self._reset()
        self.check()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lm.name!r}, {self.config})"

    # --- what a method provides -----------------------------------------------------------------------------

    @abstractmethod
    def parameter_names(self) -> list[str]:
        """Names of all parameters that `edit` may change."""

    @abstractmethod
    def write_facts(self, facts: list[Fact]) -> dict[str, Any] | None:
        """Change the model so that it states the facts; may return JSON-able details for `Delta.metadata`."""

    @property
    def remembers(self) -> bool:
        """Whether earlier edits leave a history in the instance that later ones depend on."""
        return False

    def check(self) -> None:  # noqa: B027
        """Raise an EditkitError if config, statistics and model do not fit."""

    def reset_history(self) -> None:  # noqa: B027
        """Forget what earlier edits left in the instance."""

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What has to be saved to continue a stream: JSON-able values and tensors."""
        return {}, {}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:  # noqa: B027
        """Inverse of `history`."""

    # --- what a user calls ----------------------------------------------------------------------------------

    def edit(self, facts: Fact | Iterable[Fact]) -> Delta:
        """Write a batch of facts (one fact, or any iterable) into the model and return the change.

        The model keeps the edit; `restore()`, or `delta.restore(lm)` for the last edit only, takes it back.
        If the edit fails, the weights are as before.

        Raises RequestError for malformed, duplicate or contradictory facts.
        """
        check_gradients(self.lm.model)
        check_unread(self.lm, f"editing weights with {self.name}")
        facts = validate_facts(facts)
        if self._broken:
            raise ConfigError(
                "the last edit of this editor was interrupted and its history is incomplete; "
                "call restore(), or load() the state saved before it"
            )
        if self.remembers and self._last and not carries(self.lm, self._last):
            raise ModelError(
                f"the weights of {self.lm.name} have changed since this editor's last edit, so its history "
                "does not describe them; apply that edit again (delta.apply), or call restore() to start anew"
            )
        names, base = self.parameter_names(), self._fingerprint()  # the hash before any work: it may refuse
        before = {name: value.cpu() for name, value in snapshot(self.lm, names).items()}
        self.lm.remember(names)
        self._check_masters()
        masters = dict(self._masters)
        try:
            metadata = self.write_facts(facts) or {}
        except BaseException:
            self.lm.write(before)
            self._masters = masters
            self._broken = self._broken and self.remembers
            raise
        self._broken = False
        if self._start is None:
            self._start = before
        self.n_facts += len(facts)
        after = {name: value.cpu() for name, value in snapshot(self.lm, names).items()}
        after |= {name: value.cpu().clone() for name, value in self._masters.items()}
        loss = {
            name: cast_loss(before[name], after[name], before[name].dtype)
            for name in names
            if after[name].dtype != before[name].dtype
        }
        if loss:
            metadata = {**metadata, "cast_loss": loss}
        self._last = after
        config = self.config.to_dict()
        return Delta(before, after, self.name, config, describe_facts(facts), base, metadata)

    def restore(self, *, force: bool = False) -> None:
        """Put the weights back to what they were before this editor's first edit, bit for bit, and forget.

        Raises ModelError if they have changed since its last edit (unless `force`): putting them back would wipe
        what others wrote, and their restore would bring back half of it.
        """
        if self._start is not None and not carries(self.lm, self._start):
            if not force and not carries(self.lm, self._last):
                raise ModelError(
                    f"the weights of {self.lm.name} have changed since this {self.name} editor's last edit; restore "
                    "the later edits first (newest first), or overwrite them: restore(force=True)"
                )
            self.lm.write(self._start)
        self._reset()

    def save(self, path: str | os.PathLike) -> Path:
        """Write weights, masters and history, so that `load` continues the stream to the same bits."""
        names = self.parameter_names()
        values, tensors = self.history()
        tensors = {f"history:{k}": v for k, v in tensors.items()}
        tensors |= {f"start:{k}": v for k, v in (self._start or snapshot(self.lm, names)).items()}
        tensors |= {f"now:{k}": v for k, v in snapshot(self.lm, names).items()}
        tensors |= {f"master:{k}": v for k, v in self._masters.items()}
        meta = {
            "editor": self.name, "config": self.config.to_dict(), "base": self._fingerprint(),
            "n_facts": self.n_facts, "history": values,
            "contexts": None if self.contexts is None else self.contexts.groups,
            "statistics": {str(layer): moment.identity for layer, moment in self.statistics.items()},
        }  # fmt: skip
        return write_stored(path, tensors, meta, form=_FORMAT, key="editor")

    def load(self, path: str | os.PathLike) -> None:
        """Continue a saved stream: takes over history and contexts and writes the saved weights into the
        model.

        Raises DataError for a file of another kind, ConfigError if editor or options differ, ModelError if
        the stream belongs to another model.
        """
        meta, tensors = read_stored(
            path, form=_FORMAT, key="editor", what="the state of an editor", saver="Editor.save"
        )
        refuse_other_options("stream", self.name, self.config.to_dict(), meta["editor"], meta["config"])
        contexts = None if meta["contexts"] is None else ContextTemplates.of(meta["contexts"])
        if self.contexts is not None and contexts is not None and self.contexts != contexts:
            raise ConfigError("the saved stream used other context templates; pass the same, or none")
        parts: dict[str, dict[str, Tensor]] = {"history": {}, "start": {}, "now": {}, "master": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(":")
            parts[part][name] = value
        # The edited parameters may be anywhere on the stream's way; everything else has to be the same model.
        if meta["base"] != self._fingerprint() or not (
            carries(self.lm, parts["start"]) or carries(self.lm, parts["now"])
        ):
            raise ModelError(
                f"the saved history belongs to another model than {self.lm.name}, or the model carries other "
                "edits; load the model the stream was started on"
            )
        saved = meta.get("statistics", {})
        differ = [i for i, c in self.statistics.items() if saved.get(str(i), c.identity) != c.identity]
        self._refuse_unless_forced(
            "the saved stream used other second moments", [f"that of layer {i} differs" for i in differ],
            "pass the same statistics (model, texts, number of tokens)",
        )  # fmt: skip
        self._reset()
        self.contexts = contexts or self.contexts
        self.load_history(meta["history"], parts["history"])
        self.lm.write(parts["now"])
        self._masters = {k: v.to(self.lm.parameter(k).device) for k, v in parts["master"].items()}
        self.n_facts = int(meta["n_facts"])
        if self.n_facts:
            self._start, self._last = parts["start"], {**parts["now"], **parts["master"]}

    # --- for methods ----------------------------------------------------------------------------------------

    def matrix(self, layer: int) -> Tensor:
        """W (m, d), float64, of a down projection: from the float32 master where the model stores less."""
        master = self._masters.get(self.lm.weight_name(layer))
        if master is None:
            return self.lm.get_matrix(layer)
        return self.lm.to_matrix(master).to(torch.float64).contiguous()

    def set_matrix(self, layer: int, W: Tensor) -> None:
        """Write W (m, d), cast once; models below float32 keep a float32 master in the editor."""
        self._broken = True  # until `edit` has come to its end
        name, weight = self.lm.weight_name(layer), self.lm.weight(layer)
        self.lm.set_matrix(layer, W)
        if torch.promote_types(weight.dtype, torch.float32) != weight.dtype:
            self._masters[name] = self.lm.to_matrix(W).to(weight.device, torch.float32)

    def solve_device(self, layer: int) -> torch.device:
        """Where the layer's system is solved and its history kept: on its own device if all that the plan asks
        for beside the weights fits there, else on the host. Decided once, so that a history stays where it is.
        """
        if layer not in self._places:
            cfg = self.config
            tokens = getattr(cfg, "z_tokens_per_batch", 8192)
            plan = memory_plan(self.lm, getattr(cfg, "layers", (layer,)), self.lm.dtype, self.name, tokens)
            self._places[layer] = with_room(self.lm.device(layer), plan.beside)
        return self._places[layer]

    def second_moment(self, layer: int) -> Tensor:
        """C0 (d, d), float64, where the layer is solved. Raises ConfigError if missing, NumericsError if
        unusable, ModelError if it is that of another model or layer (unless `force`).
        """
        found = self.statistics.get(layer)
        if found is None:
            raise ConfigError(
                f"{self.name} needs the second moment of layer {layer}; pass "
                "statistics=editkit.locate.moments.second_moment(lm, layers, texts)"
            )
        d = self.lm.weight_shape(layer)[1]
        if found.C.shape[0] != d:
            raise NumericsError(
                f"the second moment of layer {layer} is {tuple(found.C.shape)}, its keys have width {d}; "
                "use the statistics of this model and layer"
            )
        if layer not in self._trusted:
            self._check_moment(layer, found)
            self._trusted.add(layer)
        return found.C.to(self.solve_device(layer))

    def _check_moment(self, layer: int, found: Covariance) -> None:
        differ = found.differences(self.lm, layer)
        for other, moment in self.statistics.items():
            a, b = ((c.provenance.get("texts"), c.n) for c in (found, moment))
            if a[0] and b[0] and a != b:
                differ.append(f"its texts are not those of layer {other} (n = {a[1]} and {b[1]} tokens)")
        self._refuse_unless_forced(
            f"the second moment of layer {layer} is not one of {self.lm.name}", differ, "compute it for this model: "
            "editkit.locate.moments.second_moment(lm, layers, texts)",
        )  # fmt: skip

    def _refuse_unless_forced(self, what: str, differ: list[str], fix: str) -> None:
        """Raise ModelError that names the differences, or, under `force`, warn of them."""
        if differ and not self.force:
            raise ModelError(f"{what}: {'; '.join(differ)}; {fix}, or use it all the same: force=True")
        if differ:
            warnings.warn(f"{what}: {'; '.join(differ)}", stacklevel=4)

    def _reset(self) -> None:
        self._masters: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] | None = None  # weights as the last edit left them
        self._broken = False
        self.n_facts = 0
        self.reset_history()

    def _check_masters(self) -> None:
        """Drop masters whose rounding is not in the model any more: somebody has replaced the weights."""
        for name in [n for n, v in self._masters.items() if not carries(self.lm, {n: v})]:
            del self._masters[name]

    def _fingerprint(self) -> str:
        """Hash of the model without the edited parameters."""
        return self.lm.fingerprint(exclude=self.parameter_names())


EDITORS: dict[str, type] = {}


def register(cls: type) -> type:
    """Class decorator: make an editor (of weights, or a memory beside them) available to `make_editor` under
    its `name`.
    """
    known = EDITORS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ConfigError(f"two editors are called {cls.name!r}: {known.__qualname__} and {cls.__qualname__}")
    EDITORS[cls.name] = cls
    return cls


def make_editor(
    name: str,
    lm: LM,
    *,
    statistics: Mapping[int, Covariance | Tensor] | None = None,
    contexts: ContextTemplates | Sequence | None = None,
    background: Sequence[str] | None = None,
    record: Record | None = None,
    preset: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force: bool = False,
    **config: Any,
):
    """An `Editor` or `memory.MemoryEditor` by its registered name; `config` are its options.

    background: texts unrelated to the edits, for memories.   preset: published options of a model (`presets`), by
    name or "auto" for the one of this model's shape; what `config` gives comes on top.   cache_dir: folder for the
    targets of locate-then-edit methods, which share them there.   force: use statistics or a hypernetwork of another
    model, with a warning.
    Raises ConfigError for unknown names and options, and for a preset of another model.
    """
    check_known([name], sorted(EDITORS), "editor")
    if preset is not None:
        from .presets import options_for

        config = {**options_for(lm, name, preset), **config}
    cls = EDITORS[name]
    if background is not None and issubclass(cls, Editor):
        raise ConfigError(f"{name} changes weights and takes no background texts; pass statistics=...")
    if force and not issubclass(cls, Editor):
        raise ConfigError(f"{name} uses no statistics and no hypernetwork, so there is nothing to force")
    more: dict[str, Any] = {} if background is None else {"background": background}
    if issubclass(cls, Editor):
        more |= {"cache_dir": cache_dir, "force": force}
    return cls(lm, config, statistics=statistics, contexts=contexts, record=record, **more)
