"""The contract of editors, as a check that anybody can run on a new one.

from editkit.methods.contract import check_editor

def make(lm, **changes):
    options = {"layers": [1], "statistics": statistics, **changes}
    return make_editor("my_method", lm, **options)

check_editor(make, lm, facts)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import ConfigError, EditkitError, ModelError, NumericsError, RequestError
from ..models.facts import Fact
from ..models.lm import LM
from .base import Editor
from .delta import Delta

Make = Callable[..., Editor]


def check_editor(make: Make, lm: LM, facts: Sequence[Fact], *, other: LM | None = None) -> None:
    """Raise AssertionError unless the editor keeps every promise of `editors.base.Editor`.

    make:  make(lm, **changes) returns a new editor; it has to pass on the options `layers` and `statistics`
           and unknown ones.
    lm:    a small float32 model on the CPU.   facts: at least three edit requests it can take.
    other: a second model of another weight, on which deltas have to be refused (default: `lm` with a changed
           weight).

    Checked: construction changes nothing; edits change only declared parameters, and the model's flags, hooks
    and the global random state not at all; restoring is bit-exact; equal seeds give equal bits whatever the
    global seed; no state leaks from one instance to the next; deltas apply, save, load and refuse other
    models; bad requests are refused before anything changes, with a message; a saved and resumed stream ends
    in the same bits.
    """
    facts = list(facts)
    assert len(facts) >= 3, "the contract needs at least three facts"
    assert lm.dtype == torch.float32, "the contract runs in float32"
    original = _weights(lm)
    for check in (_edits_and_restores, _repeats, _keeps_instances_apart, _applies, _refuses, _resumes):
        try:
            check(make, lm, facts)
            _same(original, _weights(lm), f"{check.__name__[1:]} left the model changed")
        finally:
            _put(lm, original)
    with changed(lm, make(lm).parameter_names()) as foreign:
        delta = _edited_elsewhere(make, lm, facts, original)
        _raises(
            ModelError, lambda: delta.apply(other or foreign), "a delta was applied to another base model"
        )
    _put(lm, original)


def _weights(lm: LM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def _put(lm: LM, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            lm.parameter(name).copy_(value)


def _same(a: dict[str, Tensor], b: dict[str, Tensor], message: str) -> None:
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ, f"{message}: {differ}"


def _raises(error: type[EditkitError], action: Callable[[], object], message: str) -> None:
    try:
        action()
    except error as raised:
        assert len(str(raised)) > 20, f"{message}: the error {raised!r} does not say what to do"
    except Exception as raised:
        raise AssertionError(f"{message}: expected {error.__name__}, got {raised!r}") from raised
    else:
        raise AssertionError(message)


def _hooks(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def _edits_and_restores(make: Make, lm: LM, facts: list[Fact]) -> None:
    before = _weights(lm)
    flags = [(p.requires_grad, p.grad is None) for p in lm.model.parameters()]
    state, hooks = torch.random.get_rng_state(), _hooks(lm)
    editor = make(lm)
    _same(before, _weights(lm), "making the editor changed weights")
    delta = editor.edit(facts)
    declared = set(editor.parameter_names())
    now = _weights(lm)
    moved = {name for name in now if not torch.equal(now[name], before[name])}
    assert moved, "the edit changed nothing"
    assert moved <= declared, f"the edit changed undeclared parameters: {sorted(moved - declared)}"
    assert set(delta.names) == declared, "the delta does not list the declared parameters"
    _same(delta.after, {n: now[n] for n in delta.names}, "the delta's after differs from the model")
    _same(delta.before, {n: before[n] for n in delta.names}, "the delta's before differs from the model")
    assert delta.editor == editor.name and len(delta.facts) == len(facts)
    assert flags == [(p.requires_grad, p.grad is None) for p in lm.model.parameters()], (
        "gradient flags changed"
    )
    assert hooks == _hooks(lm), "forward hooks were left in the model"
    assert not lm.model.training, "the model was left in training mode"
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state was used"
    editor.restore()
    _same(before, _weights(lm), "restore() is not bit-exact")


def _repeats(make: Make, lm: LM, facts: list[Fact]) -> None:
    deltas = []
    state = torch.random.get_rng_state()
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            editor = make(lm)
            deltas.append(editor.edit(facts))
            editor.restore()
    finally:
        torch.random.set_rng_state(state)
    _same(deltas[0].after, deltas[1].after, "two runs with equal options differ")


def _keeps_instances_apart(make: Make, lm: LM, facts: list[Fact]) -> None:
    expected = make(lm)
    alone = expected.edit(facts)
    expected.restore()
    first = make(lm)
    first.edit(facts[:1]).restore(lm)
    second = make(lm)
    _same(alone.after, second.edit(facts).after, "an earlier instance changed what a new one does")
    second.restore()
    again = first
    again.restore()
    _same(alone.after, again.edit(facts).after, "after restore() an editor still remembers")
    again.restore()


def _applies(make: Make, lm: LM, facts: list[Fact]) -> None:
    before = _weights(lm)
    editor = make(lm)
    delta = editor.edit(facts)
    delta.restore(lm)
    _same(before, _weights(lm), "delta.restore is not bit-exact")
    with tempfile.TemporaryDirectory() as folder:
        loaded = Delta.load(delta.save(Path(folder) / "delta.safetensors"))
    try:
        with loaded.applied(lm):
            _same(
                delta.after,
                {n: lm.parameter(n).detach() for n in delta.names},
                "a saved delta applies differently",
            )
            raise KeyError
    except KeyError:
        _same(before, _weights(lm), "applied() did not restore after an exception")
    name = delta.names[0]
    with torch.no_grad():
        lm.parameter(name).view(-1)[0] += 1.0
    _raises(ModelError, lambda: loaded.apply(lm), "a delta was applied to weights it was not made on")
    _put(lm, before)


def _refuses(make: Make, lm: LM, facts: list[Fact]) -> None:
    before = _weights(lm)
    fact = facts[0]
    bad: dict[str, list] = {
        "no facts": [],
        "something that is no fact": [("a", "b")],
        "an empty target": [fact.replace(target="  ")],
        "an empty subject": [fact.replace(subject="")],
        "a prompt without the subject": [fact.replace(prompt=fact.text)],
        "a prompt with two slots": [fact.replace(prompt=fact.prompt + " {}")],
        "duplicate facts": [fact, fact],
        "contradictory facts": [fact, fact.replace(target=fact.target + " " + fact.target)],
    }
    editor = make(lm)
    for what, requests in bad.items():
        _raises(RequestError, lambda r=requests: editor.edit(r), f"{what} was not refused")
        _same(before, _weights(lm), f"refusing {what} changed weights")
    _raises(ConfigError, lambda: make(lm, no_such_option=1), "an unknown option was not refused")
    if hasattr(editor.config, "layers"):
        _raises(ModelError, lambda: make(lm, layers=[lm.n_layers]), "an unknown layer was not refused")
        _raises(ConfigError, lambda: make(lm, layers=[]), "an empty list of layers was not refused")
    if editor.statistics:
        nan = {k: torch.full_like(C.C, torch.nan) for k, C in editor.statistics.items()}
        _raises(NumericsError, lambda: make(lm, statistics=nan), "NaN statistics were not refused")
        _raises(ConfigError, lambda: make(lm, statistics={}), "missing statistics were not refused")
    _same(before, _weights(lm), "a refused construction changed weights")


def _resumes(make: Make, lm: LM, facts: list[Fact]) -> None:
    before = _weights(lm)
    whole = make(lm)
    whole.edit(facts[:1])
    last = whole.edit(facts[1:])
    whole.restore()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.safetensors"
        part = make(lm)
        part.edit(facts[:1])
        part.save(path)
        part.restore()
        resumed = make(lm)
        resumed.load(path)
        _same(last.after, resumed.edit(facts[1:]).after, "a resumed stream ends in other weights")
        resumed.restore()
        _same(before, _weights(lm), "a resumed stream does not restore the original weights")
        with changed(lm, whole.parameter_names()):
            _raises(ModelError, lambda: make(lm).load(path), "the history of another model was not refused")


@contextmanager
def changed(lm: LM, except_for: Sequence[str]) -> Iterator[LM]:
    """The model with one entry of a parameter outside `except_for` changed, i.e. another base model."""
    name = next(n for n, _ in lm.model.named_parameters() if n not in except_for)
    entry = lm.parameter(name).detach().view(-1)
    old = entry[0].clone()
    with torch.no_grad():
        entry[0] += 1.0
    try:
        yield lm
    finally:
        with torch.no_grad():
            entry[0] = old


def _edited_elsewhere(make: Make, lm: LM, facts: list[Fact], original: dict[str, Tensor]) -> Delta:
    """A delta made on the original model; afterwards `lm` is as it was found."""
    found = _weights(lm)
    _put(lm, original)
    editor = make(lm)
    delta = editor.edit(facts)
    editor.restore()
    _put(lm, found)
    return delta


# --- memory editors ---------------------------------------------------------------------------------------------


def check_memory_editor(make: Make, lm: LM, facts: Sequence[Fact]) -> None:
    """Raise AssertionError unless the editor keeps every promise of `memory.base.MemoryEditor`.

    make:  make(lm, **changes) returns a new editor; it has to pass on the option `layer` and unknown ones.
    lm:    a small float32 model on the CPU.   facts: at least three edit requests it can take.

    Checked: nothing but hooks ever touches the model, and `detach` leaves none; editing changes what the model
    says, `detached` and `restore` give back the unedited model's logits bit for bit; equal seeds give equal
    memories whatever the global seed; no state leaks between instances; a stream that is saved, stopped and
    loaded ends in the same memory; bad requests, options and other models are refused before anything changes.
    """
    facts = list(facts)
    assert len(facts) >= 3, "the contract needs at least three facts"
    original, hooks = _weights(lm), _hooks(lm)
    unedited = _logits(lm, facts)
    for check in (_lives_beside, _repeats_memory, _keeps_memories_apart, _refuses_memory, _resumes_memory):
        try:
            check(make, lm, facts, unedited)
            _same(original, _weights(lm), f"{check.__name__[1:]} changed a weight")
            assert hooks == _hooks(lm), f"{check.__name__[1:]}: hooks were left in the model"
        finally:
            _put(lm, original)


def _logits(lm: LM, facts: Sequence[Fact]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {fact.text: lm.logits(lm.encode([fact.text]))[0] for fact in facts}


def _remembered(editor) -> dict[str, object]:
    return {"values": json.dumps(editor.memory()[0], sort_keys=True), **editor.state_dict()}


def _same_memory(a: dict, b: dict, message: str) -> None:
    assert a.keys() == b.keys(), f"{message}: {sorted(a.keys() ^ b.keys())}"
    differ = [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])]
    assert not differ, f"{message}: {differ}"


def _lives_beside(make: Make, lm: LM, facts: list[Fact], unedited: dict[str, Tensor]) -> None:
    before = _weights(lm)
    flags = [(p.requires_grad, p.grad is None) for p in lm.model.parameters()]
    state = torch.random.get_rng_state()
    tree = [(name, type(module), sorted(module.__dict__)) for name, module in lm.model.named_modules()]
    editor = make(lm)
    with editor.attached():
        _same(unedited, _logits(lm, facts), "a memory without edits changes logits")
    done = editor.edit(facts)
    assert editor.is_attached, "edit() must leave the memory attached"
    assert done.editor == editor.name and len(done.facts) == len(facts) == editor.n_facts
    _same(before, _weights(lm), "the edit changed weights")
    assert flags == [(p.requires_grad, p.grad is None) for p in lm.model.parameters()], (
        "gradient flags changed"
    )
    assert not lm.model.training, "the model was left in training mode"
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state was used"
    edited = _logits(lm, facts)
    assert any(not torch.equal(edited[k], unedited[k]) for k in edited), "the edit changed nothing"
    with editor.detached():
        _same(unedited, _logits(lm, facts), "the detached model is not the unedited one")
    _same(edited, _logits(lm, facts), "attaching again gives other logits")
    editor.restore()
    _same(unedited, _logits(lm, facts), "restore() does not give the unedited model")
    now = [(name, type(module), sorted(module.__dict__)) for name, module in lm.model.named_modules()]
    assert tree == now, "the module tree was changed"


def _repeats_memory(make: Make, lm: LM, facts: list[Fact], unedited: dict[str, Tensor]) -> None:
    found = []
    state = torch.random.get_rng_state()
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            editor = make(lm)
            editor.edit(facts)
            found.append(_remembered(editor))
            editor.restore()
    finally:
        torch.random.set_rng_state(state)
    _same_memory(*found, "two runs with equal options differ")


def _keeps_memories_apart(make: Make, lm: LM, facts: list[Fact], unedited: dict[str, Tensor]) -> None:
    first = make(lm)
    first.edit(facts)
    alone = _remembered(first)
    first.detach()
    second = make(lm)
    second.edit(facts[:1])
    second.detach()
    _same_memory(alone, _remembered(first), "another instance changed this one's memory")
    second.restore()
    second.edit(facts)
    _same_memory(alone, _remembered(second), "after restore() an editor still remembers")
    second.restore()


def _refuses_memory(make: Make, lm: LM, facts: list[Fact], unedited: dict[str, Tensor]) -> None:
    fact = facts[0]
    editor = make(lm)
    editor.edit(facts[:1])
    before = _remembered(editor)
    bad: dict[str, list] = {
        "no facts": [],
        "something that is no fact": [("a", "b")],
        "an empty target": [fact.replace(target="  ")],
        "an empty subject": [fact.replace(subject="")],
        "a prompt without the subject": [fact.replace(prompt=fact.text)],
        "duplicate facts": [fact, fact],
        "contradictory facts": [fact, fact.replace(target=fact.target + " " + fact.target)],
    }
    for what, requests in bad.items():
        _raises(RequestError, lambda r=requests: editor.edit(r), f"{what} was not refused")
        _same_memory(before, _remembered(editor), f"refusing {what} changed the memory")
    other = make(lm)
    _raises(ModelError, other.attach, "two memories were attached at once")
    editor.detach()
    with changed(lm, ()):
        _raises(ModelError, editor.attach, "the memory was attached to another model")
        _raises(ModelError, lambda: editor.edit(facts[1:2]), "the memory was continued on another model")
    editor.restore()
    _raises(ConfigError, lambda: make(lm, no_such_option=1), "an unknown option was not refused")
    if hasattr(editor.config, "layer"):
        _raises(ModelError, lambda: make(lm, layer=lm.n_layers), "an unknown layer was not refused")


def _resumes_memory(make: Make, lm: LM, facts: list[Fact], unedited: dict[str, Tensor]) -> None:
    whole = make(lm)
    for fact in facts:
        whole.edit([fact])
    end, said = _remembered(whole), _logits(lm, facts)
    whole.restore()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.safetensors"
        part = make(lm)
        part.edit(facts[:1])
        part.save(path)
        part.restore()
        resumed = make(lm)
        resumed.load(path)
        assert resumed.is_attached, "load() must leave the memory attached"
        for fact in facts[1:]:
            resumed.edit([fact])
        _same_memory(end, _remembered(resumed), "a resumed stream ends in another memory")
        _same(said, _logits(lm, facts), "a resumed stream ends in other logits")
        resumed.restore()
        with changed(lm, ()):
            _raises(ModelError, lambda: make(lm).load(path), "the memory of another model was not refused")
