"""The hypernetwork: rows [key ; gradient] of an edit in, pseudo keys and pseudo gradients out.

    x_0 = Norm([u ; g])
    x_b = x_{b-1} + scale_b[l] * relu(x_{b-1} A_b B_b + bias_b) + shift_b[l]          b = 1..n_blocks
    [u' ; g'] = x_{n_blocks},      r = - eta_l (u . u') g'                             (horse.md equation 1)

One network for all modules of one shape; module l inside it has its own scale, shift, step size eta_l and
ridge e^{lambda_l}. r is what a gradient step along the rank-one pseudo gradient -eta g' u'^T would change at
the fact's own key: the value difference. MEND adds the rank-one steps, MALMEN solves for the update that
makes all value differences at once.

A method is a subclass of `Hypernetwork` with one function, `plan`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...base.config import Config, check_known, option
from ...base.errors import ConfigError, DataError, ModelError
from ...base.stored import read_stored, write_stored
from ...models.lm import LM
from .data import Tokens
from .normalizer import Moments, RunningMoments
from .sites import Site, find_sites

_FORMAT = "editkit-hypernetwork-1"
Activation = Callable[[Tensor], Tensor]


class Rows(Protocol):
    """Keys and gradients of a batch of edits (`cache.EditRows` or `cache.ShardedRows`)."""

    parts: tuple[int, ...]

    def __len__(self) -> int: ...

    def site(self, i: int) -> tuple[Tensor, Tensor]: ...


class Plan(Protocol):
    """The shifts of one batch of edits and the way back from them."""

    shifts: list[Tensor]  # (m, d) float64, one a site

    def backward(self, grads: Sequence[Tensor]) -> None:
        """Add to the hypernetwork's `.grad`, given dL/dW (m, d) of each site."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperConfig(Config):
    """What a hypernetwork is; stored with it."""

    rank: int = option(1920, "rank of the blocks", source="MEND, MALMEN code", low=1)
    n_blocks: int = option(2, "residual blocks", source="MEND, MALMEN code", low=0)
    lr: float = option(1e-6, "step size eta at the start; learned", source="editor.lr", above=0)
    tokens: Tokens = option("answer", "rows taken: positions that predict the answer, or all", source="token")  # noqa: RUF009
    moments: Moments = option("exact", "normaliser: exact moments, or the released update")  # noqa: RUF009
    rows_per_chunk: int = option(
        1024, "rows that pass the network at once", source="editor.batch_size", low=1
    )
    seed: int = option(0, "seed of the initial weights", low=0)


class Block(nn.Module):
    """One low-rank residual block; the identity at the start, because B, bias and shift are zero.

    activation: max(x, 0) with a choice of slope at 0, where all of a fresh network is.
    """

    def __init__(
        self, size: int, rank: int, n_sites: int, generator: torch.Generator,
        activation: Activation = torch.relu,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation = activation
        self.A = nn.Parameter(torch.randn(size, rank, generator=generator))
        self.B = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(n_sites, size))
        self.shift = nn.Parameter(torch.zeros(n_sites, size))

    def forward(self, x: Tensor, site: int) -> Tensor:
        return x + self.scale[site] * self.activation(x @ self.A @ self.B + self.bias) + self.shift[site]


