"""MEMOIR: TopHash, minimal overwrite, informed retention, batches, files, released behaviour, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import MODEL_TYPES
from hypothesis import given
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, ModelError, NumericsError, RequestError
from editkit.methods import make_editor
from editkit.methods.contract import check_memory_editor
from editkit.methods.memory import masks as store
from editkit.methods.memory.masks import MaskStore
from editkit.methods.memory.memoir import Memoir, sample_prefixes
from editkit.methods.memory.tophash import TopHash, draw_permutation, mean_features, random_masks
from editkit.models.prompts import prompts
from editkit.scoring import evaluate

CONTEXTS = [["{}"], ["You can see {}", "Because {}"]]
BACKGROUND = ["The weather was fine today.", "I think that Mary plays the piano", "London"]
FAST = {"layer": 1, "k": 6, "threshold": 0.7, "steps": 4}


def make(lm, **changes):
    return make_editor("memoir", lm, contexts=CONTEXTS, background=BACKGROUND, **{**FAST, **changes})


def bits(rng, n, d):
    return torch.from_numpy(rng.random((n, d)) < 0.4)


# --- bits ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 99))
def test_packed_masks_count_like_sets(d, n, seed):
    rng = np.random.default_rng(seed)
    masks, queries = bits(rng, n, d), bits(rng, 4, d)
    assert torch.equal(store.unpack(store.pack(masks), d), masks)
    words = store.pack(queries)
    assert torch.equal(store.popcount(words).sum(-1), queries.sum(-1))
    assert torch.equal(store._popcount_by_shifts(words), store.popcount(words))
    memory = MaskStore(d)
    index = [memory.add(m) for m in masks]
    assert len(memory) == len(set(index)) == len({tuple(m.tolist()) for m in masks})
    wanted = queries.double() @ memory.masks(torch.arange(len(memory))).double().T
    assert torch.equal(memory.overlaps(queries).double(), wanted)
    overlap, first = memory.best(queries)
    assert torch.equal(overlap.double(), wanted.amax(-1))
    assert first.tolist() == [int(np.argmax(row)) for row in wanted.numpy()]
    assert int(store._first_largest(memory.overlaps(queries[:1])[0])) == int(first[0])
    again = MaskStore.of(memory.packed, d)
    assert torch.equal(again.packed, memory.packed) and again.add(masks[0]) == index[0]


def test_a_store_grows():
    masks = bits(np.random.default_rng(0), 150, 70)
    memory = MaskStore(70)
    for mask in masks:
        memory.add(mask)
    assert torch.equal(memory.overlaps(masks[:3]).double(), masks[:3].double() @ masks.double().T)
    with pytest.raises(NumericsError, match="no masks"):
        MaskStore(5).best(torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(NumericsError, match="stored twice"):
        MaskStore.of(memory.packed[[0, 0]], 70)


# --- TopHash ------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.integers(0, 99))
def test_tophash_is_the_permuted_top_k_of_the_centred_feature(d, seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, d + 1))
    features, center = rng.normal(size=(3, d)), rng.normal(size=d)
    pi = draw_permutation(d, seed)
    found = TopHash(torch.tensor(center), pi, k)(torch.tensor(features))
    for row, f in zip(found, features, strict=True):
        top = np.argsort(-np.abs(f - center))[:k]
        assert set(row.nonzero()[:, 0].tolist()) == set(pi.numpy()[top].tolist())
    # the permutation decides where an edit is written, not whether it is found
    plain = TopHash(torch.tensor(center), torch.arange(d), k)(torch.tensor(features))
    assert torch.equal(plain.double() @ plain.double().T, found.double() @ found.double().T)


def test_random_masks_depend_on_the_tokens_alone():
    a, b, c = random_masks([[1, 2, 3], [1, 2, 3], [1, 2, 4]], 400, 100, seed=0)
    assert torch.equal(a, b) and int(a.sum()) == 100
    assert abs(int((a & c).sum()) - 25) < 20
    assert not torch.equal(a, random_masks([[1, 2, 3]], 400, 100, seed=1)[0])


def test_mean_features_ignore_padding_and_batches(tiny_lm):
    lm = tiny_lm("gpt2")
    many = mean_features(lm, 1, BACKGROUND)
    one = torch.cat([mean_features(lm, 1, [t], batch_size=1) for t in BACKGROUND])
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-4)


# --- the editor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_contract(tiny_lm, facts, model_type):
    check_memory_editor(make, tiny_lm(model_type), facts)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layer", [0, 1])
def test_training_from_the_layer_on_is_training_through_the_whole_model(
    tiny_lm, facts, model_type, layer, monkeypatch
):
    lm = tiny_lm(model_type)
    fast = make(lm, layer=layer, steps=2)
    fast.edit(facts[:1])
    assert fast._last_rows.additive
    fast.detach()
    monkeypatch.setattr("editkit.methods.memory.training_rows._is_additive", lambda *args: False)
    whole = make(lm, layer=layer, steps=2)
    whole.edit(facts[:1])
    assert not whole._last_rows.additive
    torch.testing.assert_close(fast.weight, whole.weight, atol=1e-5, rtol=1e-3)
    assert fast.weight.abs().max() > 1e-3


def test_the_loss_is_that_of_the_edited_model(tiny_lm, facts):
    """After one step, the loss of the next one is what the attached model says on the rows."""
    lm = tiny_lm("llama")
    fact = facts[0]
    editor = make(lm, steps=2, stop_loss=0.0)
    losses = editor.edit([fact]).metadata["losses"]
    editor.restore()
    editor = make(lm, steps=1, stop_loss=0.0)
    editor.edit([fact])
    total = []
    route = editor.look_up([fact.text])
    for template in editor.contexts.flat:
        prompt = template.replace("{}", fact.text)
        ids = lm.encode([f"{prompt} {fact.target}"]).input_ids
        n = int(lm.encode([prompt]).lengths[0])
        editor.route = lambda x, out, state: type_route(editor, route)
        with torch.no_grad(), prompts(lm, [n]):
            logp = lm.model(input_ids=ids).logits[0].double().log_softmax(-1)
        total.append(float(np.mean([-logp[t - 1, ids[0, t]] for t in range(n, ids.shape[1])])))
    assert losses[0] == pytest.approx(np.mean(total), abs=1e-5)


def type_route(editor, found):
    """The route of the bare prompt for whatever is fed: training uses its mask in every row."""
    from editkit.methods.memory.memoir import Route

    return Route(found, torch.tensor([0]), editor.masks.masks(found.index).to(editor.weight))


def test_an_edit_writes_its_own_columns_only(tiny_lm, facts):
    editor = make(tiny_lm("llama"))
    for i, fact in enumerate(facts):
        before = editor.weight.clone()
        editor.edit([fact])
        moved = (editor.weight != before).any(0)
        own = editor.masks.masks(torch.tensor([editor.mask_of_edit[i]]))[0]
        assert moved.any() and not (moved & ~own).any()
        assert int(own.sum()) == editor.k


def test_weight_decay_of_the_release_erodes_other_edits(tiny_lm, facts):
    kept, eroded = make(tiny_lm("llama")), make(tiny_lm("llama"), weight_decay=0.01)
    for editor in (kept, eroded):
        editor.edit(facts[:1])
    before = eroded.weight.clone()
    steps = eroded.edit(facts[1:2]).metadata["steps"][0]
    others = ~eroded.masks.masks(torch.tensor([1]))[0]
    torch.testing.assert_close(eroded.weight[:, others], before[:, others] * 0.99**steps)


def test_edited_prompts_are_found_and_others_pass_by(tiny_lm, facts):
    lm = tiny_lm("gpt2")
    base = {f.text: lm.logits(lm.encode([f.text])) for f in facts}
    editor = make(lm, threshold=0.99)
    editor.edit(facts[:2])
    found = editor.look_up([f.text for f in facts])
    assert found.overlap[:2].tolist() == [1.0, 1.0] and found.index[:2].tolist() == editor.mask_of_edit
    assert found.active.tolist() == [True, True, False, False]
    for fact, active in zip(facts, found.active.tolist(), strict=True):
        same = torch.equal(lm.logits(lm.encode([fact.text])), base[fact.text])
        assert same is not active
    never = make(tiny_lm("gpt2"), threshold=1.01)
    never.edit(facts[:1])
    assert torch.equal(never.lm.logits(lm.encode([facts[0].text])), base[facts[0].text])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_batch_reads_several_edits_and_none(tiny_lm, facts, model_type, side):
    lm = tiny_lm(model_type)
    editor = make(lm, threshold=0.95)
    editor.edit(facts[:3])
    texts = [f.text for f in facts] + ["I think that Mary plays"]
    encoding = lm.encode(texts, side)
    together = lm.logits(encoding)
    with editor.detached():
        base = lm.logits(encoding)
    for i, text in enumerate(texts):
        rows = encoding.attention_mask[i].bool()
        alone = lm.logits(lm.encode([text]))[0]
        torch.testing.assert_close(together[i][rows], alone, atol=2e-5, rtol=1e-4)
        assert torch.equal(together[i][rows], base[i][rows]) is (i >= 3)


def test_the_edit_takes_and_is_generated(tiny_lm, facts):
    lm = tiny_lm("llama", "wordlevel")
    editor = make(lm, steps=60, k=12, threshold=0.8)
    for fact in facts[:2]:
        editor.restore()
        editor.edit([fact])
        encoding = lm.encode([fact.text])
        ids = lm.model.generate(
            input_ids=encoding.input_ids, attention_mask=encoding.attention_mask, max_new_tokens=2, do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id,
        )  # fmt: skip
        answer = lm.tokenizer.decode(ids[0, encoding.input_ids.shape[1] :]).strip()
        assert answer.startswith(fact.target)


def test_the_same_prompt_twice_leaves_one_mask_and_the_latest_answer(tiny_lm, facts):
    lm = tiny_lm("llama", "wordlevel")
    editor = make(lm, steps=60)
    editor.edit(facts[:1])
    editor.edit([facts[0].replace(target="violin")])
    assert len(editor.masks) == 1 and editor.mask_of_edit == [0, 0] and editor.n_facts == 2
    logits = lm.logits(lm.encode([facts[0].text]))[0, -1]
    assert lm.tokenizer.decode(logits.argmax()).strip() == "violin"


def test_routes_do_not_drift_as_edits_accumulate(tiny_lm, facts):
    editor = make(tiny_lm("llama"))
    editor.edit(facts[:1])
    first = editor.masks.packed.clone()
    editor.edit(facts[1:])
    assert torch.equal(editor.masks.packed[:1], first)
    assert float(editor.look_up([facts[0].text]).overlap) == 1.0


@pytest.mark.parametrize("changes, find_all", [
    ({"activation": "nearest"}, True), ({"activation": "own"}, True), ({"mask": "random"}, False),
])  # fmt: skip
def test_ablations(tiny_lm, facts, changes, find_all):
    lm = tiny_lm("llama")
    editor = make(lm, **changes)
    editor.edit(facts[:2])
    found = editor.look_up([facts[0].text, facts[1].text, facts[2].text, "London in Italy"])
    assert found.active.tolist() == [True, True, find_all, find_all]
    encoding = lm.encode(["London in Italy"])
    with editor.detached():
        base = lm.logits(encoding)
    assert torch.equal(lm.logits(encoding), base) is not find_all


def test_released_divisor_and_bfloat16(tiny_lm, facts):
    lm = tiny_lm("llama")
    plain = make(lm, steps=1).edit(facts[:1]).metadata["losses"][0]
    lm = tiny_lm("llama")
    n = len(lm.tokenizer(" " + facts[0].target)["input_ids"])
    released = make(lm, steps=1, loss_divisor="released").edit(facts[:1]).metadata["losses"][0]
    assert released == pytest.approx(plain * n / (n + 1), rel=1e-5)
    low = tiny_lm("llama")
    low.model.to(torch.bfloat16)
    editor = make(low)
    editor.edit(facts[:1])
    assert editor.weight.dtype == torch.float32
    assert low.logits(low.encode([facts[0].text])).dtype == torch.bfloat16


def test_prefixes_are_seeded_and_bare_first(tiny_lm):
    lm = tiny_lm("llama", "wordlevel")
    found = sample_prefixes(lm, 10, seed=1)
    assert found.flat[0] == "{}" and len(found.flat) == 11
    assert found == sample_prefixes(lm, 10, seed=1)
    lengths = [int(lm.encode([t.removesuffix(" {}")]).lengths[0]) for t in found.flat[1:]]
    assert np.mean(lengths[:5]) < np.mean(lengths[5:])
    assert sample_prefixes(lm, 0).flat == ("{}",)


def test_bad_input(tiny_lm, facts):
    lm = tiny_lm("llama")
    with pytest.raises(ConfigError, match="k = 25 columns per mask, but the layer has 24"):
        make(lm, k=25)
    with pytest.raises(ModelError, match="layer 7 does not exist"):
        make(lm, layer=7)
    with pytest.raises(ConfigError, match="needs the layer of its memory"):
        make_editor("memoir", lm)
    with pytest.warns(
        UserWarning, match=r"threshold 0.2 is vacuous.*6 out of 24 columns share 0.250 \+- 0.156"
    ):
        make(lm, threshold=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(lm, threshold=0.2, activation="nearest")
        make(lm)
    with pytest.raises(RequestError, match="exactly once"):
        make(lm).edit([facts[0].replace(prompt=" ")])
    with pytest.raises(NumericsError, match="lower lr"):
        editor = make(lm, lr=1e300)
        editor.edit(facts)
    assert editor.n_facts == 0 and not editor.is_attached and not len(editor.masks)


def test_rows_are_run_once_per_edit(tiny_lm, facts):
    """Blocks below the memory run only for the features of an edit, not at its steps."""
    lm = tiny_lm("llama", n_layers=4)
    editor = make(lm, layer=2, steps=6, stop_loss=0.0)
    editor.edit(facts[:1])
    calls = [0] * 4
    for i in range(4):
        name = lm.block_name(i) + "." + lm.spec.mlp
        lm.model.get_submodule(name).register_forward_hook(
            lambda m, a, o, i=i: calls.__setitem__(i, calls[i] + 1)
        )
    editor.edit(facts[1:2])
    assert calls == [1, 1, 1, 6]


def test_resuming_needs_no_background(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")
    editor = make(lm)
    editor.edit(facts[:2])
    path = editor.save(tmp_path / "memoir.safetensors")
    center = editor.hash.center.clone()
    editor.restore()
    again = Memoir(lm, FAST)
    again.load(path)
    assert torch.equal(again.hash.center, center) and again.contexts.flat == (
        "{}",
        "You can see {}",
        "Because {}",
    )


def test_evaluate_scores_and_restores(tiny_lm, facts):
    lm = tiny_lm("llama", "wordlevel")
    editor = make(lm, steps=40, k=12, threshold=0.9)
    table = evaluate(lm, editor, facts[:2], protocols=("easyedit", "generate"), facts_per_edit=1)
    after = table[(table["when"] == "after_all") & (table["axis"] == "efficacy")]
    assert after["success"].mean() > table[table["when"] == "before"]["success"].mean()
    assert not editor.is_attached and editor.n_facts == 0
