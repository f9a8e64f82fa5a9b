"""Causal tracing: identities that hold exactly, groups, noise, and the recorded rule for critical layers."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_lm
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from editkit.base.errors import ConfigError, RequestError
from editkit.locate.patching import GROUPS, final_logits, first_answer_ids, position_groups, window_layers
from editkit.locate.tracing import CausalTrace, causal_trace, critical_layers, subject_noise_scale
from editkit.models.answers import split_tokens
from editkit.models.facts import Fact
from editkit.models.hooks import trace
from editkit.models.lm import LM

G = {name: i for i, name in enumerate(GROUPS)}


@pytest.fixture
def lm(any_lm):
    return make_lm(any_lm.model.config.model_type, "wordlevel")


def test_groups_of_known_prompts():
    lm = make_lm(tokenizer="wordlevel")
    prompts = [
        ("In the {} works and lives", "Karin Ann Fischer"),
        ("{} is", "Li"),
        ("The old {}", "Ana Silva"),
    ]
    assert position_groups(lm, prompts).groups == [
        {"subject_first": [2], "subject_middle": [3], "subject_last": [4], "after": [5, 6], "last": [7]},
        {"subject_last": [0], "last": [1]},
        {"subject_first": [2], "subject_last": [3]},
    ]


def test_final_logits_equal_full_logits(any_lm, facts):
    positions = position_groups(any_lm, facts)
    batch = positions.encoding
    logits, states = final_logits(any_lm, batch, positions.final, record=[any_lm.block_name(0)])
    full = any_lm.logits(batch).detach()
    rows = torch.arange(len(facts))
    assert torch.allclose(logits, full[rows, positions.final], atol=1e-5)
    assert states[any_lm.block_name(0)].shape[:2] == batch.input_ids.shape


def test_clean_probability_and_answer(lm, facts):
    result = causal_trace(lm, facts, samples=2)
    for i, fact in enumerate(facts):
        p = lm.logits(lm.encode([fact.text]))[0, -1].detach().double().softmax(-1)
        assert result.clean[i] == pytest.approx(float(p.max()), abs=1e-6)
        assert result.answers[i] == result.predicted[i] == int(p.argmax())


def test_restoring_the_decisive_state_restores_everything(lm, facts):
    """The last block's output at the last token decides the answer: its effect is the total effect."""
    result = causal_trace(lm, facts, samples=3)
    top = result.effect[:, G["last"], -1]
    assert np.allclose(top, result.total_effect, atol=1e-5)
    assert np.abs(result.total_effect).max() > 0.01
    # At the last block no other position can still reach the prediction.
    others = [g for name, g in G.items() if name != "last"]
    assert np.nanmax(np.abs(result.effect[:, others, -1])) < 1e-6


def test_one_token_subject_restored_at_block_0(lm):
    """All corruption enters at the one position there is: restoring it restores all."""
    fact = Fact("{}", "Li", "x")
    result = causal_trace(lm, [fact], samples=2)
    assert np.allclose(result.effect[0, G["subject_last"]], result.total_effect[0], atol=1e-6)


def test_without_noise_nothing_happens(lm, facts):
    result = causal_trace(lm, facts, noise=0.0, samples=1)
    assert np.allclose(result.clean, result.corrupt, atol=1e-6) and result.sigma == 0
    assert np.nanmax(np.abs(result.effect)) < 1e-6


def test_absent_groups_are_nan(facts):
    lm = make_lm(tokenizer="wordlevel")
    effect = causal_trace(lm, facts, samples=1).effect
    middle = np.isnan(effect[:, G["subject_middle"]]).all(-1)
    assert middle.tolist() == [True, True, False, True]  # only Karin Ann Fischer has a middle name
    assert np.isnan(effect[3, G["subject_first"]]).all()
    assert not np.isnan(effect[:, [G["subject_last"], G["last"]]]).any()


@pytest.mark.parametrize("kind", ["block", "mlp", "attn"])
def test_one_effect_against_direct_computation(facts, kind):
    """A single restored state, recomputed with plain hooks on one prompt."""
    lm, fact, layer, sample = make_lm("gptj", "wordlevel"), facts[0], 1, 0
    result = causal_trace(lm, facts, samples=1, kind=kind, seed=5)
    batch, at = lm.encode([fact.text]), 5  # The mother tongue of Ana Silva is
    noise = result.sigma * np.random.default_rng([5, 0]).standard_normal((1, 2, lm.d_model))
    name = {"block": lm.block_name, "mlp": lm.mlp_name, "attn": lm.attn_name}[kind](layer)

    def corrupt(h):
        h = h.clone()
        h[0, 4:6] += torch.tensor(noise[sample], dtype=h.dtype)
        return h

    with torch.no_grad():
        with trace(lm.model, [name]) as clean:
            p_clean = lm.logits(batch)[0, -1].softmax(-1)
        answer = int(p_clean.argmax())

        def restore(h):
            h = h.clone()
            h[0, at] = clean.output[name][0, at]
            return h

        with trace(lm.model, edit={lm.embed_name: corrupt}):
            p_corrupt = lm.logits(batch)[0, -1].softmax(-1)
        with trace(lm.model, edit={lm.embed_name: corrupt, name: restore}):
            p_restored = lm.logits(batch)[0, -1].softmax(-1)
    assert result.corrupt[0] == pytest.approx(float(p_corrupt[answer]), abs=1e-5)
    expected = float(p_restored[answer] - p_corrupt[answer])
    assert result.effect[0, G["subject_last"], layer] == pytest.approx(expected, abs=1e-5)


