"""An edit as an object: which parameters changed, from what to what, on which model, for which facts."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ConfigError, ModelError
from ..base.paths import to_folder
from ..base.stored import read_stored, write_stored
from ..models.facts import Fact
from ..models.lm import LM

_FORMAT = "editkit-delta-1"
_FACT_FIELDS = ("case_id", "prompt", "subject", "target")


def snapshot(lm: LM, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of parameters by name, in their stored dtype and orientation."""
    return {name: lm.parameter(name).detach().clone() for name in names}


def carries(lm: LM, values: Mapping[str, Tensor]) -> bool:
    """Whether the model's parameters are these values, bit for bit after the cast to the stored dtype."""
    for name, value in values.items():
        stored = lm.parameter(name).detach()
        if stored.shape != value.shape or not torch.equal(stored, value.to(stored)):
            return False
    return True


def cast_loss(before: Tensor, after: Tensor, dtype: torch.dtype) -> float:
    """Share of an update that storing it in `dtype` loses: ||cast(after) - after|| / ||after - before||."""
    after, before = after.double(), before.double()
    size = float((after - before).norm())
    return float((after.to(dtype).double() - after).norm()) / size if size else 0.0


def describe_facts(facts: Sequence[Fact]) -> list[dict[str, str]]:
    """What a delta keeps of its edit requests."""
    return [{field: getattr(fact, field) for field in _FACT_FIELDS} for fact in facts]


