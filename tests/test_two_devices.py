"""Models whose blocks sit on two devices: keys, targets, second moments and edits are those of the whole model.

The devices are pretended (`two_devices`): values are computed on the CPU, places are tracked and checked.
"""

import pytest
import torch
from conftest import SENTENCES, make_lm
from two_devices import FIRST, SECOND, pretend

from editkit.locate.keys import compute_keys, read_states
from editkit.locate.moments import second_moment
from editkit.locate.targets import TargetConfig, optimize_targets
from editkit.methods import make_editor
from editkit.models.capacity import memory_plan

CONTEXTS = [["{}"], ["The weather was fine today. {}"]]
Z = {"z_lr": 0.3, "z_steps": 3, "z_clamp_factor": 2.0}


def split(lm, at=2):
    return pretend(lm, at)


def test_the_pretence_is_strict(facts):
    lm = make_lm("llama", n_layers=4)
    with split(lm) as places:
        assert lm.device() == lm.device(0) == lm.device(1) == FIRST and lm.device(2) == lm.device(3) == SECOND
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            lm.weight(0) @ lm.weight(3).T
        logits = lm.logits(lm.encode(["Ana Silva speaks"]))
        assert logits.device == SECOND and places.checked > 50
        assert (lm.weight(0).to(SECOND) @ lm.weight(3).T).device == SECOND


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_keys_targets_and_moments(model_type, facts):
    lm = make_lm(model_type, n_layers=4)

    def measure():
        keys = compute_keys(lm, facts, [1, 2], contexts=CONTEXTS)
        states = read_states(lm, facts, outputs=[lm.block_name(1), lm.block_name(3)])
        moments = second_moment(lm, [1, 3], SENTENCES)
        targets = [
            optimize_targets(
                lm, facts, layer, TargetConfig(lr=0.3, steps=3, clamp_factor=2.0), contexts=CONTEXTS
            ).z
            for layer in (1, 3)
        ]
        return [*keys.values(), *states.output.values(), *(c.C for c in moments.values()), *targets]

    whole = measure()
    with split(lm):
        divided = measure()
        places = [x.device for x in divided]
    assert places == [FIRST, SECOND] * 4
    for a, b in zip(whole, divided, strict=True):
        assert torch.allclose(a, b, atol=1e-6 * float(a.abs().max()))


EDITORS = {
    "memit": {"lam": 10.0},
    "memit_seq": {"lam": 10.0, "spread": "consecutive"},
    "alphaedit": {"threshold": 0.5, "ridge": 1.0},
    "nse": {"lam": 10.0, "alpha": 0.0, "upper_bound": 1e9},
    "rome": {},
    "ft": {"lr": 0.01, "steps": 2},
}


@pytest.mark.parametrize("name", EDITORS)
def test_edits(name, facts):
    options = dict(EDITORS[name])
    layers = [2] if name == "rome" else [1, 2]
    options |= {"layers": layers} if name == "ft" else {"layers": layers, "contexts": CONTEXTS, **Z}

    def write(lm, C=None):
        more = {} if name == "ft" else {"statistics": C}
        editor = make_editor(name, lm, **options, **more)
        delta = editor.edit(facts[:2])
        return editor, delta

    lm = make_lm("llama", n_layers=4)
    C = {
        x: c.C + 0.05 * torch.eye(len(c.C), dtype=torch.float64)
        for x, c in second_moment(lm, layers, SENTENCES).items()
    }
    editor, _ = write(lm, C)
    whole = {x: lm.get_matrix(x) for x in layers}
    editor.restore()
    start = {x: lm.get_matrix(x) for x in layers}
    with split(lm):
        editor, delta = write(lm, {x: c.to(lm.device(x)) for x, c in C.items()})
        divided = {x: lm.get_matrix(x) for x in layers}
        assert [divided[x].device for x in layers] == [lm.device(x) for x in layers]
        editor.restore()
        delta.apply(lm)
        assert all(torch.equal(lm.get_matrix(x), divided[x]) for x in layers)
        delta.restore(lm)
    for x in layers:
        moved = float((whole[x] - start[x]).norm())
        assert moved > 0 and float((whole[x] - divided[x]).norm()) < 1e-4 * moved
        assert torch.equal(lm.get_matrix(x), start[x])


@pytest.mark.parametrize("method", ["memit_seq", "alphaedit", "rome", "rect"])
def test_without_room_a_layer_is_solved_on_the_host(method, facts, monkeypatch):
    """A fake memory probe: the devices say that they have a byte too little for the plan, or just enough."""
    lm = make_lm("llama", n_layers=4)
    layers = [1] if method == "rome" else [1, 2]
    options = {"layers": layers, "contexts": CONTEXTS, **Z}
    if method == "alphaedit":
        options["threshold"] = 1e3
    statistics = second_moment(lm, layers, SENTENCES)

    def twice(free):
        asked = []
        monkeypatch.setattr("editkit.base.device.free_bytes", lambda device: asked.append(device) or free)
        editor = make_editor(method, lm, statistics=statistics, **options)
        try:
            after = editor.edit(facts[:2]).after | editor.edit(facts[2:3]).after
            places = {editor.solve_device(layer) for layer in layers}
        finally:
            editor.restore()
        assert asked, "nobody asked for the memory"
        return after, places

    plan = memory_plan(lm, layers, lm.dtype, method)
    with split(lm):
        near, here = twice(plan.beside)
        far, there = twice(plan.beside - 1)
    assert here == ({FIRST} if method == "rome" else {FIRST, SECOND})
    assert there == {torch.device("cpu")}
    for name, value in near.items():
        torch.testing.assert_close(far[name], value, rtol=0, atol=0)