def test_batching_does_not_matter_and_seed_does(facts):
    lm = make_lm("llama", "bytelevel")
    first = causal_trace(lm, facts, samples=2, seed=1)
    small = causal_trace(lm, facts, samples=2, seed=1, tokens_per_batch=1)
    assert np.allclose(first.effect, small.effect, atol=1e-5, equal_nan=True)
    other = causal_trace(lm, facts, samples=2, seed=2)
    assert not np.allclose(first.corrupt, other.corrupt, atol=1e-4)


def test_restore_group_equals_each_for_single_tokens(facts):
    lm = make_lm("gpt2", "wordlevel")
    each = causal_trace(lm, facts, samples=2).effect
    group = causal_trace(lm, facts, samples=2, restore="group").effect
    single = [G[g] for g in ("subject_first", "subject_last", "last")]
    assert np.allclose(each[:, single], group[:, single], atol=1e-6, equal_nan=True)
    assert np.allclose(each[2, G["subject_middle"]], group[2, G["subject_middle"]], atol=1e-6)


def test_wide_window_restores_more(facts):
    lm = make_lm("gpt2", "wordlevel", n_layers=3)
    wide = causal_trace(lm, facts, samples=2, kind="mlp", window=7).effect
    assert np.allclose(wide[..., 0], wide[..., 2], atol=1e-6, equal_nan=True)
    narrow = causal_trace(lm, facts, samples=2, kind="mlp", window=1).effect
    assert not np.allclose(wide, narrow, atol=1e-4, equal_nan=True)


def test_window_layers_are_centered_as_in_the_released_code():
    assert list(window_layers(5, 10, 48)) == list(range(10))
    assert list(window_layers(20, 10, 48)) == list(range(15, 25))
    assert list(window_layers(47, 10, 48)) == list(range(42, 48))
    assert list(window_layers(3, 1, 48)) == [3]
    assert list(window_layers(3, 3, 48)) == [2, 3, 4]


def test_noise_scale_is_that_of_subject_embeddings():
    lm = make_lm(tokenizer="wordlevel")
    ids = lm.tokenizer("Ana Silva Li")["input_ids"]
    expected = lm.embeddings()[ids].numpy().std()
    positions = position_groups(lm, [("the {} is", "Ana Silva"), ("{} is", "Li")])
    assert subject_noise_scale(lm, positions) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["wordlevel", "bytelevel", "bytelevel_trim", "bos", "eos", "metaspace"])
def test_first_answer_token(kind):
    lm = make_lm(tokenizer=kind)
    texts, answers = ["The mother tongue of Ana Silva is", "Li plays the"], ["French", "violin"]
    for token, answer in zip(
        first_answer_ids(lm, list(zip(texts, answers, strict=True))).tolist(), answers, strict=True
    ):
        assert answer.startswith(lm.tokenizer.decode([token]).strip()[:1])
    result = causal_trace(lm, [Fact("{} plays the", "Li", "x", "violin")], samples=1, answer="true")
    assert result.answers.tolist() == first_answer_ids(lm, [("Li plays the", "violin")]).tolist()


