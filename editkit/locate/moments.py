"""Second moments of the keys: what a layer's memory is used for already.

C0 = E[k k^T], mean over tokens of a text corpus, uncentred (ROME equation 2 and appendix; MEMIT equation 15
scales it by lambda). Streamed under an explicit token budget, because budgets derived from a model's maximum
context have exhausted memory on long-context models; cached under everything that changes the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.cached import content_key, found_or_made
from ..base.errors import ConfigError, DataError, NumericsError
from ..base.paths import file_to_read, user_path, written
from ..base.progress import bar
from ..models.batching import by_length
from ..models.facts import as_texts
from ..models.hooks import trace
from ..models.lm import LM
from ..models.prompts import check_unread

_CHUNK = 2048  # texts tokenized at once
_STRIP = 128  # rows of a product that are computed at a time, at least
_FORMAT = "editkit-second-moment-1"
_NAMES = ("model", "rest")  # parts of a provenance that follow from others


@dataclasses.dataclass(frozen=True)
class Covariance:
    """Uncentred second moment of one layer's keys.

    C: (d, d) float64, mean over tokens. n: number of tokens. provenance: where it comes from (JSON values).
    Raises NumericsError if C is not a square, finite, symmetric matrix.
    """

    C: Tensor
    n: int
    provenance: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        C = self.C
        if C.ndim != 2 or C.shape[0] != C.shape[1]:
            raise NumericsError(f"a second moment must be a square matrix (d, d), got shape {tuple(C.shape)}")
        if not torch.isfinite(C).all():
            raise NumericsError(
                "the second moment has NaN or Inf; recompute it in float32 or float64 on a corpus of texts"
            )
        if C.dtype != torch.float64:
            object.__setattr__(self, "C", C.to(torch.float64))
        scale = self.C.abs().max()
        if (self.C - self.C.T).abs().max() > 1e-5 * scale:
            raise NumericsError("the second moment is not symmetric; pass X^T X / N, not a cross moment")

    @property
    def d(self) -> int:
        """Key width."""
        return self.C.shape[0]

    def to(self, device: torch.device | str) -> Covariance:
        """The same moment on another device."""
        return dataclasses.replace(self, C=self.C.to(device))

    @classmethod
    def from_array(cls, array: np.ndarray | Tensor, n: int = 0, provenance: dict | None = None) -> Covariance:
        """From a (d, d) array of any float type, e.g. a recording or a published covariance."""
        C = torch.as_tensor(np.asarray(array) if not isinstance(array, Tensor) else array)
        return cls(C.detach().to(torch.float64, copy=True), int(n), dict(provenance or {}))

    def differences(self, lm: LM, layer: int) -> list[str]:
        """Why this is not the second moment of a layer of `lm`, as far as its provenance says; empty if it may be.

        A model whose down projections have been edited since counts as the same: C0 is that of the unedited model.
        """
        about, found = self.provenance, []
        if about.get("layer", layer) != layer:
            found.append(f"it is that of layer {about['layer']}")
        elif about.get("module", lm.down_name(layer)) != lm.down_name(layer):
            found.append(f"it was read at {about['module']}")
        if "fingerprint" in about and about["fingerprint"] != lm.fingerprint():
            same_rest = about.get("rest") == _rest(lm) if "rest" in about else bool(lm.edited())
            if not same_rest:
                found.append(
                    f"it was computed on {about.get('model') or 'a model'} with weights "
                    f"{about['fingerprint'][:12]}, these are {lm.fingerprint()[:12]}"
                )
        if about.get("tokenizer", tokenizer_hash(lm)) != tokenizer_hash(lm):
            found.append("its texts were cut by another tokenizer")
        return found

    @property
    def identity(self) -> str:
        """Hash of what it was measured on (model, layer, tokenizer, texts, n), or of its values if it does not say."""
        if "fingerprint" in self.provenance:
            keys = ("fingerprint", "layer", "tokenizer", "texts", "max_length")
            return content_key([self.n, *(self.provenance.get(k) for k in keys)])
        return hashlib.sha256(self.C.cpu().contiguous().numpy().tobytes()).hexdigest()[:32]

    def save(self, path: str | os.PathLike) -> Path:
        """Write as safetensors (tensor "C", float64; n and provenance as metadata), whole or not at all."""
        meta = {
            "format": _FORMAT,
            "n": str(self.n),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        with written(path) as part:
            save_file({"C": self.C.cpu().contiguous()}, part, metadata=meta)
        return user_path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Covariance:
        """Read what `save` wrote; raises DataError naming the file otherwise."""
        try:
            with safe_open(str(file_to_read(path, "the second moment")), framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != _FORMAT:
                    raise DataError(f"{path} is not a second moment saved by editkit; recompute it")
                return cls(file.get_tensor("C"), int(meta["n"]), json.loads(meta["provenance"]))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot read the second moment {path}: {error}; delete the file to recompute it"
            ) from error


def text_hash(texts: Sequence[str]) -> str:
    """sha256 over a list of texts, sensitive to their order and borders."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def tokenizer_hash(lm: LM) -> str:
    """sha256 of everything that decides how the tokenizer cuts texts."""
    backend = getattr(lm.tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(lm.tokenizer).__name__, "vocabulary": lm.tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        for setting in ("truncation", "padding"):  # left over from the latest call
            content.pop(setting, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rest(lm: LM) -> str:
    """Hash of the model without what editors change as a rule, so that edits do not make it another one."""
    return lm.fingerprint(exclude=[lm.weight_name(layer) for layer in range(lm.n_layers)])


def _provenance(
    lm: LM, texts: Sequence[str], tokens_per_batch: int, max_length: int | None, dtype: torch.dtype
) -> dict:
    return {
        "model": lm.name,
        "fingerprint": lm.fingerprint(),
        "rest": _rest(lm),
        "tokenizer": tokenizer_hash(lm),
        "texts": text_hash(texts),
        "n_texts": len(texts),
        "tokens_per_batch": tokens_per_batch,
        "max_length": max_length,
        "accumulated_in": str(dtype).removeprefix("torch."),
        "format": _FORMAT,
    }


def second_moment(
    lm: LM,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    tokens_per_batch: int = 4096,
    cache_dir: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[int, Covariance]:
    """Uncentred second moment of the keys (inputs of the down projections) of some layers over a corpus.

    texts: each is fed on its own, with the tokenizer's special tokens; a text longer than the budget or than
           the model allows is cut there.
    tokens_per_batch: upper bound on rows times columns of a forward pass.
    cache_dir: folder of safetensors, one per layer, named by a hash of model weights, tokenizer, texts,
           budget and dtype; layers found there are not computed again.
    dtype: in which products are taken and summed (float32 is faster on accelerators with slow float64, at the
           price of small eigenvalues).

    Memory: one (d, d) matrix per layer beside the model. Returns {layer: Covariance}.
    Raises ModelError for an unknown layer, DataError without texts, NumericsError for NaN or Inf.
    """
    check_unread(lm, "a second moment")
    layers = sorted({lm.check_layer(layer) for layer in layers})
    texts = as_texts(texts)
    if not layers:
        raise ConfigError("second_moment: no layers given")
    if not texts:
        raise DataError(
            "second_moment: no texts given; pass a corpus, e.g. the sentences the model was trained on"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"second_moment: dtype must be float32 or float64, got {dtype}")
    by_length([], tokens_per_batch)  # checks the budget
    max_length = min(tokens_per_batch, lm.max_tokens or tokens_per_batch)
    provenance = _provenance(lm, texts, tokens_per_batch, max_length, dtype)

    def compute(missing: Sequence[int]) -> dict[int, Covariance]:
        sums, n = _accumulate(lm, missing, texts, tokens_per_batch, max_length, dtype)
        return {layer: _finished(sums[layer], n, about(layer)) for layer in missing}

    def about(layer: int) -> dict:
        where = {"layer": layer, "module": lm.down_name(layer), "transformers": transformers.__version__}
        return {**provenance, **where}

    if cache_dir is None:
        return compute(layers)
    # Runs that start together often need the same layers: one computes, the others wait and read.
    content = {k: v for k, v in provenance.items() if k not in _NAMES}
    names = {f"layer{layer}": layer for layer in layers}

    def make(missing: list[str]) -> dict[str, dict[str, Tensor]]:
        made = compute([names[name] for name in missing])
        return {name: {"C": made[names[name]].C, "n": torch.tensor(made[names[name]].n)} for name in missing}

    found = found_or_made(cache_dir, "second_moment", content, make, __file__, list(names))
    return {
        layer: Covariance(found[name]["C"], int(found[name]["n"]), about(layer)).to(lm.device(layer))
        for name, layer in names.items()
    }


def _finished(total: Tensor, n: int, about: dict) -> Covariance:
    """The moment of one layer from the upper triangle of its sum."""
    C = total.triu()
    return Covariance(((C + C.triu(1).T) / n).double(), n, about)


def _add_gram(total: Tensor, X: Tensor) -> None:
    """Add the upper triangle of X^T X to total (d, d), X (tokens, d): half the work of the whole product."""
    d = X.shape[1]
    strip = max(_STRIP, d // 8)
    for start in range(0, d, strip):
        rows = slice(start, start + strip)
        total[rows, start:].addmm_(X[:, rows].T, X[:, start:])


@torch.no_grad()
def _accumulate(
    lm: LM,
    layers: Sequence[int],
    texts: list[str],
    tokens_per_batch: int,
    max_length: int,
    dtype: torch.dtype,
) -> tuple[dict[int, Tensor], int]:
    names = {layer: lm.down_name(layer) for layer in layers}
    sums = {
        layer: torch.zeros((lm.weight_shape(layer)[1],) * 2, dtype=dtype, device=lm.device(layer))
        for layer in layers
    }
    n = 0
    chunks = range(0, len(texts), _CHUNK)
    for start in bar(chunks, f"second moments, {len(texts)} texts", unit=f"x{_CHUNK} texts"):
        encoding = lm.encode(texts[start : start + _CHUNK], max_length=max_length)
        for rows in by_length(encoding.lengths.tolist(), tokens_per_batch):
            batch, _ = encoding.take(rows)
            real = batch.attention_mask.bool()
            with trace(lm.model, names.values(), inputs=True, outputs=False, stop_early=True) as seen:
                lm.forward(batch)
            for layer, name in names.items():
                keys = seen.input[name]
                _add_gram(sums[layer], keys[real.to(keys.device)].to(dtype))
            n += int(real.sum())
    return sums, n
