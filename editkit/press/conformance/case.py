"""Recorded cases, comparisons and the registry of adapters.

A case is a folder with `case.json` (inputs, hyper-parameters, small outputs) and `arrays.npz` (recorded
arrays). Which adapter compares it is decided by the content of case.json (its `method` field), never by a
folder name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import ConfigError, DataError

MODELS = "models"
_FLOOR = 1e-12  # of the scale a quantity stems from: a few thousand roundings of float64


class CannotHandle(DataError):
    """This case cannot be compared here (no adapter, missing files); it is skipped, named with the reason."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One recorded quantity against ours.

    name: what was compared.   deviation: how far we are off (NaN or Inf counts as failed).
    tolerance: largest deviation that passes, in the same unit.   note: unit or remark, shown with -v.
    """

    name: str
    deviation: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(math.isfinite(self.deviation) and self.deviation <= self.tolerance)

    @property
    def severity(self) -> float:
        """Deviation in units of its tolerance; infinite if not finite or a zero tolerance is missed."""
        if not math.isfinite(self.deviation):
            return math.inf
        if self.tolerance <= 0:
            return 0.0 if self.deviation <= self.tolerance else math.inf
        return self.deviation / self.tolerance


def _array(value) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def compare(
    name: str, ours, recorded, tolerance: float, *, relative: bool = False, scale: float = 0.0, note: str = ""
) -> Comparison:
    """Largest absolute difference of two arrays (tensors, lists, numbers) of equal shape.

    relative: divide by the largest absolute recorded value (by 1 if that is zero).
    scale: with relative, the size of the quantity this one stems from (an error cache: the update). What both
        sides leave below `_FLOOR` of it is rounding; compared with itself it would be a deviation of 1.
    A different shape, a NaN or an Inf on one side only gives an infinite deviation, i.e. a failed comparison.
    """
    a, b = _array(ours), _array(recorded)
    if a.shape != b.shape:
        return Comparison(name, math.inf, tolerance, f"shape {a.shape}, recorded {b.shape}")
    if a.size == 0:
        return Comparison(name, 0.0, tolerance, note or "empty")
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    deviation = float(difference.max())
    if relative and math.isfinite(deviation):
        size = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
        deviation /= max(size, scale * _FLOOR / tolerance if tolerance > 0 else 0.0) or 1.0
    return Comparison(name, math.inf if math.isnan(deviation) else deviation, tolerance, note)


def compare_equal(name: str, ours, recorded, note: str = "") -> Comparison:
    """Exact equality of any two values (texts, token ids, flags): deviation 0 or 1, tolerance 0."""
    same = bool(ours == recorded)
    return Comparison(name, 0.0 if same else 1.0, 0.0, note if same else f"{ours!r} != {recorded!r}"[:400])


class LazyArrays(Mapping):
    """Read-only view of arrays.npz that loads an array when asked for and remembers which ones were asked
    for.
    """

    def __init__(self, path: Path):
        self._path, self._file, self.used = path, None, set()

    def _npz(self):
        if self._file is None:
            if not self._path.is_file():
                raise CannotHandle(f"missing file {self._path.name}")
            try:
                self._file = np.load(self._path, allow_pickle=False)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise CannotHandle(f"{self._path.name} cannot be read: {error}") from None
        return self._file

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._npz():
            raise KeyError(f"{self._path.name} has no array {name!r}")
        self.used.add(name)
        return self._npz()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._npz().files)

    def __len__(self) -> int:
        return len(self._npz().files)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Case:
    """One recorded case.

    dir: its folder.   data: case.json.   arrays: mapping name -> ndarray, read lazily from arrays.npz.
    models_dir: folder with the recorded models, or None.   method: `data["method"]`.
    Raises CannotHandle when case.json is missing or unreadable.
    """

    def __init__(self, folder: Path | str, models_dir: Path | str | None = None):
        self.dir = Path(folder)
        self.models_dir = Path(models_dir) if models_dir is not None else None
        path = self.dir / "case.json"
        if not path.is_file():
            raise CannotHandle("missing file case.json")
        try:
            self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CannotHandle(f"case.json cannot be read: {error}") from None
        if not isinstance(self.data, dict) or not isinstance(self.data.get("method"), str):
            raise CannotHandle("case.json has no field 'method' that names the recorded method")
        self.arrays = LazyArrays(self.dir / "arrays.npz")

    @property
    def method(self) -> str:
        return self.data["method"]

    @property
    def hparams(self) -> dict[str, Any]:
        return self.data.get("hparams", {})

    @property
    def dtype(self):
        """torch dtype of the recorded run: float64 if the recorded weights are float64, else float32."""
        import torch

        weights = [
            v[0] for k, v in self.data.get("arrays", {}).items() if k.startswith(("W0", "W_", "b0_W_"))
        ]
        return torch.float64 if weights and all(w == "float64" for w in weights) else torch.float32

    @property
    def model_dir(self) -> Path:
        """Folder of the case's model: `model` in case.json names a folder in the case or in models_dir."""
        name = self.data.get("model")
        if not isinstance(name, str):
            raise CannotHandle("case.json has no field 'model'")
        roots = [self.dir, self.dir / MODELS] + ([self.models_dir] if self.models_dir else [])
        for root in roots:
            if (root / name / "config.json").is_file():
                return root / name
        raise CannotHandle(f"model {name!r} not found below {', '.join(str(r) for r in roots)}")

    def load_model(self, dtype=None):
        """A fresh `editkit.models.lm.LM` of the recorded model on the CPU, in `dtype` (default: the case's
        dtype).

        The recordings set the padding token to `pad_token` of case.json, or to the end-of-sequence token.
        """
        from transformers import AutoTokenizer

        from ...models.lm import load_lm

        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        tokenizer.pad_token = self.data.get("pad_token") or tokenizer.eos_token
        return load_lm(str(self.model_dir), tokenizer, dtype or self.dtype)

    def covariance(self, layer: int) -> np.ndarray:
        """Recorded second moment (d, d) of a layer: from the case's arrays, else from the model's cov.npz."""
        name = f"cov_{layer}"
        if name in self.arrays:
            return self.arrays[name]
        path = self.model_dir / "cov.npz"
        if not path.is_file():
            raise CannotHandle(f"missing file {path.name} of model {self.data['model']!r}")
        with np.load(path, allow_pickle=False) as file:
            return file[name]

    def unused_arrays(self) -> list[str]:
        """Arrays of the recording that the adapter never read."""
        if not self.arrays._path.is_file():
            return []
        return sorted(set(self.arrays) - self.arrays.used)


Adapter = Callable[[Case], list[Comparison]]
_ADAPTERS: dict[str, Adapter] = {}


def adapter(*methods: str) -> Callable[[Adapter], Adapter]:
    """Register a function `(case: Case) -> list[Comparison]` for these values of case.json's `method`.

    An adapter runs our implementation on the recorded inputs and compares every recorded output. It may raise
    CannotHandle (the case is skipped with the message); any other exception makes the case fail.
    """

    def register(function: Adapter) -> Adapter:
        for method in methods:
            known = _ADAPTERS.get(method)
            if known is not None and (known.__module__, known.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise ConfigError(
                    f"two adapters for method {method!r}: {known.__module__} and {function.__module__}"
                )
            _ADAPTERS[method] = function
        return function

    return register


def registered() -> Mapping[str, Adapter]:
    """Adapters by method (those of the modules imported so far; `runner.discover` imports all)."""
    return dict(_ADAPTERS)
