"""Keys and gradients of a batch of edits: collected once, kept in memory or in shards on disk.

For every answer token and every edited module: the key u (the module's input) and the gradient g of the edit
loss with respect to the module's output. The loss is the mean over the answer tokens of a batch of the
language model, so g carries the factor 1 / (answer tokens of that batch), as in the published code.

Keys and gradients of a fact depend on the unedited model only, so `RowMemory` keeps them by fact, without
that factor: a fact that comes again in a later step costs no pass of the language model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...base.errors import DataError, NumericsError, RequestError
from ...base.paths import user_path
from ...models.answers import logits_of
from ...models.hooks import frozen, trace
from ...models.lm import LM
from .data import IGNORED, Pair, Tokens, TupleBatch, encode_pairs
from .sites import Site


@dataclasses.dataclass(frozen=True)
class EditRows:
    """Rows of one batch of edits in memory: keys[i] (N, d_i) and grads[i] (N, m_i) of site i.

    parts: rows of each batch of the language model, in order.
    """

    keys: list[Tensor]
    grads: list[Tensor]
    parts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.parts)

    def site(self, i: int) -> tuple[Tensor, Tensor]:
        """(keys (N, d), gradients (N, m)) of a site."""
        return self.keys[i], self.grads[i]


def collect(lm: LM, sites: Sequence[Site], batch: TupleBatch, tokens: Tokens = "answer") -> EditRows:
    """One forward and backward pass: rows of all sites for one batch, in the order of the batch.

    Raises NumericsError if the loss or a gradient is not finite.
    """
    names = [site.path for site in sites]
    end = lm.block_name(lm.n_layers - 1)

    def watch(h: Tensor) -> Tensor:
        return h if h.requires_grad else h.detach().requires_grad_(True)

    where = batch.rows(tokens)
    with frozen(lm.model), torch.enable_grad():
        edits = dict.fromkeys(names, watch)
        with trace(lm.model, [*names, end], inputs=True, edit=edits, stop_at=end) as seen:
            lm.model(**batch.inputs, use_cache=False)
        states = seen.output[end]
        logits = logits_of(lm, states[batch.asked.to(states.device)])
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.to(logits.device))
        grads = torch.autograd.grad(loss, [seen.output[name] for name in names])
    if not torch.isfinite(loss):
        raise NumericsError(f"the edit loss is {float(loss)}; check the model and the answers of this batch")
    keys_, grads_ = [], []
    for name, grad in zip(names, grads, strict=True):
        rows = where.to(grad.device)
        wide = torch.promote_types(grad.dtype, torch.float32)
        keys_.append(seen.input[name].detach()[rows].to(wide))
        grads_.append(grad[rows].to(wide))
    return EditRows(keys_, grads_, (int(where.sum()),))


def join(parts: Sequence[EditRows]) -> EditRows:
    """Rows of several batches, one after the other."""
    return EditRows(
        [torch.cat(k) for k in zip(*(p.keys for p in parts), strict=True)],
        [torch.cat(g) for g in zip(*(p.grads for p in parts), strict=True)],
        tuple(n for p in parts for n in p.parts),
    )


class RowMemory:
    """Rows by fact, in memory; the default. Filled on demand, valid for one state of the model (`clear`)."""

    def __init__(self, lm: LM, sites: Sequence[Site], batch_size: int, tokens: Tokens = "answer") -> None:
        self.lm, self.sites, self.batch_size, self.tokens = lm, tuple(sites), batch_size, tokens
        # (tokens of the row, of its answer), keys, gradients of the summed loss
        self._rows: dict[Pair, tuple[tuple[int, int], list[Tensor], list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget everything: the model has changed."""
        self._rows.clear()

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return [t for _, keys, grads in self._rows.values() for t in (*keys, *grads)]

    def take(self, pairs: Sequence[Pair]) -> EditRows:
        """Rows of all pairs, longest first as in `RowFiles`; those of unknown pairs are computed now."""
        self.fill([p for p in dict.fromkeys(pairs) if p not in self._rows])
        pairs = sorted(pairs, key=lambda p: -self._rows[p][0][0])
        counts = [self._rows[p][0][1] for p in pairs]
        keys, grads, parts = [], [], []
        for begin in range(0, len(pairs), self.batch_size):
            part = pairs[begin : begin + self.batch_size]
            scale = 1.0 / sum(counts[begin : begin + self.batch_size])
            found = [self._rows[p] for p in part]
            keys.append([torch.cat(k) for k in zip(*(f[1] for f in found), strict=True)])
            grads.append([scale * torch.cat(g) for g in zip(*(f[2] for f in found), strict=True)])
            parts.append(len(keys[-1][0]))
        return EditRows(
            [torch.cat(k) for k in zip(*keys, strict=True)],
            [torch.cat(g) for g in zip(*grads, strict=True)],
            tuple(parts),
        )

    def fill(self, pairs: Sequence[Pair]) -> None:
        """Compute and keep the rows of pairs."""
        for batch in encode_pairs(self.lm, pairs, self.batch_size) if pairs else ():
            rows = collect(self.lm, self.sites, batch, self.tokens)
            asked = batch.asked.sum(-1).tolist()
            taken = batch.rows(self.tokens).sum(-1).tolist()
            keys = [k.split(taken) for k in rows.keys]
            grads = [(sum(asked) * g).split(taken) for g in rows.grads]
            long = batch.inputs["attention_mask"].sum(-1).tolist()
            for j, pair in enumerate(batch.pairs):
                self._rows[pair] = (
                    (long[j], asked[j]),
                    [k[j].clone() for k in keys],
                    [g[j].clone() for g in grads],
                )


