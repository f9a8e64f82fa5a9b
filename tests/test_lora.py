"""LoRA: the contract of editors, the adapter's arithmetic, peft leaves no trace."""

from __future__ import annotations

import pytest
import torch

from editkit.base.errors import ModelError
from editkit.methods import make_editor
from editkit.methods.contract import check_editor
from editkit.models.facts import Fact

OPTIONS = {"steps": 3, "lr": 0.02, "rank": 2, "alpha": 4.0}


def make(lm, **changes):
    return make_editor("lora", lm, **{**OPTIONS, **changes})


def test_contract(tiny_lm, facts):
    check_editor(make, tiny_lm("llama"), facts)


def test_every_architecture(any_lm, facts):
    before = {n: p.detach().clone() for n, p in any_lm.model.named_parameters()}
    modules = [name for name, _ in any_lm.model.named_modules()]
    attributes = set(vars(any_lm.model))
    editor = make(any_lm)
    delta = editor.edit(facts)
    assert [name for name, _ in any_lm.model.named_modules()] == modules
    assert set(vars(any_lm.model)) == attributes
    for name, weight in delta.before.items():
        change = delta.after[name].double() - weight.double()
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name
        part = name.removesuffix(".weight")
        BA = editor.adapter[f"{part}:B"] @ editor.adapter[f"{part}:A"] * 2.0
        found = change if any_lm.spec.orientation == "linear" else change.T
        torch.testing.assert_close(found.float(), BA, atol=1e-6, rtol=1e-4)
    editor.restore()
    assert all(torch.equal(before[n], p) for n, p in any_lm.model.named_parameters())


def test_it_learns_and_goes_on_from_the_same_adapter(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, steps=40, blocks=[1], modules=["down_proj", "v_proj"], rank=4)
    first = editor.edit(facts[:1])
    assert first.metadata["losses"][1] < 0.3 * first.metadata["losses"][0]
    assert all(".layers.1." in name for name in first.names)
    again = editor.edit([facts[0].replace(prompt="Mother tongue of {}:")])
    for name, weight in editor.base.items():
        assert torch.equal(weight, first.before[name]) and torch.equal(first.after[name], again.before[name])


def test_dropout_is_seeded(tiny_lm, facts):
    lm = tiny_lm("llama")
    found = []
    for _ in range(2):
        editor = make(lm, dropout=0.2)
        found.append(editor.edit(facts[:2]).after)
        editor.restore()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_unknown_modules_are_named(tiny_lm):
    with pytest.raises(ModelError, match=r"no linear module 'w_q'.*q_proj"):
        make(tiny_lm("llama"), modules=["w_q"])
    with pytest.raises(ModelError, match="layer 7 does not exist"):
        make(tiny_lm("llama"), blocks=[7])


def test_a_bfloat16_model_keeps_float32_masters(tiny_lm):
    lm = tiny_lm("llama")
    lm.model.to(torch.bfloat16)
    delta = make(lm, steps=2, blocks=[0]).edit([Fact("{} plays the", "Hugo Castro", "violin")])
    assert all(v.dtype == torch.float32 for v in delta.after.values())
