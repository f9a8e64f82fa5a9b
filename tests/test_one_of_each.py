"""Which function a model computes, models that are not what they seem, and numbers that must not be written."""

import dataclasses
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ModelError, NumericsError
from editkit.linear.inverse_gram import InverseGram
from editkit.linear.recursive import DirectGram
from editkit.locate.interchange import make_pairs
from editkit.locate.moments import second_moment
from editkit.methods import make_editor
from editkit.methods.hypernet.prefix import entering
from editkit.methods.hypernet.sites import add_shifts, find_sites, weights
from editkit.models.facts import Fact
from editkit.models.lm import LM
from editkit.scoring import text
from editkit.scoring.stats import summarize

TEXTS = ["Ana Silva is", "The mother tongue of Li is"]


# ------------------------------------------------------------------ identity


def _rope(lm):
    lm.model.config.rope_parameters = {"rope_theta": 500.0, "rope_type": "default"}


def _buffer(lm):
    lm.model.register_buffer("shift", torch.ones(3))


def _through_data(lm):
    lm.weight(0).data.neg_()


def _two_swapped(lm):
    lm.weight(0).data[[0, 1]] = lm.weight(0).data[[1, 0]]


def _last_bit(lm):
    lm.weight(1).data[1, 2] = torch.nextafter(lm.weight(1).data[1, 2], torch.tensor(9.0))


@pytest.mark.parametrize("change", [_rope, _buffer, _through_data, _two_swapped, _last_bit])
def test_a_fingerprint_sees_whatever_computes(change):
    lm = make_lm("llama")
    before = lm.fingerprint()
    assert lm.fingerprint() == before == make_lm("llama").fingerprint()
    change(lm)
    assert lm.fingerprint() != before


