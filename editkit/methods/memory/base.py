"""What all memory editors share: a memory beside frozen weights, attached to the model by hooks.

A memory editor never changes a parameter. `edit(facts)` changes what it remembers and attaches it, so that plain
calls of `lm.model(...)`, batches and `lm.model.generate()` use it; `detach()` gives back the model as it was,
`restore()` also forgets. Life cycle, checks and files are those of the weight editors (`editors.base.Editor`).

A new memory provides `modules`, `route`, `read` and `write_facts`, and its state in `memory` / `load_memory` /
`reset_memory`:

    at the prompts (prefill)   route(x, out, state)  -> what to read, kept in state.route
    at every pass              read(x, out, state)   -> the module's new output, or None to leave it alone

Which tokens are prompt, and which pass is a decoding step, is worked out in `prompts.PromptReader`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...base.config import Config
from ...base.errors import ConfigError, DataError, ModelError, RequestError
from ...base.stored import read_stored, refuse_other_options, write_stored
from ...locate.contexts import ContextTemplates, generate
from ...models.facts import Fact, validate_facts
from ...models.hooks import check_gradients, frozen, hidden, submodule, with_hidden
from ...models.lm import LM
from ...models.prompts import PromptReader, PromptState, readers
from ..base import EDITORS, Record
from ..delta import describe_facts

_FORMAT = "editkit-memory-1"
_BACKGROUND = (100, 12)  # texts and their tokens, when the caller gives none


@dataclasses.dataclass(frozen=True)
class MemoryEdit:
    """What one call of `edit` did. The memory itself is saved as a whole, by `MemoryEditor.save`.

    editor, config: name and options.   facts: the edit requests (case_id, prompt, subject, target).
    base: sha256 of the model beside which the memory lives.   metadata: JSON-able details (losses, steps, ...).
    """

    editor: str
    config: dict[str, Any]
    facts: list[dict[str, str]]
    base: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class MemoryEditor(ABC):
    """Base of the editors that keep their edits beside the model.

    lm:         the model; its parameters are never changed.
    config:     an instance of the class's `Config`, a mapping, or None for the defaults.
    contexts:   context templates; None lets the editor make its own at its first edit, if it needs any.
    background: texts that have nothing to do with the edits (mean features of MEMOIR, irrelevant prompts of
                WISE); None: the unedited model writes some, see `background_texts`.
    statistics: accepted so that all editors are made alike; memories need none.
    record:     called as record(name, tensor) with intermediate results (conformance, plots).

    Raises ConfigError or ModelError before any work if something does not fit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]

    def __init__(
        self,
        lm: LM,
        config: Config | Mapping[str, Any] | None = None,
        *,
        statistics: Mapping[int, Any] | None = None,
        contexts: ContextTemplates | Sequence | None = None,
        background: Sequence[str] | None = None,
        record: Record | None = None,
    ) -> None:
        self.lm = lm
        self.config = self.Config.make(config)
        self.record: Record = record or (lambda name, value: None)
        self.contexts = None if contexts is None else ContextTemplates.of(contexts)
        self.background = _check_background(background)
        self._reader: PromptReader | None = None
        self._handles: list[Any] = []
        self._start: str | None = None  # the model the first edit was made beside
        self.n_facts = 0
        self.check()
        self.reset_memory()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lm.name!r}, {self.n_facts} facts, {self.config})"

    # --- what a method provides -----------------------------------------------------------------------------

    @abstractmethod
    def modules(self) -> list[str]:
        """Paths of the modules whose output the memory may replace; `route` is asked at the first of them."""

    @abstractmethod
    def route(self, x: Tensor, out: Tensor, state: PromptState) -> Any:
        """Decide by the prompts what to read.

        x (b, t, width in), out (b, t, width out): input and output of the first module; `state.mean(x)` and
        `state.at_last(x)` look at the prompts' tokens only. The result is in `state.route` for `read`, at this
        pass and at the decoding steps that follow it; row i of the batch must depend on row i only.
        """

    @abstractmethod
    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        """The new output of module `name` (b, t, width out), or None to leave it as it is, bit for bit."""

    @abstractmethod
    def write_facts(self, facts: list[Fact]) -> dict[str, Any] | None:
        """Remember the facts. The model is unedited (the memory is detached), its gradients are off.

        May return JSON-able details for `MemoryEdit.metadata`. If it raises, the memory is put back.
        """

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything remembered: JSON-able values and tensors (the tensors themselves, not copies)."""
        return {}, {}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:  # noqa: B027
        """Inverse of `memory`; the tensors may be kept and are on the CPU."""

    def reset_memory(self) -> None:  # noqa: B027
        """Forget everything."""

    def check(self) -> None:  # noqa: B027
        """Raise an EditkitError if config and model do not fit."""

    # --- what a user calls ----------------------------------------------------------------------------------

    def edit(self, facts: Fact | Iterable[Fact]) -> MemoryEdit:
        """Remember facts, one after the other or as a batch, as the method does; the memory is then attached.

        If the edit fails, the memory is as before. Raises RequestError for malformed, duplicate or
        contradictory facts, ModelError if the base model has changed since the first edit.
        """
        check_gradients(self.lm.model)
        facts = validate_facts(facts)
        base = self._check_base()
        was_attached = self.is_attached
        self.detach()
        self._check_alone()
        values, tensors = self.memory()
        before = json.dumps(values), {k: v.detach().clone() for k, v in tensors.items()}
        n_before, contexts = self.n_facts, self.contexts
        try:
            with frozen(self.lm.model):
                metadata = self.write_facts(facts) or {}
        except BaseException:
            self.reset_memory()
            if n_before:
                self.load_memory(json.loads(before[0]), before[1])
            self.contexts = contexts
            if was_attached:
                self.attach()
            raise
        self._start = base
        self.n_facts += len(facts)
        self.attach()
        return MemoryEdit(self.name, self.config.to_dict(), describe_facts(facts), base, metadata)

    def attach(self) -> None:
        """Hook the memory onto the model. Nothing happens if it is attached already.

        Raises ModelError if another memory is attached or the base model is not that of the edits.
        """
        if self.is_attached:
            return
        self._check_base()
        self._check_alone()
        self._reader = PromptReader(self.lm)
        names = self.modules()
        for name in names:
            module = submodule(self.lm.model, name)
            self._handles.append(module.register_forward_hook(self._hook(name, name == names[0])))

    def detach(self) -> None:
        """Take the memory off the model, which then has no trace of it. The memory stays."""
        if self._reader is not None:
            self._reader.remove()
        for handle in self._handles:
            handle.remove()
        self._reader, self._handles = None, []

    @property
    def is_attached(self) -> bool:
        """Whether the model uses the memory now."""
        return self._reader is not None

    @contextmanager
    def attached(self) -> Iterator[LM]:
        """`with editor.attached():` uses the memory inside; afterwards it is as it was found."""
        before = self.is_attached
        self.attach()
        try:
            yield self.lm
        finally:
            if not before:
                self.detach()

    @contextmanager
    def detached(self) -> Iterator[LM]:
        """`with editor.detached():` has the unedited model inside; afterwards it is as it was found."""
        before = self.is_attached
        self.detach()
        try:
            yield self.lm
        finally:
            if before:
                self.attach()

    def restore(self) -> None:
        """Detach and forget all edits."""
        self.detach()
        self.reset_memory()
        self.n_facts, self._start = 0, None

    @property
    def n_bytes(self) -> int:
        """Size of the memory's tensors."""
        return sum(v.numel() * v.element_size() for v in self.memory()[1].values())

    # --- files ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the memory's tensors, on the CPU."""
        return {k: v.detach().cpu().contiguous().clone() for k, v in self.memory()[1].items()}

    def save(self, path: str | os.PathLike) -> Path:
        """Write the memory as one safetensors file, so that `load` continues the stream to the same bits."""
        meta = {
            "editor": self.name, "config": self.config.to_dict(), "base": self._start or self._fingerprint(),
            "n_facts": self.n_facts, "values": self.memory()[0],
            "contexts": None if self.contexts is None else self.contexts.groups,
        }  # fmt: skip
        return write_stored(path, self.state_dict(), meta, form=_FORMAT, key="editor")

    def load(self, path: str | os.PathLike) -> None:
        """Take over a saved memory, in place of what is remembered now, and attach it.

        Raises DataError for a file of another kind, ConfigError if editor or options differ, ModelError if
        the memory belongs to another model.
        """
        meta, tensors = _read_file(path)
        refuse_other_options("memory", self.name, self.config.to_dict(), meta["editor"], meta["config"])
        contexts = None if meta["contexts"] is None else ContextTemplates.of(meta["contexts"])
        if self.contexts is not None and contexts is not None and self.contexts != contexts:
            raise ConfigError("the saved memory used other context templates; pass the same, or none")
        if meta["base"] != self._fingerprint():
            raise ModelError(
                f"the saved memory belongs to another model than {self.lm.name}, or the weights have been "
                "edited; load the model the memory was made beside"
            )
        self.restore()
        self.contexts = contexts or self.contexts
        self.n_facts = int(meta["n_facts"])
        if self.n_facts:
            self.load_memory(meta["values"], tensors)
            self._start = meta["base"]
        self.attach()

    # --- for methods ----------------------------------------------------------------------------------------

    def background_texts(self, seed: int = 0) -> list[str]:
        """The texts given as `background`, or sampled from the unedited model with a seed.

        Sampling starts with one token each, drawn from the vocabulary without special tokens.
        """
        if self.background is not None:
            return self.background
        n, length = _BACKGROUND
        generator = torch.Generator().manual_seed(seed)
        tokenizer = self.lm.tokenizer
        words = [t for i in range(len(tokenizer)) if (t := tokenizer.decode([i]).strip()).isalpha()]
        if not words:
            raise ConfigError(f"the tokenizer of {self.lm.name} has no words; pass background=texts")
        drawn = torch.randint(len(words), (n,), generator=generator).tolist()
        return generate(self.lm, [words[i] for i in drawn], length, generator, top_k=20)

    def _hook(self, name: str, first: bool) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, output: object) -> object | None:
            state = self._reader.state
            if state is None:
                raise ModelError(
                    f"{name} was called outside a forward pass of the model; call lm.model(...), "
                    "or detach the memory first"
                )
            x, out = args[0], hidden(output)
            if first and state.prefill:
                state.route = self.route(x, out, state)
            new = self.read(name, x, out, state)
            return None if new is None else with_hidden(output, new)

        return hook

    def _check_alone(self) -> None:
        others = [r for r in readers(self.lm) if r is not self._reader]
        if others:
            raise ModelError(f"another memory is attached to {self.lm.name}; detach() or restore() it first")

    def _check_base(self) -> str:
        """Fingerprint of the model; raises ModelError if the edits were made beside another one."""
        base = self._fingerprint()
        if self._start is not None and base != self._start:
            raise ModelError(
                f"the weights of {self.lm.name} have changed since this memory's first edit; "
                "put them back, or call restore() to start anew"
            )
        return base

    def _fingerprint(self) -> str:
        """Hash of the model beside the memory."""
        return self.lm.fingerprint()


def open_memory(path: str | os.PathLike, lm: LM) -> MemoryEditor:
    """A saved memory with the editor and the options it was made with, attached to `lm`.

    Raises DataError for a file of another kind, ModelError for another model.
    """
    meta, _ = _read_file(path)
    cls = EDITORS.get(meta["editor"])
    if cls is None or not issubclass(cls, MemoryEditor):
        raise DataError(f"{path} was made by the editor {meta['editor']!r}, which is not registered here")
    editor = cls(lm, meta["config"])
    editor.load(path)
    return editor


def _read_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_stored(
        path, form=_FORMAT, key="editor", what="a memory saved by editkit", saver="MemoryEditor.save"
    )


def _check_background(texts: Sequence[str] | None) -> list[str] | None:
    if texts is None:
        return None
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise RequestError(
            "background must be a list of non-empty texts that have nothing to do with the edits"
        )
    return list(texts)