@dataclasses.dataclass(frozen=True)
class Delta:
    """The change that an edit made to a model.

    before, after: parameter name -> tensor in the model's orientation. `before` is a bit-exact copy in the
                 stored dtype, `after` the new value in at least float32 (cast once to the stored dtype when
                 applied).
    editor, config: name and options of the editor.   facts: the edit requests (case_id, prompt, subject,
                    target).
    base:        sha256 of the model without the parameters in `before`; these are compared themselves.
    metadata:    JSON-able details, e.g. "cast_loss" per parameter for models below float32.
    """

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    editor: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: list[dict[str, str]] = dataclasses.field(default_factory=list)
    base: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.before or self.before.keys() != self.after.keys():
            raise ConfigError("a Delta needs the same, at least one, parameter names in before and after")

    def __repr__(self) -> str:
        return f"Delta({self.editor!r}, {len(self.facts)} facts, {', '.join(self.before)})"

    @property
    def names(self) -> list[str]:
        """Names of the changed parameters."""
        return list(self.before)

    def update(self, name: str) -> Tensor:
        """after - before in float64, in the model's orientation."""
        return self.after[name].double() - self.before[name].double()

    def check_base(self, lm: LM) -> None:
        """Raise ModelError if the rest of the model is not what this edit was made on."""
        self._check_shapes(lm)
        if self.base and lm.fingerprint(exclude=self.names) != self.base:
            raise ModelError(
                f"this edit belongs to another base model than {lm.name} (or other parameters of it have "
                "changed); load the model it was made on, or restore the other edits first"
            )

    def _check_shapes(self, lm: LM) -> None:
        for name, value in self.before.items():
            param = lm.parameter(name)
            if param.shape != value.shape or param.dtype != value.dtype:
                raise ModelError(
                    f"{name} of {lm.name} is {tuple(param.shape)} {param.dtype}, this edit was made on "
                    f"{tuple(value.shape)} {value.dtype}; load the model it was made on, in the same dtype"
                )

    def apply(self, lm: LM, *, on_top: bool = False) -> Delta:
        """Write the edit into the model it was made on, and return the change that `restore` takes back.

        on_top: the model carries edits already, this one too perhaps: add the difference to the weights as they
            are. What is returned then is the change of these weights.
        Raises ModelError for another model and, without on_top, for one that carries edits.
        """
        if on_top and set(lm.edited()) - set(self.names):
            self._check_shapes(lm)  # other parameters carry edits, so the model's hash says nothing
        else:
            self.check_base(lm)
        if not on_top and not carries(lm, self.before):
            if carries(lm, self.after):
                found = f"{lm.name} carries this {self.editor} edit already"
            else:
                found = f"the weights of {lm.name} differ from those this {self.editor} edit was made on"
            raise ModelError(
                f"{found}; restore the edits made since (delta.restore, editor.restore) and apply the edits of a "
                "sequence in their order, or add it to the weights as they are: delta.apply(lm, on_top=True)"
            )
        lm.remember(self.names)
        made = self
        if on_top and not carries(lm, self.before):
            now = {name: value.cpu() for name, value in snapshot(lm, self.names).items()}
            after = {n: (v.double() + self.update(n).cpu()).to(self.after[n].dtype) for n, v in now.items()}
            made = dataclasses.replace(self, before=now, after=after)
        lm.write(made.after)
        return made

    def _put(self, lm: LM) -> None:
        """`apply`, or nothing if the model carries the edit already."""
        self._check_shapes(lm)
        if not carries(lm, self.after):
            self.apply(lm)
        else:
            self.check_base(lm)

    def restore(self, lm: LM) -> None:
        """Write the saved copies back, bit for bit. Nothing happens if the edit is not applied.

        Raises ModelError if the weights are neither those before nor those after this edit.
        """
        self._check_shapes(lm)
        if carries(lm, self.before):
            return
        if not carries(lm, self.after):
            raise ModelError(
                f"the weights of {lm.name} have changed since this {self.editor} edit; "
                "restore the later edits first"
            )
        lm.write(self.before)

    @contextmanager
    def applied(self, lm: LM) -> Iterator[LM]:
        """`with delta.applied(lm):` has the edit inside and the weights without it afterwards, also after
        errors and when the model carried the edit already.
        """
        self._put(lm)
        try:
            yield lm
        finally:
            lm.write(self.before)

    def then(self, later: Delta) -> Delta:
        """This edit followed by a later one of the same parameters, as one edit."""
        if self.before.keys() != later.before.keys() or self.base != later.base:
            raise ConfigError(
                "these edits change different parameters or models; apply them one after the other"
            )
        for name, stored in later.before.items():
            if not torch.equal(self.after[name].to(stored), stored):
                raise ModelError(
                    f"the later edit does not start where this one ends ({name}); give them in order"
                )
        editor = self.editor if self.editor == later.editor else f"{self.editor}+{later.editor}"
        return Delta(
            before=self.before, after=later.after, editor=editor, config=later.config,
            facts=[*self.facts, *later.facts], base=self.base, metadata=later.metadata,
        )  # fmt: skip

    def save(self, path: str | os.PathLike) -> Path:
        """Write as one safetensors file: tensors before:NAME and after:NAME, everything else as JSON
        metadata.
        """
        tensors = {f"{part}:{k}": v for part in ("before", "after") for k, v in getattr(self, part).items()}
        rest = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("before", "after")
        }
        return write_stored(path, tensors, rest, form=_FORMAT, key="delta")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Delta:
        """Read what `save` wrote; raises DataError naming the file otherwise."""
        meta, tensors = read_stored(
            path, form=_FORMAT, key="delta", what="an edit saved by editkit", saver="Delta.save"
        )
        parts: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(":")
            parts[part][name] = value
        return cls(**parts, **meta)

    def merge(self, lm: LM, out_dir: str | os.PathLike) -> Path:
        """Write the edited model and its tokenizer as a Hugging Face checkpoint; `lm` is left as it was
        found. Raises ModelError for a model with adapter layers inside, whose checkpoint would not load.
        """
        out_dir = to_folder(out_dir)
        adapted = [n for n, module in lm.model.named_modules() if type(module).__module__.split(".")[0] == "peft"]
        if adapted:
            raise ModelError(
                f"{lm.name} has adapter layers inside ({adapted[0]} and {len(adapted) - 1} more), whose weights an "
                "ordinary checkpoint does not name; merge them first: model = peft_model.merge_and_unload(), then "
                "load_lm(model) and edit that"
            )
        found = snapshot(lm, self.names)
        self._put(lm)
        try:
            lm.model.save_pretrained(out_dir)
            copy.deepcopy(lm.tokenizer).save_pretrained(out_dir)
        finally:
            lm.write(found)
        return out_dir
