"""DEFER: gate and values, the missing negatives, files."""

from __future__ import annotations

import pytest
import torch

from editkit.methods import make_editor
from editkit.methods.memory.defer import gate

OPTIONS = {"layer": 0, "steps": 15, "lr": 0.05, "loss_threshold": 0.02}


def make(lm, **changes):
    return make_editor("defer", lm, **{**OPTIONS, **changes})


def test_gate_by_hand():
    memory = {"gate_weight": torch.tensor([[2.0, 0.0]]), "gate_bias": torch.tensor([-1.0]),
              "value_weight": torch.tensor([[1.0, 1.0]]), "value_bias": torch.tensor([0.5])}  # fmt: skip
    p, v = gate(torch.tensor([[0.5, 7.0], [3.0, 0.0]]), memory)
    torch.testing.assert_close(p, torch.sigmoid(torch.tensor([0.0, 5.0])))
    torch.testing.assert_close(v, torch.tensor([[8.0], [3.5]]))


@pytest.mark.parametrize("query", ["prompt_last", "sequence_last"])
def test_it_learns_the_answer_and_leaves_no_trace(any_lm, facts, query):
    before = any_lm.logits(any_lm.encode([facts[1].text]))
    editor = make(any_lm, query=query)
    losses = editor.edit(facts[:1]).metadata["losses"][0]
    assert losses[1] < 0.9 * losses[0]
    editor.restore()
    assert torch.equal(any_lm.logits(any_lm.encode([facts[1].text])), before)
    assert not editor.trained


def test_the_gate_decides_per_row(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, steps=5)
    editor.edit(facts[:1])
    texts = [facts[0].text, facts[1].text]
    with editor.detached():
        before = lm.logits(lm.encode(texts, "left"))
    q = {"gate_weight": torch.zeros_like(editor.gate["gate_weight"])}
    for bias, same in ((-5.0, True), (5.0, False)):
        editor.gate |= q | {"gate_bias": torch.tensor([bias])}
        assert torch.equal(lm.logits(lm.encode(texts, "left")), before) is same


def test_resumed_stream_equals_the_whole_one(tiny_lm, facts, tmp_path):
    lm = tiny_lm("gpt2")
    whole = make(lm, steps=3)
    whole.edit(facts)
    expected = whole.state_dict()
    whole.restore()
    part = make(lm, steps=3)
    part.edit(facts[:2])
    path = part.save(tmp_path / "defer.safetensors")
    part.restore()
    resumed = make(lm, steps=3)
    resumed.load(path)
    resumed.edit(facts[2:])
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in expected.items())
    resumed.restore()
