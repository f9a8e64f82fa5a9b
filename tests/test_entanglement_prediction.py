"""Predictors against what editors really do, gradients, correlations, ripples, critical layers."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import MODEL_TYPES, make_lm
from hypothesis import given, settings
from scipy import stats

from editkit.base.errors import ConfigError, DataError, ModelError, NumericsError, RequestError
from editkit.entanglement import whitened
from editkit.entanglement.correlation import agreement, agreement_table, gain, row_spearman, weighted_spearman
from editkit.entanglement.gradsim import Sketch, gradients, gradsim, parameter_names, sketched_gradsim
from editkit.entanglement.plans import (
    DIRECTIONS,
    Memory,
    delta_shift,
    memories,
    plan_edits,
    probe_representations,
)
from editkit.entanglement.ripple import MEASURES, SharedTargets, Watch, check_pairs, choose, measure, overview
from editkit.linear.normal import alphaedit_update, memit_update, null_projector, rome_direction, rome_update
from editkit.locate.keys import compute_keys, read_states
from editkit.locate.patching import first_answer_ids
from editkit.locate.sites import Site
from editkit.methods import make_editor
from editkit.models.facts import Fact
from editkit.studies.clare.critical_layer import PRESETS, critical_layer, from_site

EDITS = [
    Fact("The mother tongue of {} is", "Ana Silva", "German", target_true="French"),
    Fact("{} lives in", "Hugo Castro", "Paris", target_true="Rome"),
]
PROBES = [
    Fact("{} plays the", "Hugo Castro", "violin"),
    Fact("{} was born in", "Karin Ann Fischer", "Vienna, Italy"),
    Fact("The city where {} works is", "Li", "London"),
    Fact("{} speaks", "Ana Silva", "German"),
]
SMALL = {"z_steps": 3, "n_contexts": 0, "token": "last"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(d: int, seed: int) -> torch.Tensor:
    X = draw(d, 3 * d, seed=seed)
    return X @ X.T / (3 * d)


def identity_statistics(lm, layers):
    return {layer: torch.eye(lm.weight_shape(layer)[1], dtype=torch.float64) for layer in layers}


# --- exactness in a linear memory ---------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    d=st.integers(2, 12), m=st.integers(1, 8), n=st.integers(1, 6), lam=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_whitened_score_is_the_shift_of_memit_and_rome(d, m, n, lam, seed):
    C, k, r, probes = (
        spd(d, seed),
        draw(d, 1, seed=seed + 1),
        draw(m, 1, seed=seed + 2),
        draw(n, d, seed=seed + 3),
    )
    moved = memit_update(k, r, C, lam) @ probes.T
    score = whitened(k.T, C, probes, lam=lam).matrix()[0]
    assert torch.allclose(moved.norm(dim=0), r.norm() * score, rtol=1e-7, atol=1e-10)
    W = draw(m, d, seed=seed + 4)
    v = W @ k[:, 0] + r[:, 0]
    moved = rome_update(W, k[:, 0], v, rome_direction(C, k[:, 0])) @ probes.T
    score = whitened(k.T, C, probes).matrix()[0]
    assert torch.allclose(moved.norm(dim=0), r.norm() * score, rtol=1e-6, atol=1e-9)


@settings(max_examples=25)
@given(
    d=st.integers(3, 12), n_old=st.integers(0, 5), ridge=st.floats(1e-2, 1e2), seed=st.integers(0, 10**6)
)  # fmt: skip
def test_history_and_projection_are_exact_too(d, n_old, ridge, seed):
    C, k, r = spd(d, seed), draw(d, 1, seed=seed + 1), draw(4, 1, seed=seed + 2)
    probes, old = draw(5, d, seed=seed + 3), draw(d, n_old, seed=seed + 4)
    P = null_projector(C, float(torch.linalg.eigvalsh(C)[d // 2]))
    S = old @ old.T
    p = Memory.of(torch.zeros_like(C), 1.0, history=S, ridge=ridge, U=P.U).solve(k.T)
    moved = alphaedit_update(k, r, P, S, ridge) @ probes.T
    assert torch.allclose(r @ (p @ probes.T), moved, rtol=1e-7, atol=1e-10)
    p = Memory.of(C, 7.0, history=S).solve(k.T)
    assert torch.allclose(r @ (p @ probes.T), memit_update(k, r, C, 7.0, S) @ probes.T, rtol=1e-7, atol=1e-10)


def test_unusable_memories_are_refused():
    with pytest.raises(NumericsError, match="positive definite"):
        Memory.of(torch.zeros(3, 3), 1.0)
    with pytest.raises(NumericsError, match="zero"):
        Memory.of(torch.eye(3)).solve(torch.zeros(1, 3))


# --- plans against real edits ---------------------------------------------------------------------------------


def mlp_shift(lm, editor, fact, layer, probes):
    """What an edit really adds to the MLP output at the probes' last token."""
    name = lm.mlp_name(layer)
    before = read_states(lm, probes, outputs=[name], token="last").output[name]
    delta = editor.edit([fact])
    after = read_states(lm, probes, outputs=[name], token="last").output[name]
    editor.restore()
    return (after - before).norm(dim=0).numpy(), delta


