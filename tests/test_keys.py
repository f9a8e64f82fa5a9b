"""Keys and states at the lookup token: against direct reading and recordings, across paddings and budgets."""

import json

import numpy as np
import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ConfigError, ModelError, NumericsError, RequestError
from editkit.locate.contexts import ContextTemplates
from editkit.locate.keys import compute_keys, read_states
from editkit.models.facts import Fact

CONTEXTS = ContextTemplates.of([["{}"], ["You can see. {}", "Because it was old and fine. {}"]])


def direct_key(lm, layer, text, subject, pieces=1):
    """The key of one prompt, found without editkit's hooks and lookup (WordLevel: one token per word)."""
    seen = {}
    down = lm.model.get_submodule(lm.down_name(layer))
    handle = down.register_forward_pre_hook(lambda m, args: seen.update(key=args[0]))
    ids = lm.tokenizer(text)["input_ids"]
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    handle.remove()
    words = lm.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    end = text.index(subject) + len(subject)
    at = max(i for i, (_, (_, stop)) in enumerate(words) if stop <= end)
    return seen["key"][0, at].double()


@pytest.fixture
def lm(any_lm):
    return make_lm(any_lm.model.config.model_type, "wordlevel")


def test_keys_equal_direct_reading(lm, facts):
    K = compute_keys(lm, facts, 1)
    assert K.shape == (lm.d_key, len(facts)) and K.dtype == torch.float64
    for i, fact in enumerate(facts):
        assert torch.allclose(K[:, i], direct_key(lm, 1, fact.text, fact.subject), atol=1e-5)


def test_context_averages(lm, facts):
    groups, flat = (compute_keys(lm, facts, 1, contexts=CONTEXTS, average=a) for a in ("groups", "flat"))
    for i, fact in enumerate(facts):
        keys = [direct_key(lm, 1, t.replace("{}", fact.text), fact.subject) for t in CONTEXTS.flat]
        assert torch.allclose(groups[:, i], keys[0] / 2 + (keys[1] + keys[2]) / 4, atol=1e-5)
        assert torch.allclose(flat[:, i], sum(keys) / 3, atol=1e-5)
    assert not torch.allclose(groups, flat, atol=1e-3)


def test_budget_padding_and_order_do_not_matter(lm, facts):
    reference = compute_keys(lm, facts, 1, contexts=CONTEXTS)
    for options in ({"tokens_per_batch": 1}, {"tokens_per_batch": 25}, {"padding_side": "left"}):
        assert torch.allclose(compute_keys(lm, facts, 1, contexts=CONTEXTS, **options), reference, atol=1e-5)
    turned = compute_keys(lm, facts[::-1], 1, contexts=CONTEXTS)
    assert torch.allclose(turned.flip(1), reference, atol=1e-5)
    pairs = [(f.prompt, f.subject) for f in facts]
    assert torch.equal(compute_keys(lm, pairs, 1, contexts=CONTEXTS), reference)


def test_several_layers_in_one_pass(tiny_lm, facts):
    lm = tiny_lm("llama", n_layers=3)
    calls = []
    handle = lm.model.get_submodule(lm.block_name(2)).register_forward_hook(lambda *_: calls.append(1))
    both = compute_keys(lm, facts, [1, 0])
    assert not calls  # the pass ends after layer 1
    handle.remove()
    assert list(both) == [1, 0]
    for layer, K in both.items():
        assert torch.allclose(K, compute_keys(lm, facts, layer), atol=1e-6)
    assert compute_keys(lm, facts, np.int64(1)).shape == both[1].shape


def test_tokens_give_different_keys(tiny_lm, facts):
    lm = tiny_lm()
    keys = {t: compute_keys(lm, facts, 1, token=t) for t in ("subject_first", "subject_last", "last")}
    assert not torch.allclose(keys["subject_first"], keys["subject_last"], atol=1e-3)
    assert not torch.allclose(keys["subject_last"], keys["last"], atol=1e-3)