def test_answer_that_merges_with_the_prompt_keeps_the_prompts_tokens():
    lm = make_lm()
    tok = Tokenizer(BPE())  # without pre-tokenizer, so that pieces cross word borders
    tok.train_from_iterator(["ab cd", "\n"] * 5, BpeTrainer(special_tokens=["</s>"]))
    lm = LM(lm.model, PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>"))
    assert len(lm.tokenizer("ab cd")["input_ids"]) == 1
    ((ids, start),) = split_tokens(lm, [("ab", "cd")])
    assert ids[:start] == lm.tokenizer("ab")["input_ids"] and lm.tokenizer.decode(ids[start:]) == " cd"
    assert first_answer_ids(lm, [("ab", "cd")]).tolist() == ids[start : start + 1]


def test_bad_input_is_refused(facts):
    lm = make_lm()
    cases = [
        ({"kind": "head"}, ConfigError, "block, mlp, attn"),
        ({"samples": 0}, ConfigError, "at least 1"),
        ({"restore": "all"}, ConfigError, "'each' or 'group'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            causal_trace(lm, facts, **options)
    with pytest.raises(RequestError, match="no facts"):
        causal_trace(lm, [])
    with pytest.raises(RequestError, match=r"\[0\]"):
        causal_trace(lm, [Fact("{} is", "Li", "x")], answer="true")


def made_up(effect) -> CausalTrace:
    n = len(effect)
    ids = np.zeros(n, dtype=int)
    return CausalTrace(np.ones(n), np.zeros(n), np.asarray(effect), ids, ids, 1.0, "mlp", 1, 1)


def test_average_and_frame_leave_absent_groups_out():
    effect = np.full((2, 5, 2), np.nan)
    effect[0, G["subject_first"]] = [0.2, 0.4]
    effect[:, G["last"]] = [[0.0, 1.0], [0.5, 0.0]]
    result = made_up(effect)
    average = result.average()
    assert average[G["subject_first"]].tolist() == [0.2, 0.4]
    assert average[G["last"]].tolist() == [0.25, 0.5]
    assert np.isnan(average[G["after"]]).all()
    assert result.average(np.array([False, True]))[G["last"]].tolist() == [0.5, 0.0]
    frame = result.to_frame()
    assert len(frame) == 6
    assert frame.query("fact == 1 and group == 'last' and layer == 0").effect.item() == 0.5


def test_critical_layers_follow_the_recorded_rule():
    effect = np.full((1, 5, 6), np.nan)
    effect[0, G["subject_last"]] = [0.1, 0.45, 0.5, 0.46, 0.2, 0.0]
    site = critical_layers(made_up(effect))
    assert site.token == "subject_last" and site.layers == (1, 2, 3)
    assert "0.9 of the maximum 0.5000" in site.rule
    assert critical_layers(made_up(effect), share=0.3).layers == (1, 2, 3, 4)
    nothing = dataclasses.replace(made_up(effect), effect=np.zeros((1, 5, 6)))
    assert critical_layers(nothing).layers == ()
    with pytest.raises(ConfigError, match="no traced fact"):
        critical_layers(made_up(effect), "last")
    with pytest.raises(ConfigError, match="lookup token"):
        critical_layers(made_up(effect), "after")
    with pytest.raises(ConfigError, match="share"):
        critical_layers(made_up(effect), share=0.0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trained_models_recall_through_the_subject(golden_dir, golden_lm, kind):
    """On the recorded trained models noise on the subject destroys the answer."""
    import json

    data = json.loads((golden_dir / "models" / "data.json").read_text())
    facts = [Fact(f["prompt"], f["subject"], "x", f["target_true"]) for f in data["facts"][:20]]
    result = causal_trace(golden_lm(kind), facts, samples=3, answer="true")
    assert (result.predicted == result.answers).all()
    assert result.clean.mean() > 0.9 and result.corrupt.mean() < 0.6


@pytest.mark.parametrize("cut", ["mlp", "attn"])
def test_severed_modules_keep_their_corrupted_outputs(any_lm, facts, cut):
    """ROME figure 3, against whole passes written out: only the layers above, only at the restored token."""
    lm = make_lm(any_lm.model.config.model_type, "wordlevel", n_layers=3)
    fact, seed = facts[0], 5
    result = causal_trace(lm, [fact], samples=1, seed=seed, sever=cut)
    positions = position_groups(lm, [fact])
    batch, groups = positions.encoding, positions.groups[0]
    subject = [c for g in GROUPS[:3] for c in groups.get(g, [])]
    noise = torch.zeros(1, batch.input_ids.shape[1], lm.d_model)
    draws = np.random.default_rng([seed, 0]).standard_normal((1, len(subject), lm.d_model))
    noise[0, subject] = torch.tensor(result.sigma * draws[0], dtype=torch.float32)
    noisy = {lm.embed_name: lambda h: h + noise}
    at = groups["subject_last"][0]
    blocks = [lm.block_name(i) for i in range(lm.n_layers)]
    held = [lm.mlp_name(i) if cut == "mlp" else lm.attn_name(i) for i in range(lm.n_layers)]

    def only(value):
        return lambda h: torch.where(torch.arange(h.shape[1])[None, :, None] == at, value, h)

    _, clean = final_logits(lm, batch, positions.final, record=blocks)
    _, corrupt = final_logits(lm, batch, positions.final, record=held, edit=noisy)
    for layer in range(lm.n_layers):
        edit = {**noisy, blocks[layer]: only(clean[blocks[layer]])}
        edit |= {name: only(corrupt[name]) for name in held[layer + 1 :]}
        logits, _ = final_logits(lm, batch, positions.final, edit=edit)
        p = float(logits.double().softmax(-1)[0, result.answers[0]])
        assert result.effect[0, G["subject_last"], layer] == pytest.approx(p - result.corrupt[0], abs=1e-6)
    whole = causal_trace(lm, [fact], samples=1, seed=seed)
    assert not np.allclose(whole.effect[0, G["subject_last"], 0], result.effect[0, G["subject_last"], 0], atol=1e-7)
    with pytest.raises(ConfigError, match="kind = 'block'"):
        causal_trace(lm, [fact], kind="mlp", sever="mlp")


def test_window_attention_gives_the_same(facts):
    """Where attention looks back over a window, passes run from the first token on; here the window is wide enough."""
    lm = make_lm("mistral", "wordlevel")
    wide = causal_trace(lm, facts, samples=2, window=2, kind="mlp")
    lm.model.config.sliding_window = 20
    near = causal_trace(lm, facts, samples=2, window=2, kind="mlp")
    assert np.allclose(wide.effect, near.effect, atol=1e-6, equal_nan=True)