@pytest.mark.parametrize("kind", [MODEL_TYPES[0], "llama"])
@pytest.mark.parametrize("name", ["memit", "rome", "alphaedit"])
def test_plan_with_targets_is_exact_for_one_layer(kind, name):
    lm = make_lm(kind)
    C = {1: spd(lm.weight_shape(1)[1], 3)}
    extra = {"threshold": 0.5} if name == "alphaedit" else {}
    editor = make_editor(
        name, lm, statistics=C, contexts=[["{}"], ["You can see. {}"]], layers=[1], **extra, **SMALL
    )
    shared = SharedTargets(lm, EDITS)
    shared.give(editor)
    plan = plan_edits(editor, EDITS, direction=shared.residuals(editor))
    keys, _ = probe_representations(lm, PROBES, [1])
    predicted = plan.shift(keys)
    for i, fact in enumerate(EDITS):
        shift, delta = mlp_shift(lm, editor, fact, 1, PROBES)
        assert np.allclose(predicted[i], shift, rtol=1e-3, atol=1e-5)
        assert np.allclose(delta_shift(lm, delta, keys), shift, rtol=1e-3, atol=1e-5)


def test_plan_follows_several_layers_and_moving_keys():
    lm = make_lm("llama", "wordlevel", n_layers=4)
    layers = [0, 1, 2]
    recorded = {}
    editor = make_editor(
        "memit", lm, statistics=identity_statistics(lm, layers), layers=layers, lam=1e-3, z_lr=0.05, z_steps=4,
        n_contexts=0, token="last", record=lambda key, value: recorded.setdefault(key, value),
    )  # fmt: skip
    # The edited token is the first and only one, so nothing but the edited token moves and the plan is complete.
    fact = Fact("{}", "Li", "violin")
    assert lm.encode([fact.text]).input_ids.shape[1] == 1
    shared = SharedTargets(lm, [fact])
    shared.give(editor)
    recorded.clear()
    plan = plan_edits(editor, [fact], direction=shared.residuals(editor))
    keys, scale = probe_representations(lm, PROBES, layers)
    delta = editor.edit([fact])
    editor.restore()
    for layer in layers:
        assert torch.allclose(plan.R[layer][0], recorded[f"resid_{layer}"][:, 0], rtol=1e-3, atol=1e-5)
    assert np.allclose(plan.shift(keys)[0], delta_shift(lm, delta, keys), rtol=1e-3, atol=1e-6)
    assert np.allclose(plan.shift(keys, scale)[0], delta_shift(lm, delta, keys, scale), rtol=1e-3, atol=1e-6)
    unmoved = plan_edits(editor, [fact])
    moved = torch.nn.functional.cosine_similarity(unmoved.P[2], plan.P[2]).item()
    assert moved < 1 - 1e-6  # the key of the last layer has moved
    signed = sum(unmoved.shares(layer, keys[layer])[0] for layer in layers)
    assert np.allclose(unmoved.shift(keys)[0], float(unmoved.R[0]) * signed.abs().numpy())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_forward_only_plans_write_nothing(direction):
    lm = make_lm("gpt2", n_layers=3)
    before = lm.fingerprint()
    editor = make_editor("memit", lm, statistics=identity_statistics(lm, [0, 1]), layers=[0, 1], **SMALL)
    keys, scale = probe_representations(lm, PROBES, [0, 1])
    shift = plan_edits(editor, EDITS, direction=direction).shift(keys, scale)
    assert shift.shape == (2, 4)
    assert np.isfinite(shift).all()
    assert lm.fingerprint() == before
    assert all(p.requires_grad for p in lm.model.parameters())