class ShapeNet(nn.Module):
    """The network of all modules of one shape. `site` is the index of a module inside its shape."""

    def __init__(
        self, d: int, m: int, n_sites: int, config: HyperConfig, generator: torch.Generator,
        activation: Activation = torch.relu,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d, self.m = d, m
        self.normalizer = RunningMoments(d + m, config.moments)
        self.blocks = nn.ModuleList(
            Block(d + m, config.rank, n_sites, generator, activation) for _ in range(config.n_blocks)
        )
        self.lr = nn.Parameter(torch.full((n_sites,), config.lr))
        self.log_ridge = nn.Parameter(torch.zeros(n_sites))

    def forward(self, keys: Tensor, grads: Tensor, site: int) -> tuple[Tensor, Tensor]:
        """Pseudo keys (n, d) and pseudo gradients (n, m)."""
        x = self.normalizer(torch.cat([keys, grads], -1).to(self.lr.dtype))
        for block in self.blocks:
            x = block(x, site)
        return x.split([self.d, self.m], -1)

    def value_differences(self, keys: Tensor, grads: Tensor, site: int) -> Tensor:
        """R (n, m), rows r_i = - eta (u_i . u'_i) g'_i."""
        pseudo_keys, pseudo_grads = self(keys, grads, site)
        return -self.lr[site] * (keys.to(pseudo_keys) * pseudo_keys).sum(-1, keepdim=True) * pseudo_grads


class Hypernetwork(nn.Module):
    """Base of MEND, MALMEN, RLEdit and HORSE: networks by shape, sites, and what model it belongs to.

    lm:     the unedited model.   layers or modules: what is edited, see `sites.find_sites`.
    config: an instance of the class's `Config`, a mapping or None.
    Made untrained; train it with `training.Trainer`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[HyperConfig]]

    def __init__(
        self,
        lm: LM,
        config: HyperConfig | Mapping[str, Any] | None = None,
        *,
        layers: Sequence[int] = (),
        modules: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = self.Config.make(config)
        self.sites = find_sites(lm, layers, modules)
        self.base = lm.fingerprint(exclude=self.parameter_names())
        self.check()
        generator = torch.Generator().manual_seed(self.config.seed)
        count: dict[str, int] = {}
        self._index = []
        for site in self.sites:
            self._index.append(count.setdefault(site.shape, 0))
            count[site.shape] += 1
        size = {site.shape: (site.d, site.m) for site in self.sites}
        act = self.activation()
        self.nets = nn.ModuleDict(
            {shape: ShapeNet(*size[shape], n, self.config, generator, act) for shape, n in count.items()}
        )
        self.to(lm.device(0))

    def parameter_names(self) -> list[str]:
        """The model's parameters that edits change."""
        return [site.weight_name for site in self.sites]

    def check(self) -> None:
        """Raise an EditkitError if config and sites do not fit."""

    def activation(self) -> Activation:
        """The non-linearity of the blocks."""
        return torch.relu

    @abstractmethod
    def plan(self, rows: Rows) -> Plan:
        """The shifts for a batch of edits. Reads the normaliser, never updates it."""

    def differences(self, lm: LM) -> list[str]:
        """Why `lm` is not the model that this hypernetwork was made for (edits aside). Raises ModelError for shapes."""
        for site in self.sites:
            shape = tuple(sorted(lm.parameter(site.weight_name).shape))
            if shape != tuple(sorted((site.d, site.m))):
                raise ModelError(
                    f"{site.path} of {lm.name} is {shape}, this {self.name} hypernetwork was trained for "
                    f"({site.d}, {site.m}); load its model, or train a hypernetwork for this one"
                )
        here = lm.fingerprint(exclude=self.parameter_names())
        if here == self.base:
            return []
        return [f"its weights outside the edited ones are {self.base[:12]}, here {here[:12]} (another model, or dtype)"]

    def check_model(self, lm: LM) -> None:
        """Raise ModelError unless `lm` is the model that this hypernetwork was made for (edits aside)."""
        differ = self.differences(lm)
        if differ:
            raise ModelError(
                f"this {self.name} hypernetwork was trained for another model than {lm.name}: {differ[0]}; load that "
                "model, or train a hypernetwork for this one"
            )

    def net(self, i: int) -> tuple[ShapeNet, int]:
        """Network of a site, and the site's index inside it."""
        return self.nets[self.sites[i].shape], self._index[i]

    def rows(self, rows: Rows, i: int) -> tuple[Tensor, Tensor]:
        """Keys and gradients of a site, on the device of the network (a model may be spread over several)."""
        device = self.net(i)[0].lr.device
        keys, grads = rows.site(i)
        return keys.to(device), grads.to(device)

    def log_ridge(self, i: int) -> Tensor:
        """lambda of a site, differentiable."""
        net, k = self.net(i)
        return net.log_ridge[k]

    def observe(self, rows: Rows) -> None:
        """Take the rows of training edits into the normalisers, batch by batch of the language model."""
        sites = [self.rows(rows, i) for i in range(len(self.sites))]
        begin = 0
        for n in rows.parts:
            for i, (keys, grads) in enumerate(sites):
                part = slice(begin, begin + n)
                self.net(i)[0].normalizer.update(torch.cat([keys[part], grads[part]], -1))
            begin += n

    def chunks(self, rows: Rows, i: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, keys, gradients) of a site in pieces of `rows_per_chunk`."""
        keys, grads = self.rows(rows, i)
        for begin in range(0, len(keys), self.config.rows_per_chunk):
            part = slice(begin, begin + self.config.rows_per_chunk)
            yield part, keys[part], grads[part]

    # --- files ----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """JSON-able description: method, options, sites, base model."""
        return {
            "method": self.name, "config": self.config.to_dict(), "base": self.base,
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }  # fmt: skip

    def digest(self) -> str:
        """sha256 over description, weights and normaliser."""
        found = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Write as safetensors. dtype: store the weights in this type (the normaliser keeps float64)."""
        tensors = {
            k: v if dtype is None or ".normalizer." in k else v.to(dtype)
            for k, v in self.state_dict().items()
        }
        return write_stored(path, tensors, self.describe(), form=_FORMAT, key="hypernetwork")


METHODS: dict[str, type[Hypernetwork]] = {}


def method(cls: type[Hypernetwork]) -> type[Hypernetwork]:
    """Class decorator: make a method known by its `name`."""
    METHODS[cls.name] = cls
    return cls


def make_hypernetwork(
    name: str, lm: LM, *, layers: Sequence[int] = (), modules: Sequence[str] = (), **config: Any
) -> Hypernetwork:
    """An untrained hypernetwork by method name: "mend", "malmen", "rledit", "horse"."""
    check_known([name], sorted(METHODS), "hypernetwork method")
    return METHODS[name](lm, config, layers=layers, modules=modules)


def load_hypernetwork(path: str | os.PathLike, lm: LM, *, force: bool = False) -> Hypernetwork:
    """Read what `Hypernetwork.save` wrote, for the model it was trained on (with force: for one of its shapes).

    Raises DataError for a file of another kind, ModelError for another model.
    """
    meta, tensors = read_stored(
        path, form=_FORMAT, key="hypernetwork", what="a hypernetwork", saver="Hypernetwork.save"
    )
    check_known([meta["method"]], sorted(METHODS), "hypernetwork method")
    known = dict(lm.model.named_modules())
    missing = [s["path"] for s in meta["sites"] if s["path"] not in known]
    if missing:
        raise ModelError(
            f"{lm.name} has no module {missing[0]!r}: this {meta['method']} hypernetwork was trained for another "
            "model; load that model, or train a hypernetwork for this one"
        )
    net = METHODS[meta["method"]](lm, meta["config"], modules=[s["path"] for s in meta["sites"]])
    net.base = meta["base"]
    if [dataclasses.asdict(s) for s in net.sites] != meta["sites"]:
        net.sites = tuple(Site(**s) for s in meta["sites"])  # so that the message names the trained shapes
    net.differences(lm) if force else net.check_model(lm)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{path} does not hold the tensors its description promises: {error}") from error
    return net


def require(net: Hypernetwork, name: str) -> Hypernetwork:
    """The hypernetwork, if it is one of method `name`; raises ConfigError otherwise."""
    if net.name != name:
        raise ConfigError(f"this is a {net.name} hypernetwork; use the editor {net.name!r}, not {name!r}")
    return net
