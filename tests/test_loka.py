"""LOKA: mapping, conflicts, router, files."""

from __future__ import annotations

import pytest
import torch

from editkit.base.errors import ConfigError, ModelError
from editkit.methods import make_editor
from editkit.methods.memory.loka import fit_router
from editkit.scoring import score_targets

TEXTS = ["the weather was fine today", "you can see the old house", "near the river", "she works and speaks"]
OPTIONS = {"layer": 0, "steps": 6, "n_contexts": 2}


def make(lm, **changes):
    return make_editor("loka", lm, background=TEXTS, **{**OPTIONS, **changes})


def test_router_separates_what_can_be_separated():
    slope, offset = fit_router(torch.tensor([0.9, 0.8, 0.95]), torch.tensor([0.1, 0.3, 0.2])).tolist()
    assert slope > 0 and slope * 0.85 + offset > 0 > slope * 0.25 + offset


@pytest.mark.parametrize("n", [1, 2])
def test_memories_are_opened_while_there_is_room(tiny_lm, facts, n):
    editor = make(tiny_lm("llama"), n_memories=n, similarity=1.0)
    editor.edit(facts)
    assert len(editor.centers) == n and len(editor.memories) == 2 * n
    assert len(editor.where) == 4 and max(editor.where) < 2 * n


def test_a_conflicting_edit_gets_the_second_memory(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, n_memories=1, conflict=0.0, steps=15)
    editor.edit(facts[:1])
    first = editor.memories[0].clone()
    editor.edit([facts[0].replace(target="Spanish")])
    assert editor.where in ([0], [1])
    if editor.where == [1]:
        assert torch.equal(editor.memories[0], first)


def test_it_learns_and_leaves_no_trace(any_lm, facts):
    before = any_lm.logits(any_lm.encode([facts[0].text]))
    editor = make(any_lm)
    losses = editor.edit(facts[:2]).metadata["losses"]
    assert all(last < first for first, last in losses)
    editor.restore()
    assert torch.equal(any_lm.logits(any_lm.encode([facts[0].text])), before)


def test_resumed_stream_equals_the_whole_one(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")
    whole = make(lm)
    whole.edit(facts[:3])
    whole.edit(facts[3:])
    expected = whole.state_dict()
    answer = score_targets(lm, [(facts[0].text, facts[0].target)])[0].nll
    whole.restore()
    part = make(lm)
    part.edit(facts[:3])
    path = part.save(tmp_path / "loka.safetensors")
    part.restore()
    resumed = make(lm)
    resumed.load(path)
    resumed.edit(facts[3:])
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in expected.items())
    assert score_targets(lm, [(facts[0].text, facts[0].target)])[0].nll == answer


def test_bad_input(tiny_lm, facts):
    with pytest.raises(ModelError, match="layer 6 does not exist"):
        make(tiny_lm("llama"), layer=6)
    with pytest.raises(ConfigError, match="two templates or more"):
        make_editor("loka", tiny_lm("llama"), background=TEXTS, contexts=["{}"], layer=0).edit(facts)
