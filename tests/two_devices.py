"""Two pretended devices on one CPU, to test models whose blocks are split.

Inside `pretend(...)` every tensor carries a place, a torch.device that need not exist here. Operations refuse tensors
of different places, as real devices do; `.device` reports the place; `.to(place)` moves a tensor; factories put theirs
where `device=` says. Values are computed on the CPU, so results can be compared with those of the whole model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from editkit.models.lm import LM

HERE = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)

# What may mix places on real devices too: copies, and reading one element or printing.
_MOVES = {"copy_", "to", "type_as", "cpu"}
# An index on the host selects from a tensor anywhere.
_INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}


class Places(TorchFunctionMode):
    """Tracks and checks the place of every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, torch.device] = {}
        self.checked = 0

    def put(self, tensor: Tensor, place: torch.device) -> Tensor:
        if place == HERE:
            self.of.pop(id(tensor), None)
        elif self.of.get(id(tensor)) != place:
            self.of[id(tensor)] = place
            weakref.finalize(tensor, self.of.pop, id(tensor), None)
        return tensor

    def where(self, tensor: Tensor) -> torch.device:
        return self.of.get(id(tensor), HERE)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if name == "__get__":
            owner = getattr(func, "__self__", None)
            if getattr(owner, "__name__", "") == "device":
                return self.where(args[0])
            return self._tag(func(*args, **kwargs), self.where(args[0]))
        if name in _MOVES and tensors:
            return self._move(func, name, args, kwargs)
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            wanted = args[1] if len(args) > 1 else kwargs["inputs"]
            wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
            return tuple(self.put(g, self.where(x)) for g, x in zip(found, wanted, strict=True))
        if name.startswith("_foreach_"):
            # Optimisers call these on one group per device; here all places are one, and so one group.
            found = func(*args, **kwargs)
            return found and [self.put(y, self.where(x)) for x, y in zip(args[0], found, strict=True)]
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = HERE
            target = torch.device(target) if not isinstance(target, torch.device) else target
        places = {self.where(t) for t in tensors if t.ndim}
        if name in _INDEXING:
            places = {self.where(tensors[0])} | (places - {HERE})
        if len(places) > 1:
            raise RuntimeError(
                f"{name}: expected all tensors on one device, found {sorted(map(str, places))} for shapes "
                f"{[tuple(t.shape) for t in tensors]}"
            )
        self.checked += len(tensors) > 1
        scalars = {self.where(t) for t in tensors} - {HERE}
        place = target or next(iter(places), next(iter(scalars), HERE))
        if name.endswith("_like") and target is None:
            place = self.where(tensors[0])
        return self._tag(func(*args, **kwargs), place)

    def _move(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        tensor = args[0]
        if name == "copy_":
            return func(*args, **kwargs)
        place = self.where(tensor)
        if name == "cpu":
            return self.put(tensor.view_as(tensor) if place != HERE else tensor, HERE)
        args = list(args)
        for i, x in enumerate(args[1:], start=1):
            if isinstance(x, Tensor):
                place, args[i] = self.where(x), x
            elif isinstance(x, (str, torch.device)):
                place, args[i] = torch.device(x), HERE
        if kwargs.get("device") is not None:
            place, kwargs["device"] = torch.device(kwargs["device"]), HERE
        out = func(*args, **kwargs)
        if out is tensor and place != self.where(tensor):
            out = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().clone()
        return self.put(out, place) if out is not tensor else out

    def _tag(self, out: Any, place: torch.device) -> Any:
        return tree_map(lambda x: self.put(x, place) if isinstance(x, Tensor) else x, out)


@contextmanager
def pretend(lm: LM, split: int) -> Iterator[Places]:
    """The model split before one block, as device_map would: embedding and early blocks on FIRST, the others, norm and
    head on SECOND (a head tied to the embedding stays with it). Inputs of a module are moved to its device by a hook,
    as accelerate does.
    """
    places, module = Places(), lm.model.get_submodule
    blocks, embed = module(lm.spec.blocks), module(lm.spec.embed)
    late = [*blocks[split:], module(lm.spec.norm), module(lm.spec.head)]
    tied = {id(p) for p in embed.parameters()}
    second = {id(p) for m in late for p in [*m.parameters(), *m.buffers()]} - tied
    handles = []

    def bring(place):
        def move(x):
            return x.to(place) if isinstance(x, Tensor) else x

        return lambda _, args, kwargs: (tree_map(move, args), tree_map(move, kwargs))

    with places:
        for p in [*lm.model.parameters(), *lm.model.buffers()]:
            places.put(p, SECOND if id(p) in second else FIRST)
        for m in [lm.model, *blocks[:split], *late]:
            place = SECOND if m in late and id(next(m.parameters())) in second else FIRST
            handles.append(m.register_forward_pre_hook(bring(place), with_kwargs=True))
        try:
            yield places
        finally:
            for handle in handles:
                handle.remove()
