"""PackNet, GPM, SupSup, SparCL in the residual memory: the contract, and what each may touch."""

from __future__ import annotations

import pytest
import torch

from editkit.methods import make_editor
from editkit.methods.contract import check_memory_editor

NAMES = ("packnet", "gpm", "supsup", "sparcl")
TEXTS = ["London in Italy", "Mary plays the piano", "The weather was fine today."]
OPTIONS = {
    "packnet": {"keep": 5}, "gpm": {"energy": 0.5}, "supsup": {}, "sparcl": {"density": 0.3},
}  # fmt: skip


def make(name, lm, **changes):
    options = {"layer": 1, "k": 6, "threshold": 0.7, "steps": 3, **OPTIONS[name], **changes}
    return make_editor(name, lm, contexts=[["{}"], ["Because {}"]], background=TEXTS, **options)


@pytest.mark.parametrize("name", NAMES)
def test_contract(tiny_lm, facts, name):
    check_memory_editor(lambda lm, **changes: make(name, lm, **changes), tiny_lm("llama"), facts)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_takes(tiny_lm, facts, name):
    lm = tiny_lm("gpt2", "wordlevel")
    start = make(name, lm, steps=1).edit(facts[:1]).metadata["losses"][0]
    lm = tiny_lm("gpt2", "wordlevel")
    after = make(name, lm, steps=40).edit(facts[:1]).metadata["losses"][0]
    assert after < 0.5 * start


def test_packnet_columns_are_frozen_and_run_out(tiny_lm, facts):
    editor = make("packnet", tiny_lm("llama"), keep=8)
    before = None
    for i, fact in enumerate(facts):
        done = editor.edit([fact])
        if before is not None:
            old = (editor.owner >= 0) & (editor.owner < i)
            assert torch.equal(editor.weight[:, old], before[:, old])
        before = editor.weight.clone()
        free = editor.owner < 0
        assert int(free.sum()) == max(0, 24 - 8 * (i + 1)) and not editor.weight[:, free].any()
    assert done.metadata["steps"] == [1]  # the fourth finds no column
    assert editor.mask_of_edit == [0, 1, 2, 3]
    assert editor.columns(torch.tensor([0, 2])).sum(-1).tolist() == [8, 24]


def test_gpm_leaves_the_inputs_of_earlier_edits_alone(tiny_lm, facts):
    editor = make("gpm", tiny_lm("llama"), energy=0.7)
    editor.edit(facts[:1])
    basis, before = editor.basis, editor.weight.clone()
    assert 0 < basis.shape[1] < 24 and torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    editor.edit(facts[1:2])
    change = editor.weight - before
    assert change.norm() > 1e-2
    assert (change @ basis).norm() < 1e-4 * change.norm()
    assert torch.allclose(editor.basis[:, : basis.shape[1]].abs(), basis.abs(), atol=1e-4)  # it only grows


def test_supsup_weights_never_move_and_masks_have_their_density(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make("supsup", lm)
    start = editor.weight.clone()
    editor.edit(facts[:2])
    assert torch.equal(editor.weight, start)
    for index in editor.mask_of_edit:
        assert int(editor._entries(index).sum()) == round(0.5 * start.numel())
    assert not torch.equal(editor._entries(0), editor._entries(1))


def test_sparcl_keeps_its_sparsity(tiny_lm, facts):
    editor = make("sparcl", tiny_lm("llama"), density=0.2)
    editor.edit(facts)
    assert 0 < int((editor.weight != 0).sum()) <= round(0.2 * editor.weight.numel())
