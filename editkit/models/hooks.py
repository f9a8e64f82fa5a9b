"""Reading and replacing the values inside a model: forward hooks with early stop.

Blocks of current transformers classes return a tensor (Llama, Qwen, GPT-2) or a tuple (GPT-J), attention
modules a tuple, MLPs a tensor. Indexing `output[0]` on a tensor silently takes sequence 0; every hook of
editkit therefore goes through `hidden` and `with_hidden`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..base.errors import ModelError

EditFn = Callable[[Tensor], Tensor]


def hidden(output: object) -> Tensor:
    """The hidden-state tensor of a module output: the tensor itself, or the first element of a tuple.

    Raises ModelError when there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):  # transformers' ModelOutput
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        f"expected a tensor or a tuple that starts with one, got {type(output).__name__}; "
        "hook a block, an attention, an MLP or a linear module"
    )


def with_hidden(output: object, value: Tensor) -> object:
    """A module output of the same form with its hidden-state tensor replaced by `value`."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)(**{**output, first: value})
    return type(output)((value, *output[1:]))


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`; raises ModelError that suggests the nearest names."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules() if n]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; top-level modules are {known[:5]}"
        raise ModelError(f"the model {type(model).__name__} has no module {name!r}{hint}") from None


def check_not_compiled(model: nn.Module) -> None:
    """Raise ModelError for a model compiled by torch, whose forward pass ignores hooks without a word."""
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise ModelError(
            "the model is compiled (torch.compile, model.compile()), so hooks and memories would be ignored; pass the "
            "model as it was before, or load it again"
        )


class StopForward(Exception):
    """Raised by a hook to end a forward pass early; caught by the `trace` that asked for it."""

    def __init__(self, owner: Trace):
        super().__init__("the forward pass was stopped early by editkit.models.hooks.trace")
        self.owner = owner


class Trace:
    """What a traced forward pass saw. `output[name]` and `input[name]` are tensors of shape (batch, tokens,
    width).

    A recorded output is the one the rest of the model sees, hence after any edit. Values of a second forward
    pass inside the same `with` overwrite those of the first.
    """

    def __init__(self) -> None:
        self.output: dict[str, Tensor] = {}
        self.input: dict[str, Tensor] = {}


@contextmanager
def trace(
    model: nn.Module,
    names: Iterable[str] = (),
    *,
    inputs: bool = False,
    outputs: bool = True,
    edit: Mapping[str, EditFn] | None = None,
    stop_at: str | None = None,
    stop_early: bool = False,
) -> Iterator[Trace]:
    """Record (and optionally replace) the hidden states of named modules during forward passes.

    names:   module paths as in `model.named_modules()`; see `LM.block_name` and its siblings.
    inputs:  record the first positional input (for a down projection: the keys).
    outputs: record the output.
    edit:    module path -> function that takes the output hidden state and returns the one to use instead.
    stop_at: end the forward pass right after this module.
    stop_early: end it as soon as every recorded module has run. The exception that stops a forward pass
             leaves the `with` block, so the call of the model has to be its last statement.

    Raises ModelError for an unknown module, or a shape-changing edit. Hooks are removed in every case.
    """
    check_not_compiled(model)
    record = set(names)
    edit = dict(edit or {})
    wanted = record | set(edit) | ({stop_at} if stop_at is not None else set())
    found = {name: submodule(model, name) for name in sorted(wanted)}
    seen = Trace()
    pending = set(record)

    def make_hook(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object):
            if name in record and inputs:
                seen.input[name] = args[0] if args else hidden(next(iter(kwargs.values())))
            changed = None
            if name in edit:
                old = hidden(output)
                new = edit[name](old)
                if new.shape != old.shape:
                    raise ModelError(
                        f"the edit of {name} changed the shape {tuple(old.shape)} to {tuple(new.shape)}"
                    )
                changed = output = with_hidden(output, new)
            if name in record and outputs:
                seen.output[name] = hidden(output)
            pending.discard(name)
            if name == stop_at or (stop_early and not pending):
                raise StopForward(seen)
            return changed

        return hook

    handles = []
    try:
        for name, module in found.items():
            handles.append(module.register_forward_hook(make_hook(name), with_kwargs=True))
        yield seen
    except StopForward as stop:
        if stop.owner is not seen:
            raise
    finally:
        for handle in handles:
            handle.remove()


def check_gradients(model: nn.Module) -> None:
    """Raise ModelError where torch can give no gradients: inside inference_mode, or for a model loaded inside it."""
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "editing needs gradients, which torch.inference_mode() rules out: leave that block (torch.no_grad() does "
            "no harm)"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise ModelError("the model was loaded inside torch.inference_mode() and has no gradients: load it outside")


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Switch off the gradients of all parameters, and give each its former setting back afterwards.

    Used where only an added vector is optimised: the backward pass then neither computes nor stores weight
    gradients. Raises ModelError inside torch.inference_mode().
    """
    check_gradients(model)
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield model
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def pick(states: Tensor, positions: Tensor) -> Tensor:
    """One token per row: (batch, tokens, width) and (batch,) -> (batch, width)."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, positions.to(states.device)]


@contextmanager
def entering(model: nn.Module, name: str, states: Tensor) -> Iterator[None]:
    """Feed `states` (batch, tokens, width) to a block in place of the hidden states it is given."""

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): states}

    handle = submodule(model, name).register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bypassed(model: nn.Module, names: Iterable[str], *, as_tuple: bool = False) -> Iterator[None]:
    """Let the named blocks hand their input through unchanged, at no cost.

    as_tuple: the blocks of this architecture return tuples (`ArchSpec.block_output`).
    """

    def identity(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        return (hidden_states,) if as_tuple else hidden_states

    blocks = [submodule(model, name) for name in names]
    former = [block.__dict__.get("forward") for block in blocks]  # set e.g. by accelerate's dispatch
    try:
        for block in blocks:
            block.forward = identity
        yield
    finally:
        for block, forward in zip(blocks, former, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