def test_a_fingerprint_sees_adapters_and_whether_they_are_on():
    peft = pytest.importorskip("peft")
    lm = make_lm("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"]), lm.model)
    lm.model.eval()
    before, layers = lm.fingerprint(), [m for m in lm.model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    assert lm.fingerprint() != before
    for layer in layers:
        layer.enable_adapters(True)
    assert lm.fingerprint() == before


def test_training_mode_is_refused_where_something_is_measured(facts):
    lm = make_lm()
    lm.model.train()
    for measure in (
        lm.fingerprint, lambda: lm.encode(TEXTS), lambda: text.perplexity(lm, TEXTS),
        lambda: second_moment(lm, [0], TEXTS),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"model\.eval\(\)"):
            measure()


def test_a_memory_is_not_taken_for_the_model(facts):
    lm = make_lm()
    memory = make_editor("grace", lm, layer=0, steps=1)
    memory.edit(facts[:1])
    with pytest.raises(ModelError, match=r"second moment.*detach"):
        second_moment(lm, [0], TEXTS)
    with pytest.raises(ModelError, match=r"editing weights with ft.*detach"):
        make_editor("ft", lm, layers=[0]).edit(facts[:1])


def test_texts_are_cut_on_the_right_whatever_the_tokenizer_says():
    lm = make_lm()
    tokenizer = lm.tokenizer
    tokenizer.truncation_side = "left"
    ids = LM(lm.model, tokenizer).encode(TEXTS[:1], max_length=3).input_ids[0].tolist()
    assert ids == lm.encode(TEXTS[:1]).input_ids[0, :3].tolist()


# ------------------------------------------------------------------ models that are not what they seem


def test_offloaded_weights_are_refused_before_anything_is_written(facts):
    lm = make_lm()
    before = lm.get_matrix(0)
    block = lm.model.get_submodule(lm.down_name(1))
    block.weight = torch.nn.Parameter(block.weight.to("meta"))
    for write in (
        lambda: lm.set_matrix(1, torch.zeros(lm.weight_shape(1))),
        lambda: make_editor("ft", lm, layers=[0]).edit(facts[:1]),
        lambda: lm.write({lm.weight_name(0): torch.zeros_like(lm.weight(0)), lm.weight_name(1): block.weight}),
    ):
        with pytest.raises(ModelError, match="not in memory"):
            write()
    assert torch.equal(lm.get_matrix(0), before)


def test_compiled_models_are_refused_also_when_compiled_later():
    lm = make_lm()
    batch = lm.encode(TEXTS)
    lm.model.compile()
    for use in (lambda: LM(lm.model, lm.tokenizer), lambda: lm.encode(TEXTS), lambda: text.text_logprobs(lm, TEXTS)):
        with pytest.raises(ModelError, match="compiled"):
            use()
    del batch


def test_wrapped_models_are_refused():
    peft = pytest.importorskip("peft")
    lm = make_lm("llama")
    wrapped = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        LM(wrapped, lm.tokenizer, lm.spec)


def test_a_padding_token_outside_the_embedding_is_refused():
    lm = make_lm()
    lm.tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    lm.tokenizer.add_tokens([f"<more {i}>" for i in range(9)])
    with pytest.raises(ModelError, match="resize the embeddings"):
        LM(lm.model, lm.tokenizer)


# ------------------------------------------------------------------ numbers


def test_a_hypernetworks_nan_does_not_reach_the_weights():
    lm = make_lm()
    (site,) = find_sites(lm, [0])
    before = lm.get_matrix(0)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        add_shifts(lm, [site], weights(lm, [site]), [torch.full((site.m, site.d), float("nan"))])
    assert torch.equal(lm.get_matrix(0), before)


@pytest.mark.parametrize("value", [1e39, float("nan"), float("inf")])
def test_what_the_stored_dtype_cannot_hold_is_not_written(value):
    lm = make_lm()
    W = lm.get_matrix(0)
    bad = W.clone()
    bad[1, 2] = value
    with pytest.raises(NumericsError, match="NaN or Inf"):
        lm.set_matrix(0, bad)
    assert torch.equal(lm.get_matrix(0), W)


@pytest.mark.parametrize("how", ["retire", "revise"])
def test_retiring_large_keys_is_as_exact_as_the_direct_way(how):
    g = torch.Generator().manual_seed(0)
    K, N = (torch.randn(40, 6, generator=g, dtype=torch.float64) * s for s in (1e3, 1.0))
    V = torch.randn(5, 6, generator=g, dtype=torch.float64)
    found = []
    for engine in (InverseGram(torch.eye(40, dtype=torch.float64)), DirectGram(torch.eye(40, dtype=torch.float64))):
        engine.add(K, V)
        if how == "retire":
            engine.retire(K, V)
        else:
            engine.revise(K, V, N, V)
        found.append(engine.solve(torch.eye(40, dtype=torch.float64)))
        assert engine.error(None) < 1e-8
    assert (found[0] - found[1]).norm() < 1e-7 * found[1].norm()


def test_a_foreign_forward_survives_a_start_above_it():
    lm = make_lm(n_layers=3)
    block = lm.model.get_submodule(lm.block_name(0))
    foreign = block.forward
    block.forward = lambda *a, **k: foreign(*a, **k)
    wrapper = block.forward
    with entering(lm, 1, torch.zeros(1, 2, lm.d_model)):
        assert block.forward is not wrapper
    assert block.forward is wrapper


# ------------------------------------------------------------------ speed and borders


def test_pairs_of_many_facts_are_quick():
    facts = [
        Fact(prompt="{} speaks", subject=f"Person {i}", target=" x", target_true=" y") for i in range(400)
    ]
    facts[-1] = dataclasses.replace(facts[-1], target_true=" z")
    start = time.process_time()
    assert len(make_pairs(facts, 10_000)) == 2 * 399
    assert time.process_time() - start < 6


def test_log_probabilities_by_slices_are_those_of_the_whole(monkeypatch):
    lm = make_lm()
    whole = text.text_logprobs(lm, TEXTS)
    monkeypatch.setattr(text, "_COLUMNS", 2)
    assert all(np.array_equal(a, b) for a, b in zip(whole, text.text_logprobs(lm, TEXTS), strict=True))
    assert text.perplexity(lm, []).shape == (0,)


def test_groups_without_a_name_are_summarised():
    rows = pd.DataFrame({"editor": [None, None, "ft"], "axis": [None, "a", None], "fact_id": [0, 1, 2],
                         "success": [1.0, 0.0, 1.0]})  # fmt: skip
    found = summarize(rows, ["editor", "axis"], n_boot=10)
    assert found["mean"].tolist() == [1.0, 0.0, 1.0] and found["n_probes"].tolist() == [1, 1, 1]