def test_gradient_points_where_the_probability_rises():
    from editkit.entanglement.plans import _Run

    lm = make_lm("llama")
    rows = [(f.prompt, f.subject) for f in EDITS]
    g = _Run(lm, rows, "last", 2, 1).gradient(EDITS, 0)
    tokens = first_answer_ids(lm, [f.pair for f in EDITS]).tolist()

    def said(step):
        from editkit.models.hooks import pick, trace
        from editkit.models.lookup import find_positions

        encoding, where = find_positions(lm, rows, "last")
        index = torch.arange(2)

        def add(out):
            return out.index_put((index, where), out[index, where] + step)

        with torch.no_grad(), trace(lm.model, edit={lm.block_name(0): add}):
            logits = lm.logits(encoding)
        return pick(logits, where).log_softmax(-1)[index, tokens].double()

    eps = 1e-2 / g.norm(dim=-1, keepdim=True)
    slope = (said(eps * g) - said(-eps * g)) / 2e-2
    assert torch.allclose(slope, g.norm(dim=-1).double(), rtol=2e-2)


def test_plans_know_the_history_of_an_editor():
    lm = make_lm("llama")
    editor = make_editor(
        "memit_seq", lm, statistics=identity_statistics(lm, [0]), layers=[0], lam=1.0, **SMALL
    )
    fresh = memories(editor)[0].solve(draw(1, lm.d_key))
    editor.edit([EDITS[0]])
    k = compute_keys(lm, [EDITS[0]], 0, token="last")
    grown = Memory.of(torch.eye(lm.d_key), 1.0, history=k @ k.T).solve(draw(1, lm.d_key))
    assert torch.allclose(memories(editor)[0].solve(draw(1, lm.d_key)), grown, atol=1e-6)
    assert not torch.allclose(fresh, grown, atol=1e-6)
    editor.restore()


def test_plans_refuse_what_they_cannot_follow():
    lm = make_lm("llama")
    with pytest.raises(ConfigError, match="closed form"):
        memories(make_editor("ft", lm, layers=[0]))
    editor = make_editor("memit", lm, statistics=identity_statistics(lm, [0]), layers=[0], **SMALL)
    with pytest.raises(ConfigError, match="direction"):
        plan_edits(editor, EDITS, direction="up")
    with pytest.raises(NumericsError, match="residuals"):
        plan_edits(editor, EDITS, direction=torch.zeros(3, 2))
    with pytest.raises(RequestError):
        plan_edits(editor, [])


# --- GradSim ----------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_summed_nll():
    lm = make_lm("gpt2")
    name = lm.weight_name(1)
    g = gradients(lm, PROBES[:1], params=[name])[0]
    text = f"{PROBES[0].text} {PROBES[0].target}"
    encoding = lm.encode([text])
    cut = int((encoding.offsets[0, :, 1] > len(PROBES[0].text)).long().argmax())
    logp = lm.logits(encoding)[0].log_softmax(-1)
    ids = encoding.input_ids[0]
    loss = -sum(logp[t - 1, ids[t]] for t in range(cut, len(ids)))
    (expected,) = torch.autograd.grad(loss, lm.parameter(name))
    assert torch.allclose(g, expected.reshape(-1), atol=1e-5)