def test_read_states_of_all_module_kinds(lm, facts):
    down, mlp, block = lm.down_name(0), lm.mlp_name(0), lm.block_name(1)
    states = read_states(lm, facts, inputs=[down], outputs=[mlp, block], tokens_per_batch=12)
    assert torch.allclose(states.input[down], compute_keys(lm, facts, 0), atol=1e-6)
    bias = getattr(lm.model.get_submodule(down), "bias", None)
    value = lm.get_matrix(0) @ states.input[down]
    value = value if bias is None else value + bias.detach().double()[:, None]
    assert torch.allclose(states.output[mlp], value, atol=1e-5)
    assert states.output[block].shape == (lm.d_model, len(facts))
    again = read_states(lm, facts[2:3], outputs=[block])
    assert torch.allclose(again.output[block][:, 0], states.output[block][:, 2], atol=1e-5)


def test_weights_and_gradients_stay(tiny_lm, facts):
    lm = tiny_lm()
    before = lm.fingerprint()
    K = compute_keys(lm, facts, [0, 1], contexts=CONTEXTS)
    assert lm.fingerprint() == before and not K[0].requires_grad
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())


def test_bad_input_is_refused(tiny_lm, facts):
    lm = tiny_lm()
    with pytest.raises(RequestError, match="no facts"):
        compute_keys(lm, [], 0)
    with pytest.raises(RequestError, match="no layers"):
        compute_keys(lm, facts, [])
    with pytest.raises(ModelError, match="layers 0 to 1"):
        compute_keys(lm, facts, 2)
    with pytest.raises(ConfigError, match="exactly once"):
        compute_keys(lm, facts, 0, contexts=["{}", "none"])
    with pytest.raises(RequestError, match="exactly once"):
        compute_keys(lm, [Fact("no slot", "Ana", "x")], 0)
    with pytest.raises(RequestError, match="no prompts"):
        read_states(lm, [], outputs=[lm.block_name(0)])
    with pytest.raises(RequestError, match="at least one module"):
        read_states(lm, facts)


def test_nan_weights_are_reported(tiny_lm, facts):
    lm = tiny_lm()
    with torch.no_grad():
        lm.parameter("transformer.h.0.mlp.c_fc.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"h\.0\.mlp\.c_proj has NaN"):
        compute_keys(lm, facts, 0)
    with pytest.raises(NumericsError, match="NaN"):
        read_states(lm, facts, outputs=[lm.block_name(1)])


def recorded(golden_dir, case):
    folder = golden_dir / case
    if not folder.is_dir():
        pytest.skip(f"no recording {case}")
    info = json.loads((folder / "case.json").read_text())
    requests = info.get("requests") or [r for batch in info["batches"] for r in batch]
    facts = [Fact(r["prompt"], r["subject"], r["target_new"]["str"].strip()) for r in requests]
    return info, facts, np.load(folder / "arrays.npz")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_memit_recording(golden_dir, golden_lm, kind):
    """Keys and current values of the official code at the first edited layer (unedited model)."""
    info, facts, arrays = recorded(golden_dir, f"memit/{kind}")
    lm, layer = golden_lm(kind), info["hparams"]["layers"][0]
    K = compute_keys(lm, facts, layer, contexts=info["context_templates"])
    assert np.abs(K.numpy() - arrays[f"K_{layer}"]).max() < 5e-6
    block = lm.block_name(info["z_layer"])
    z = read_states(lm, facts, outputs=[block]).output[block]
    assert np.abs(z.numpy() - arrays[f"curz_{layer}"]).max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rome_recording(golden_dir, golden_lm, kind):
    info, facts, arrays = recorded(golden_dir, f"rome/{kind}")
    lm, layer = golden_lm(kind), info["hparams"]["layers"][0]
    flat = [t for g in info["context_templates"] for t in ([g] if isinstance(g, str) else g)]
    K = compute_keys(lm, facts[:1], layer, contexts=flat, average="flat")
    assert np.abs(K[:, 0].numpy() - arrays["keys_0"].mean(0)).max() < 5e-6
    states = read_states(lm, facts[:1], inputs=[lm.down_name(layer)], outputs=[lm.mlp_name(layer)])
    assert np.abs(states.input[lm.down_name(layer)][:, 0].numpy() - arrays["curin_0"]).max() < 5e-6
    assert np.abs(states.output[lm.mlp_name(layer)][:, 0].numpy() - arrays["curout_0"]).max() < 5e-6
