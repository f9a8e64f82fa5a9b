"""Edited modules: any linear layer inside the blocks, by module path; down projections by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...base.errors import ConfigError, ModelError
from ...models.hooks import submodule
from ...models.lm import LM


@dataclasses.dataclass(frozen=True)
class Site:
    """One edited matrix. path: module path.   d, m: widths of its input and output."""

    path: str
    d: int
    m: int

    @property
    def weight_name(self) -> str:
        return f"{self.path}.weight"

    @property
    def shape(self) -> str:
        """Name of the shape, shared by all sites that share a network."""
        return f"{self.d}x{self.m}"


def find_sites(lm: LM, layers: Sequence[int] = (), modules: Sequence[str] = ()) -> tuple[Site, ...]:
    """Down projections of `layers`, or the `modules` given by path, in the order given (shallow first).

    Raises ConfigError for an empty or repeated list, ModelError for a layer or module that does not exist or
    is not linear.
    """
    if bool(layers) == bool(modules):
        raise ConfigError(
            "give the edited matrices: either layers=[4, 5] (down projections) or modules=[paths]"
        )
    paths = [lm.down_name(layer) for layer in layers] if layers else list(modules)
    if len(set(paths)) != len(paths):
        raise ConfigError(f"{paths} names a module twice")
    sites = []
    for path in paths:
        module = submodule(lm.model, path)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ModelError(f"{path} is a {type(module).__name__}; hypernetworks edit linear layers")
        a, b = module.weight.shape
        sites.append(Site(path, a, b) if isinstance(module, Conv1D) else Site(path, b, a))
    return tuple(sites)


def oriented(lm: LM, site: Site, matrix: Tensor) -> Tensor:
    """From the model's orientation of this site's weight to (m, d), or back."""
    return matrix.T if isinstance(submodule(lm.model, site.path), Conv1D) else matrix


def add_shifts(lm: LM, sites: Sequence[Site], start: Sequence[Tensor], shifts: Sequence[Tensor]) -> None:
    """Write start + shift into each weight, cast once. start: in the model's orientation; shifts (m, d)."""
    with torch.no_grad():
        lm.write({
            site.weight_name: W.to(shift) + oriented(lm, site, shift)
            for site, W, shift in zip(sites, start, shifts, strict=True)
        })  # fmt: skip


def weights(lm: LM, sites: Sequence[Site]) -> list[Tensor]:
    """Copies of the sites' weights, in the model's orientation and dtype."""
    return [lm.parameter(site.weight_name).detach().clone() for site in sites]


@contextmanager
def edited(lm: LM, sites: Sequence[Site], shifts: Sequence[Tensor]) -> Iterator[LM]:
    """The model with shifts (m, d) added, and its own bits back afterwards: saved copies, no subtraction."""
    start = weights(lm, sites)
    try:
        add_shifts(lm, sites, start, shifts)
        yield lm
    finally:
        with torch.no_grad():
            for site, W in zip(sites, start, strict=True):
                lm.parameter(site.weight_name).copy_(W)