def test_gradsim_is_the_cosine_of_gradients_and_of_probability_gradients():
    lm = make_lm("llama")
    true = [f.replace(target=f.target_true) for f in EDITS]
    G, Q = gradients(lm, true), gradients(lm, PROBES)
    expected = torch.nn.functional.cosine_similarity(G[:, None], Q[None], dim=-1).numpy()
    assert np.allclose(gradsim(lm, EDITS, PROBES), expected, atol=1e-5)
    assert np.allclose(gradsim(lm, EDITS, PROBES, held=1), expected, atol=1e-5)
    written = gradsim(lm, EDITS, PROBES, answers="target")
    assert not np.allclose(written, expected, atol=1e-3)
    # P = exp(-NLL): its gradient is a negative multiple of that of the NLL, for both facts.
    assert np.allclose(
        torch.nn.functional.cosine_similarity(-0.3 * G[0], -0.1 * Q[0], dim=0), expected[0, 0], atol=1e-5
    )


def test_parameter_choices():
    lm = make_lm("llama")
    assert parameter_names(lm) == [n for n, _ in lm.model.named_parameters()]
    assert parameter_names(lm, "down", 1) == [lm.weight_name(1)]
    assert len(parameter_names(lm, "mlp", 0)) == 3
    with pytest.raises(ConfigError, match="layer"):
        parameter_names(lm, "down")
    with pytest.raises(ConfigError, match="params"):
        parameter_names(lm, "some")
    with pytest.raises(ModelError):
        parameter_names(lm, ["nothing.weight"])


def test_sketch_keeps_cosines_and_is_seeded():
    x, y = draw(200_000).float(), draw(200_000, seed=1).float()
    y = 0.7 * x + y
    sketch = Sketch(8192, seed=3)
    plan = sketch.plan(len(x))
    a, b = sketch.apply([x], plan), sketch.apply([y[:50_000], y[50_000:]], plan)
    cos = torch.nn.functional.cosine_similarity
    assert abs(cos(a, b, dim=0) - cos(x, y, dim=0)) < 4 * (2 / 8192) ** 0.5
    assert torch.equal(Sketch(8192, seed=3).apply([x], Sketch(8192, seed=3).plan(len(x))), a)
    lm = make_lm("llama")
    score = sketched_gradsim(lm, PROBES, sketch=Sketch(4096))
    exact = gradsim(lm, [PROBES[0]], PROBES[1:])
    assert np.allclose(score.matrix()[0, 1:], exact, atol=0.1)
    with pytest.raises(ConfigError):
        Sketch(0)


# --- correlations -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(4, 30), st.booleans())
def test_weighted_spearman_is_that_of_the_repeated_sample(seed, n, ties):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n), rng.normal(size=n)
    if ties:
        x = x.round()
    w = rng.integers(0, 4, n)
    w[:2] = 1
    expected = stats.spearmanr(np.repeat(x, w), np.repeat(y, w)).statistic
    assert np.isclose(weighted_spearman(x, y, w.astype(float)), expected, equal_nan=True)


def test_agreement_of_a_good_and_of_a_blind_predictor():
    rng = np.random.default_rng(0)
    ripple = [rng.gamma(1.0, size=(12, 40)) * rng.gamma(1.0, size=40) for _ in range(2)]
    good = [r * rng.lognormal(0, 0.3, r.shape) for r in ripple]
    found = agreement(good, ripple, n_boot=200, n_permutations=199)
    x, y = (np.concatenate([t.ravel() for t in T]) for T in (good, ripple))
    assert np.isclose(found.pooled, stats.spearmanr(x, y).statistic)
    assert found.lo < found.pooled < found.hi
    assert found.pvalue == 1 / 200
    assert found.n_edits == 24
    assert found.n_pairs == 24 * 40
    assert np.allclose(
        found.by_seed, [stats.spearmanr(g.ravel(), r.ravel()).statistic for g, r in zip(good, ripple)]
    )
    # Knowing which probes move for any edit correlates when pooled, but says nothing about edits.
    blind = [np.tile(r.mean(0), (12, 1)) for r in ripple]
    found = agreement(blind, ripple, n_boot=50, n_permutations=199)
    assert found.pooled > 0.3
    assert found.pvalue > 0.05
    assert np.isnan(found.per_probe)


