"""WISE: merging, routing, shards, the stream's state, the released form."""

from __future__ import annotations

import copy

import pytest
import torch

from editkit.base.errors import ConfigError, ModelError, NumericsError, RequestError
from editkit.methods import make_editor
from editkit.methods.memory.wise_merge import ties, trim
from editkit.methods.memory.wise_rows import hinge
from editkit.models.facts import Fact
from editkit.scoring import score_targets

OPTIONS = {"layer": 0, "steps": 4, "lr": 0.5, "alpha": 0.1, "beta": 0.5, "gamma": 0.3, "n_contexts": 2,
           "act_ratio": 0.5}  # fmt: skip
TEXTS = ["the weather was fine today", "you can see the old house", "near the river"]


def make(lm, **changes):
    return make_editor("wise", lm, background=TEXTS, **{**OPTIONS, **changes})


def test_ties_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    a, b = base + torch.tensor([4.0, -2.0, 0.1, 3.0]), base + torch.tensor([2.0, 3.0, 0.2, -3.0])
    # trimmed to three entries of four; entry 2 is dropped by both, entry 3 sums to zero and counts as positive
    assert torch.equal(ties(base, [a, b], 0.75), base + torch.tensor([3.0, 3.0, 0.0, 3.0]))
    assert torch.equal(ties(base, [a], 1.0), a)
    # weights 0.9 and 0.1 turn the sign of entry 1
    weighted = ties(base, [a, b], 1.0, [0.9, 0.1])
    torch.testing.assert_close(weighted[:2], base[:2] + torch.tensor([3.8, -2.0]))
    assert torch.equal(ties(base, [base, base], 0.5), base)


def test_trim_keeps_exactly_the_share():
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    kept = trim(x, 0.53)
    assert int((kept != 0).sum()) == int(0.53 * 91)
    assert kept.abs()[kept != 0].min() >= x.abs()[kept == 0].max()


def test_merging_refuses_nonsense():
    W = torch.zeros(2, 2)
    with pytest.raises(ConfigError, match="empty"):
        ties(W, [])
    with pytest.raises(ConfigError, match="one positive weight"):
        ties(W, [W, W], 0.5, [1.0])
    with pytest.raises(NumericsError, match="cannot be merged"):
        ties(W, [torch.zeros(3, 2)])
    with pytest.raises(ConfigError, match="keeps none"):
        trim(W, 0.1)


def test_hinges():
    values = torch.tensor([2.0, -1.0, 0.0])
    assert float(hinge(values, True)) == 2.0
    assert float(hinge(values, False)) == pytest.approx(2 / 3)
    assert float(hinge(-values.abs(), True)) == 0.0


@pytest.mark.parametrize("retrieve", [True, False])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_stream_resumes_to_the_same_bits(tiny_lm, facts, tmp_path, retrieve, form):
    lm = tiny_lm("llama")
    options = {"retrieve": retrieve, "form": form, "save_every": 1, "merge_every": 2, "replay": retrieve}
    options |= {"steps": 2, "n_contexts": 1}
    whole = make(lm, **options)
    whole.edit(facts)
    expected, values = whole.state_dict(), copy.deepcopy(whole.memory()[0])
    whole.restore()
    part = make(lm, **options)
    part.edit(facts[:3])
    path = part.save(tmp_path / "wise.safetensors")
    part.restore()
    resumed = make(lm, **options)
    resumed.load(path)
    resumed.edit(facts[3:])
    found = resumed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert resumed.memory()[0] == values
    assert resumed.merges == (2 if retrieve else 0)


def test_without_a_trace(any_lm, facts):
    encoding = any_lm.encode(["The mother tongue of Ana Silva is", "Li plays"], "left")
    before = any_lm.logits(encoding)
    weights = {n: p.detach().clone() for n, p in any_lm.model.named_parameters()}
    editor = make(any_lm)
    editor.edit(facts[:1])
    inside = any_lm.logits(encoding)
    editor.detach()
    assert torch.equal(any_lm.logits(encoding), before)
    assert all(torch.equal(weights[n], p) for n, p in any_lm.model.named_parameters())
    assert not torch.equal(inside[0], before[0])
    editor.restore()


def test_only_masked_entries_move_and_stay_within_the_limit(tiny_lm, facts):
    editor = make(tiny_lm("llama"), limit=0.05, mask_ratio=0.3, steps=6)
    W = editor.weight.clone()
    editor.edit(facts[:2])
    moved = (editor.new - W).abs()
    assert float(moved.max()) <= 0.05 + 1e-6
    assert bool((moved[editor.mask == 0] == 0).all()) and bool((moved > 0).any())


def test_routing_separates_edit_from_irrelevant(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, steps=25, alpha=0.2, beta=3.0, gamma=2.0, limit=None, mask_ratio=0.5)
    [before] = score_targets(lm, [(facts[0].text, facts[0].target)])
    editor.edit(facts[:1])
    acts = {}
    editor.record = lambda name, value: acts.setdefault(name, []).append(value.detach())
    text = facts[0].text
    [edited] = score_targets(lm, [(text, facts[0].target)])
    lm.logits(lm.encode(TEXTS[:1]))
    bound = editor.memories()[0][1]
    assert float(acts["activation"][0]) >= bound > float(acts["activation"][1])
    assert edited.nll < 0.6 * before.nll
    editor.restore()


def test_every_row_is_routed_on_its_own(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, steps=8, beta=2.0)
    editor.edit(facts[:1])
    texts = [facts[0].text, TEXTS[0], facts[1].text]
    together = [lm.logits(lm.encode(texts, side)) for side in ("left", "right")]
    for i, text in enumerate(texts):
        alone = lm.logits(lm.encode([text]))[0, -1]
        width = len(lm.encode([text]).input_ids[0])
        torch.testing.assert_close(together[0][i, -1], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1][i, width - 1], alone, atol=1e-4, rtol=1e-4)


def test_generation_keeps_the_route_of_the_prompt(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, steps=8, beta=2.0)
    editor.edit(facts[:1])
    encoding = lm.encode([facts[0].text])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = lm.model.generate(**encoding, **options)
    ids = encoding.input_ids
    from editkit.models.prompts import prompts

    for _ in range(5):
        with prompts(lm, [len(encoding.input_ids[0])]), torch.no_grad():
            best = lm.model(input_ids=ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    assert cached.tolist()[0][: ids.shape[1]] == ids.tolist()[0][: cached.shape[1]]


def test_merge_mode_reads_without_changing_the_stream(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, retrieve=False, save_every=1, merge_every=2)
    editor.edit(facts[:1])
    before = editor.state_dict()
    lm.logits(lm.encode([facts[0].text]))
    assert all(torch.equal(before[k], v) for k, v in editor.state_dict().items())
    assert torch.equal(editor.memories()[0][0], ties(editor.weight, editor.shards, 0.53))


def test_bad_input(tiny_lm, facts):
    lm = tiny_lm("llama")
    with pytest.raises(ConfigError, match="no multiple of save_every"):
        make(lm, save_every=2, merge_every=3)
    with pytest.raises(ModelError, match="layer 5 does not exist"):
        make(lm, layer=5)
    with pytest.raises(RequestError, match="background must be"):
        make_editor("wise", lm, background=[" "])
    with pytest.raises(RequestError, match="empty target"):
        make(lm).edit([Fact("{} is", "Li", " ")])
    with pytest.raises(NumericsError, match="lower lr"):
        make(lm, lr=1e30, steps=9, limit=None).edit(facts[:1])