class RowFiles:
    """Rows on disk, one safetensors shard a batch of the language model; one site is read at a time.

    Raises DataError when the folder holds files that this cache did not write.
    """

    def __init__(
        self,
        lm: LM,
        sites: Sequence[Site],
        batch_size: int,
        tokens: Tokens = "answer",
        *,
        folder: str | os.PathLike,
    ) -> None:
        self.lm, self.sites, self.batch_size, self.tokens = lm, tuple(sites), batch_size, tokens
        self.folder = user_path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in self.folder.iterdir() if not p.name.startswith("rows-")]
        if foreign:
            raise DataError(
                f"the cache folder holds {foreign[0]!r}, which is no shard of rows; give an empty folder"
            )

    def clear(self) -> None:
        """Remove all shards."""
        for path in self.folder.glob("rows-*.safetensors"):
            path.unlink()

    def take(self, pairs: Sequence[Pair]) -> ShardedRows:
        """Compute the rows of all pairs and write them; the former shards are removed."""
        self.clear()
        files, parts = [], []
        for k, batch in enumerate(encode_pairs(self.lm, pairs, self.batch_size)):
            rows = collect(self.lm, self.sites, batch, self.tokens)
            path = self.folder / f"rows-{k:05d}.safetensors"
            tensors = {f"keys.{i}": v.contiguous() for i, v in enumerate(rows.keys)}
            save_file(tensors | {f"grads.{i}": v.contiguous() for i, v in enumerate(rows.grads)}, path)
            files.append(path)
            parts.append(len(rows))
        return ShardedRows(files, tuple(parts))


@dataclasses.dataclass(frozen=True)
class ShardedRows:
    """Rows of one batch of edits on disk; the face of `EditRows`."""

    files: list[Path]
    parts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.parts)

    def site(self, i: int) -> tuple[Tensor, Tensor]:
        """(keys (N, d), gradients (N, m)) of a site, read from all shards."""
        keys, grads = [], []
        for path in self.files:
            try:
                with safe_open(str(path), framework="pt") as file:
                    keys.append(file.get_tensor(f"keys.{i}"))
                    grads.append(file.get_tensor(f"grads.{i}"))
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"cannot read the cached rows {path.name}: {error}; collect them again"
                ) from error
        return torch.cat(keys), torch.cat(grads)


def bytes_needed(n_rows: int, sites: Sequence[Site], on_disk: bool = False) -> int:
    """Memory that n_rows answer tokens take at the peak of a solve: rows, residuals, one factorised system."""
    stored = 0 if on_disk else 4 * n_rows * sum(s.d + s.m for s in sites)
    residuals = 2 * 8 * n_rows * sum(s.m for s in sites)
    system = max(12 * n_rows * (s.d + s.m) + 16 * min(n_rows, s.d) ** 2 + 16 * s.d * s.m for s in sites)
    return stored + residuals + system


def free_memory() -> int | None:
    """Bytes of physical memory that are available, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(row.split()[1]) for row in lines if row.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(
    n_edits: int, n_rows: int, sites: Sequence[Site], limit: float | None = None, on_disk: bool = False
) -> None:
    """Raise RequestError if the rows of n_edits facts do not fit, saying how many facts would.

    limit: bytes; None takes the memory that is free now.
    """
    limit = free_memory() if limit is None else limit
    if limit is None or bytes_needed(n_rows, sites, on_disk) <= limit:
        return
    low, high = 0, n_rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_needed(middle, sites, on_disk) <= limit else (low, middle)
    fits = low * n_edits // n_rows
    need = bytes_needed(n_rows, sites, on_disk)
    other = "" if on_disk else ", or keep the rows on disk (folder=...)"
    raise RequestError(
        f"{n_edits} edits have {n_rows} answer tokens and need {need / 1e9:.3g} GB, {limit / 1e9:.3g} GB are "
        f"free; about {fits} edits would fit: edit in batches of that size, in fewer modules{other}"
    )


def count_rows(batches: Sequence[TupleBatch], tokens: Tokens) -> int:
    """Rows that these batches will give."""
    return sum(int(b.rows(tokens).sum()) for b in batches)


__all__ = [
    "IGNORED", "EditRows", "RowFiles", "RowMemory", "ShardedRows", "bytes_needed", "check_memory", "collect",
    "count_rows", "free_memory", "join",
]  # fmt: skip