def test_row_spearman_and_gain():
    x = np.array([[1.0, 2, 3], [1, 1, 1]])
    y = np.array([[1.0, 3, 2], [1, 2, 3]])
    assert np.allclose(row_spearman(x, y), [0.5, np.nan], equal_nan=True)
    assert np.isclose(gain(0.5, 0.4), 0.25)
    assert gain(0.1, 0.0) == np.inf


def test_agreement_table_and_errors():
    R = draw(3, 5).numpy()
    table = agreement_table({"a": [R], ("memit", "b"): [R], ("rome", "b"): [-R]}, {"memit": [R]}, n_boot=10)
    assert list(table.predictor) == ["a", "b"]
    with pytest.raises(DataError, match="shape"):
        agreement(R, R[:2])
    with pytest.raises(DataError, match="at least two"):
        agreement(R[:1], R[:1])
    with pytest.raises(DataError, match="NaN"):
        agreement(R * np.nan, R)


# --- ripples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_watch_reads_the_models_logits(kind):
    lm = make_lm(kind, n_layers=3)
    watch = Watch(lm, PROBES, first_layer=2, tokens_per_batch=12)
    for i, probe in enumerate(PROBES):
        with torch.no_grad():
            logits = lm.logits(lm.encode([probe.text]))[0, -1].float()
        assert torch.allclose(watch.before.logits[i], logits, atol=1e-4)
    assert all(
        np.allclose(value, 0, atol=1e-5) for value in watch.shift().values()
    )  # later passes start at block 2
    weight = lm.weight(2)
    with torch.no_grad():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    whole, shift = Watch(lm, PROBES), watch.shift()
    step = (whole.before.logits - watch.before.logits).double()
    assert np.allclose(shift["logit_l2"], step.norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert np.allclose(shift["delta_logp"], whole.before.logp - watch.before.logp, rtol=1e-3, atol=1e-4)
    assert (shift["logit_l2_centered"] <= shift["logit_l2"] + 1e-9).all()
    assert (shift["kl"] > 0).all()


def test_measure_edits_one_at_a_time_and_restores():
    lm = make_lm("llama")
    before = lm.fingerprint()
    C = identity_statistics(lm, [0, 1])
    watch = Watch(lm, PROBES)
    shared = SharedTargets(lm, EDITS)
    deltas = []
    memit = shared.give(make_editor("memit", lm, statistics=C, layers=[0, 1], lam=1.0, **SMALL))
    found = measure(memit, EDITS, watch, keep=deltas)
    assert lm.fingerprint() == before
    assert set(found.measures) == set(MEASURES)
    assert all(value.shape == (2, 4) for value in found.measures.values())
    with deltas[1].applied(lm):
        assert np.allclose(watch.shift()["logit_l2"], found["logit_l2"][1], atol=1e-5)
    alone = shared.give(make_editor("memit", lm, statistics=C, layers=[0, 1], lam=1.0, **SMALL))
    assert np.allclose(measure(alone, EDITS[1:], watch)["logit_l2"][0], found["logit_l2"][1], atol=1e-5)
    frame = found.to_frame()
    assert len(frame) == 8
    assert {"edit", "probe", "known", "success", "logit_l2"} <= set(frame.columns)
    assert overview({"memit": found}).editor.tolist() == ["memit"]


def test_shared_targets_are_what_each_editor_would_optimise():
    lm = make_lm("llama")
    C = identity_statistics(lm, [0, 1])
    shared = SharedTargets(lm, EDITS)
    for name, layers in (("memit", [0, 1]), ("rome", [1])):
        own = make_editor(name, lm, statistics=C, layers=layers, **SMALL)
        given = shared.give(make_editor(name, lm, statistics=C, layers=layers, **SMALL))
        a, b = own.edit([EDITS[1]]), None
        own.restore()
        b = given.edit([EDITS[1]])
        given.restore()
        for key in a.names:
            assert torch.allclose(a.after[key], b.after[key], atol=1e-5)
    assert len(shared._found) == 2
    other = shared.give(make_editor("alphaedit", lm, statistics=C, layers=[1], threshold=2.0, **SMALL))
    assert len(shared._found) == 2  # the same targets as memit's
    with pytest.raises(ConfigError, match="no shared target"):
        other.edit([PROBES[0]])
    with pytest.raises(ConfigError, match="optimises no targets"):
        shared.give(make_editor("ft", lm, layers=[0]))


def test_edit_and_probe_are_never_one_pair():
    lm = make_lm("llama")
    second_answer = EDITS[0].replace(target="Spanish")
    with pytest.raises(RequestError, match="several answers count as one pair"):
        check_pairs(EDITS, [*PROBES, second_answer])
    chosen = choose(EDITS, [*PROBES, second_answer, PROBES[0].replace(target="guitar")], 4, seed=0)
    assert sorted(p.subject for p in chosen) == sorted(p.subject for p in PROBES)
    assert not {p.subject for p in choose(EDITS, PROBES, 2, 0, avoid_subjects=True)} & {
        e.subject for e in EDITS
    }
    with pytest.raises(RequestError, match="ask for fewer"):
        choose(EDITS, PROBES, 5, seed=0)
    editor = make_editor("memit", lm, statistics=identity_statistics(lm, [0]), layers=[0], **SMALL)
    with pytest.raises(RequestError, match="edit 0"):
        measure(editor, EDITS, Watch(lm, [second_answer]))
    with pytest.raises(ConfigError, match="first_layer"):
        measure(editor, EDITS, Watch(lm, PROBES, first_layer=1))
    with pytest.raises(ConfigError, match="different models"):
        measure(editor, EDITS, Watch(make_lm("llama"), PROBES))


# --- critical layer ---------------------------------------------------------------------------------------------


def test_presets_give_the_last_layer_of_the_published_range():
    lm = make_lm("gptj", n_layers=28)
    lm.name = "EleutherAI/gpt-j-6B"
    found = critical_layer(lm)
    assert (found.layer, found.token) == (8, "subject_last")
    assert "MEMIT" in found.rule
    lm = make_lm("gptj")
    lm.name = "EleutherAI/gpt-j-6B"
    with pytest.raises(DataError, match="2 layers"):
        critical_layer(lm)
    with pytest.raises(DataError, match="rule='tracing'"):
        critical_layer(make_lm("gpt2"))
    assert all(max(row.layers) < row.n_layers for row in PRESETS)


def test_rules_are_recorded():
    lm = make_lm("llama")
    facts = [f.replace(target=f.target_true) for f in EDITS]
    found = critical_layer(lm, facts, rule="tracing", samples=1)
    assert found.layer in (0, 1)
    assert "subject_last" in found.rule
    with pytest.raises(ConfigError, match="needs facts"):
        critical_layer(lm, rule="tracing")
    with pytest.raises(ConfigError, match="rule"):
        critical_layer(lm, rule="guess")
    with pytest.raises(ConfigError, match="no layers"):
        from_site(Site("last", (), "empty"))


# --- trials on the companion --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting():
    from editkit.locate.contexts import ContextTemplates
    from editkit.studies.bench import Bench
    from editkit.studies.testbed import open_testbed

    bed = open_testbed("companion")
    few = {"z_steps": 2, "threshold": 2.0}
    moments = identity_statistics(bed.lm, [1, 2, 3])
    return Bench(bed, [], few, moments, ContextTemplates(), bed.lm.fingerprint())


def test_a_trial_predicts_and_measures(setting):
    from editkit.entanglement.predictors import PREDICTORS
    from editkit.studies.clare.ablation import ablate
    from editkit.studies.clare.trial import ARMS, SINGLE, pair_kinds, separation, wanted, world_trial

    before = setting.lm.fingerprint()
    trial = world_trial(setting, 2, 12, seed=5)
    layer = setting.layers[-1]
    shared = trial.scores(layer, ["random", "clare", "clare-centered", "key-cosine"])
    found, own = trial.run("memit-1", list(PREDICTORS))
    assert set(own) == {name for name, p in PREDICTORS.items() if p.per_editor}
    for table in (*shared.values(), *own.values(), found["logit_l2"]):
        assert table.shape == (2, len(trial.probes))
        assert np.isfinite(table).all()
    # With the targets known, the plan of one layer is the update itself.
    assert np.allclose(own["whitened-targets"], own["written"], rtol=1e-2, atol=1e-5)
    assert np.argsort(own["whitened"][0]).tolist() == np.argsort(own["whitened-targets"][0]).tolist()
    editors = [setting.editor(arm, shared=False) for arm in ARMS.values()]
    assert [len(editor.config.layers) == 1 for editor in editors] == [arm in SINGLE for arm in ARMS]
    assert setting.lm.fingerprint() == before
    labels, kinds = (
        wanted(setting.testbed.world, trial.edits, trial.probes),
        pair_kinds(setting.testbed.world, trial.edits, trial.probes),
    )
    assert ((kinds == "edit") <= (labels == "wanted")).all()
    assert (labels == "wanted").any()
    table = separation({"ripple": [found["logit_l2"]]}, [labels])
    assert 0 <= table.auc[0] <= 1
    places = ablate(
        setting.lm, [(trial.edits, trial.probes)], {"memit": [found["logit_l2"]]}, layer, layers=[layer]
    )
    row = places[
        (places.module == "block_output")
        & (places.token == "last")
        & ~places.with_answer
        & (places.score == "cosine")
    ]
    assert np.isclose(
        row.spearman.item(), stats.spearmanr(shared["clare"].ravel(), found["logit_l2"].ravel()).statistic
    )


def test_trials_leave_out_the_design_facts(setting, monkeypatch):
    from editkit.studies.clare.trial import corpus_trial, design_facts

    names = [f"name {i}" for i in range(700)]
    corpus = [Fact("{} lives in", name, ("Paris", "Rome", "Vienna")[i % 3]) for i, name in enumerate(names)]
    used = {f.key for f in design_facts(corpus)}
    assert len(used) == 244
    monkeypatch.setattr("editkit.studies.clare.trial.known_facts", lambda lm, facts, n: list(facts)[:n])
    trial = corpus_trial(setting, 50, 100, seed=0, corpus=corpus)
    assert len(trial.edits) == 50
    assert len(trial.probes) == 100
    assert not used & ({f.case_id for f in trial.edits} | {f.key for f in trial.probes})
    with pytest.raises(DataError, match="asked for"):
        corpus_trial(setting, 500, 4, seed=0, corpus=corpus)


def test_costs_of_every_task():
    from editkit.studies.clare.cost import TASKS, bytes_per_fact, measure_task, run_task

    lm = make_lm("llama")
    size = sum(p.numel() for p in lm.model.parameters())
    assert bytes_per_fact(lm, "gradsim", 1) == 4 * size
    assert bytes_per_fact(lm, "clare", 1) == 4 * lm.d_model
    for task in TASKS:
        run_task(lm, task, PROBES, 1, batched=True)
    found = measure_task(lm, "clare", PROBES, 1)
    assert found["seconds_per_fact"] > 0
    assert found["peak"] == found["weights"] + found["rise"]
    with pytest.raises(ConfigError, match="at least 4"):
        measure_task(lm, "clare", PROBES[:2], 1)
    with pytest.raises(ConfigError, match="task"):
        run_task(lm, "clair", PROBES, 1, batched=False)


def test_published_figures_have_a_source():
    from editkit.studies import published

    gains = published.table("clare", "gain").set_index("model").gain_over_gradsim
    assert np.isclose(gains["mean"], gains.drop("mean").mean(), atol=2e-3)
    assert "2603.19297" in published.source("clare", "gain")
    with pytest.raises(ConfigError, match="published"):
        published.table("clare", "nothing")
