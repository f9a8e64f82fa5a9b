"""Editors: the contract for all of them on every architecture, and the mathematics of each."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL_TYPES, SENTENCES, make_lm

from editkit.base.errors import ConfigError, ModelError, NumericsError, RequestError
from editkit.linear.normal import alphaedit_update, memit_update, null_projector, one_time_solution
from editkit.locate.keys import compute_keys, read_states
from editkit.locate.moments import second_moment
from editkit.methods import EDITORS, make_editor
from editkit.methods.contract import check_editor
from editkit.methods.weights.accumulate import fact_id
from editkit.models.facts import Fact

CONTEXTS = [["{}"], ["The weather was fine today. {}"]]
Z = {"z_lr": 0.3, "z_steps": 3, "z_clamp_factor": 2.0}
FAST = {
    "ft": {"lr": 0.01, "steps": 2},
    "regularized": {"tolerance": 1e-6, "ridge": 1.0, "weight": 0.01, "lam": 10.0, **Z},
    "alphaedit": {"threshold": 0.5, "ridge": 1.0, **Z},
    "nse": {"lam": 10.0, "alpha": 0.0, "upper_bound": 1e9, **Z},
    "rome": {"whiten": True, **Z},
}
OTHERS = {"lam": 10.0, **Z}  # of every editor that FAST does not name
WITHOUT_STATISTICS = {"ft"}  # editors that read no second moments
STATISTICS: dict[tuple, dict] = {}


def statistics(lm, layers=(0, 1)):
    """Second moments of a tiny model with a ridge that makes them invertible; kept, being used often."""
    key = (lm.fingerprint(), tuple(layers))
    if key not in STATISTICS:
        found = second_moment(lm, layers, SENTENCES)
        STATISTICS[key] = {l: c.C + 0.05 * torch.eye(len(c.C), dtype=torch.float64) for l, c in found.items()}
    return STATISTICS[key]


def make(name, lm, **changes):
    options = {"layers": [0] if name == "rome" else [0, 1], **FAST.get(name, OTHERS)}
    if name != "ft":
        options |= {"contexts": CONTEXTS}
    if name not in WITHOUT_STATISTICS and changes.get("whiten", True):
        options |= {"statistics": statistics(lm)}
    return make_editor(name, lm, **{**options, **changes})


# Memories, LoRA and hypernetworks need other options; their own tests run the same contract.
ELSEWHERE = ("editkit.methods.memory", "editkit.methods.weights.lora", "editkit.methods.hypernet.editor")
HERE = sorted(n for n, e in EDITORS.items() if not e.__module__.startswith(ELSEWHERE))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("name", HERE)
def test_contract(name, model_type, facts):
    check_editor(lambda lm, **changes: make(name, lm, **changes), make_lm(model_type), facts[:3])


VARIANTS = [
    ("alphaedit", {"history": False}),
    ("alphaedit", {"solver": "released"}),
    ("alphaedit", {"lam": 5.0, "engine": "keys"}),
    ("memit", {"history": True, "engine": "inverse"}),
    ("memit_seq", {"solver": "released"}),
    ("memit_seq", {"conflicts": "replace", "engine": "cholesky"}),
    ("rect", {"history": True, "compensate": True}),
    ("rect", {"history": True, "processing": "after_loop", "keep": 0.4}),
    ("prune", {"when": "step", "history": True, "compensate": True, "processing": "after_loop"}),
    ("prune", {"double_add": True, "history": True}),
    ("nse", {"history": False}),
    ("nse", {"compensate": True, "z_from": "current"}),
    ("memorize_latest", {"simplified": True, "threshold": 0.5, "ridge": 1.0}),
    ("rome", {"key": "released", "whiten": False}),
    ("ft", {"objective": "prompt_last", "limit": 0.005, "biases": True, "batch_size": 2}),
    ("memit", {"token": "last"}),
    ("rome", {"token": "last"}),
    ("alphaedit", {"token": "last"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(o)}" for n, o in VARIANTS])
def test_contract_of_variants(name, options, facts):
    def factory(lm, **changes):
        return make(name, lm, **{**options, **changes})

    check_editor(factory, make_lm("gpt2"), facts[:3])


def test_contexts_are_sampled_from_the_model_and_saved(facts, tmp_path):
    lm = make_lm("gpt2")
    editors = [make("memit", lm, contexts=None, n_contexts=2, context_length=4, seed=s) for s in (0, 0, 1)]
    for editor in editors:
        editor.edit(facts[:1])
        editor.restore()
    assert editors[0].contexts == editors[1].contexts != editors[2].contexts
    assert len(editors[0].contexts.flat) == 3
    editors[0].edit(facts[:1])
    path = editors[0].save(tmp_path / "state")
    moments = editors[0].statistics  # of the unedited model, as at the start of the stream
    fresh = make("memit", lm, statistics=moments, contexts=None, n_contexts=2, context_length=4, seed=0)
    fresh.load(path)
    assert fresh.contexts == editors[0].contexts


# --- one layer: the editor against the mathematics


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_memit_and_alphaedit_write_the_solution(model_type, facts):
    lm = make_lm(model_type)
    for name, solve in (
        ("memit", lambda K, R, C: memit_update(K, R, C, 10.0)),
        ("alphaedit", lambda K, R, C: alphaedit_update(K, R, null_projector(C, 0.5), None, 1.0)),
    ):
        seen = {}
        editor = make(name, lm, layers=[1], record=seen.__setitem__)
        K = compute_keys(lm, facts, 1, contexts=CONTEXTS)
        now = read_states(lm, facts, outputs=[lm.block_name(1)]).output[lm.block_name(1)]
        W, C0 = lm.get_matrix(1), editor.second_moment(1)
        editor.edit(facts)
        expected = solve(K, seen["z"] - now, C0)
        assert (lm.get_matrix(1) - W - expected).abs().max() < 1e-6
        editor.restore()
        assert torch.equal(lm.get_matrix(1), W)


def test_memit_spreads_the_residual_and_measures_it_again(facts):
    lm = make_lm("qwen2", n_layers=3)
    seen = {}
    editor = make_editor(
        "memit", lm, layers=[0, 1, 2], lam=1e-6, **Z, contexts=CONTEXTS[:1], record=seen.__setitem__,
        statistics=statistics(lm, (0, 1, 2)),
    )  # fmt: skip
    delta = editor.edit(facts)
    for i in range(3):
        assert torch.allclose(seen[f"resid_{i}"], (seen["z"] - seen[f"curz_{i}"]) / (3 - i))
    # A negligible prior and one context: the last layer writes the whole residual.
    assert max(delta.metadata["residual"]) < 1e-2 * float(seen["resid_0"].norm(dim=0).max())
    assert (seen["curz_1"] - seen["curz_0"]).abs().max() > 1e-3


def test_rome_imposes_the_value_at_the_key(facts):
    for model_type in ("gpt2", "llama"):
        lm = make_lm(model_type)
        for key in ("mean", "released"):
            seen = {}
            editor = make("rome", lm, key=key, record=seen.__setitem__)
            editor.edit(facts[:1])
            bias = getattr(lm.model.get_submodule(lm.down_name(0)), "bias", None)
            b = 0 if bias is None else bias.detach().double()
            got = lm.get_matrix(0) @ seen["imposed_key"] + b
            assert (got - seen["v"]).abs().max() < 1e-5
            bare = compute_keys(lm, facts[:1], 0)[:, 0]
            assert torch.allclose(bare, seen["imposed_key"], atol=1e-6) == (key == "released")
            editor.restore()


def test_rome_edits_one_after_the_other(facts):
    lm = make_lm("llama")
    together = make("rome", lm)
    whole = together.edit(facts)
    together.restore()
    single = make("rome", lm)
    for fact in facts:
        last = single.edit([fact])
    assert torch.equal(whole.after[last.names[0]], last.after[last.names[0]])
    with pytest.raises(ConfigError, match="one layer"):
        make("rome", lm, layers=[0, 1])


class Fixed:
    """Mix-in: fixed keys and targets (outputs W k), so that the linear theory holds exactly."""

    K: dict
    V: dict

    def targets(self, facts):
        return torch.stack([self.V[f.case_id] for f in facts], dim=1)

    def keys(self, facts, layer):
        return torch.stack([self.K[f.case_id] for f in facts], dim=1)

    def current(self, facts):
        layer = self.config.layers[0]
        return self.matrix(layer) @ self.keys(facts, layer)


def fixed(name, lm, **changes):
    """An editor of one layer on random fixed keys and targets, and ten facts."""
    generator = torch.Generator().manual_seed(0)
    facts = [Fact(f"fact {i} of {{}} is", "Li", "Paris", case_id=str(i)) for i in range(10)]
    cls = type(EDITORS[name].__name__, (Fixed, EDITORS[name]), {})
    cls.K = {f.case_id: torch.randn(lm.d_key, generator=generator, dtype=torch.float64) for f in facts}
    cls.V = {f.case_id: torch.randn(lm.d_model, generator=generator, dtype=torch.float64) for f in facts}
    options = {**FAST.get(name, OTHERS), "layers": [0], **changes}
    return cls(lm, options, statistics=statistics(lm), contexts=CONTEXTS), facts


def double(lm):
    lm.model.double()
    return lm


def prior_of(editor):
    """lam C0 of the editor's layer."""
    return 10.0 * editor.second_moment(0)


def one_time(editor, facts, W0, prior, projector=None):
    K = editor.keys(facts, 0)
    return W0 + one_time_solution(K, editor.targets(facts), W0, prior, projector)


@pytest.mark.parametrize("engine", ["direct", "inverse", "cholesky", "keys"])
def test_a_sequence_with_history_equals_the_one_time_edit(engine):
    lm = double(make_lm("gpt2"))
    editor, facts = fixed("memit_seq", lm, engine=engine)
    W0 = lm.get_matrix(0)
    for i in (0, 3, 4):
        editor.edit(facts[i : {0: 3, 3: 4, 4: 10}[i]])
    expected = one_time(editor, facts, W0, prior_of(editor))
    assert (lm.get_matrix(0) - expected).norm() < 1e-9 * expected.norm()
    forgetful, _ = fixed("memit", lm)
    editor.restore()
    for i in range(0, 10, 5):
        forgetful.edit(facts[i : i + 5])
    assert (lm.get_matrix(0) - expected).norm() > 1e-2 * expected.norm()


def test_alphaedit_with_history_equals_the_projected_one_time_edit():
    lm = double(make_lm("llama"))
    for solver, tol in (("symmetric", 1e-9), ("released", 1e-4)):
        editor, facts = fixed("alphaedit", lm, solver=solver)
        P = null_projector(editor.second_moment(0), 0.5)
        W0 = lm.get_matrix(0)
        for i in range(0, 10, 2):
            editor.edit(facts[i : i + 2])
        expected = one_time(editor, facts, W0, 1.0, P)
        got = lm.get_matrix(0)
        assert (got - expected).norm() < tol * (expected - W0).norm()
        assert ((got - W0) @ P.P - (got - W0)).norm() < 1e-5 * (got - W0).norm()
        editor.restore()


@pytest.mark.parametrize("name", ["rect", "prune"])
@pytest.mark.parametrize("processing", ["in_loop", "after_loop"])
def test_compensation_keeps_a_post_processed_sequence_on_the_one_time_path(name, processing):
    lm = double(make_lm("gpt2"))
    with torch.no_grad():
        lm.weight(0).mul_(0.01)  # a small spectrum, so that PRUNE has something to squash
    W0 = lm.get_matrix(0)
    options = {"when": "step"} if name == "prune" else {}
    editor, facts = fixed(name, lm, history=True, compensate=True, processing=processing, **options)
    lost = []
    for i in range(0, 10, 2):
        editor.edit(facts[i : i + 2])
        K = editor.keys(facts[: i + 2], 0)
        C = prior_of(editor) + K @ K.T
        A = lm.get_matrix(0) - W0
        B = (editor.targets(facts[: i + 2]) - W0 @ K) @ K.T
        # The cache is the gradient at the written weights: A C = B + E (Labyrinth Algorithm 1).
        assert (A @ C - B - editor.error[0]).norm() < 1e-8 * B.norm()
        lost.append(float(editor.error[0].norm() / B.norm()))
    assert max(lost) > 1e-2
    aligned = (lm.get_matrix(0) - one_time(editor, facts, W0, prior_of(editor))).norm()
    editor.restore()
    plain, _ = fixed(name, lm, history=True, processing=processing, **options)
    for i in range(0, 10, 2):
        plain.edit(facts[i : i + 2])
    assert aligned < 0.9 * (lm.get_matrix(0) - one_time(plain, facts, W0, prior_of(plain))).norm()


def test_rect_writes_the_entries_with_the_largest_relative_change():
    lm = double(make_lm("gpt2"))
    seen = {}
    editor, facts = fixed("rect", lm, keep=0.25)
    editor.record = seen.__setitem__
    W0 = lm.get_matrix(0)
    editor.edit(facts[:3])
    change = lm.get_matrix(0) - W0
    share = float((change != 0).double().mean())
    assert 0.25 <= share < 0.26
    ratio = (seen["upd_0"] / W0).abs()
    assert ratio[change != 0].min() >= ratio[change == 0].max()


def test_prune_squashes_the_total_of_the_stream_once():
    lm = double(make_lm("gpt2"))
    with torch.no_grad():
        lm.weight(0).mul_(0.01)
    W0 = lm.get_matrix(0)
    memit, facts = fixed("memit", lm)
    for i in (0, 5):
        memit.edit(facts[i : i + 5])
    raw = lm.get_matrix(0)
    memit.restore()
    prune, _ = fixed("prune", lm)
    for i in (0, 5):
        prune.edit(facts[i : i + 5])
    limit = torch.linalg.matrix_norm(W0, ord=2)
    assert torch.linalg.matrix_norm(raw - W0, ord=2) > 2 * limit
    squashed = lm.get_matrix(0) - W0
    U, s, V = torch.linalg.svd(raw - W0, full_matrices=False)
    expected = torch.where(s > limit, torch.log(s.clamp_min(limit) / limit) + limit, s)
    assert torch.allclose(squashed, (U * expected) @ V, atol=1e-9)
    assert torch.allclose(prune.unsquashed[0], raw, atol=1e-9)
    prune.restore()
    twice, _ = fixed("prune", lm, double_add=True)
    for i in (0, 5):
        twice.edit(facts[i : i + 5])
    assert torch.allclose(lm.get_matrix(0) - raw, squashed, atol=1e-9)


def test_nse_edits_the_heavy_neurons_and_can_be_consistent():
    lm = double(make_lm("gpt2"))
    W0 = lm.get_matrix(0)
    editor, facts = fixed("nse", lm, neuron_threshold=0.5, passes=1)
    editor.edit(facts[:3])
    change = lm.get_matrix(0) - W0
    mass = editor.keys(facts[:3], 0).abs().sum(1)
    touched = change.abs().sum(0) > 0
    assert mass[touched].min() > mass[~touched].max() and 0.3 < mass[touched].sum() / mass.sum() <= 0.5
    editor.restore()
    # With all neurons, history and one pass NSE is MEMIT with history.
    whole, _ = fixed("nse", lm, neuron_threshold=1.0, passes=1)
    for i in (0, 5):
        whole.edit(facts[i : i + 5])
    expected = one_time(whole, facts, W0, prior_of(whole))
    assert (lm.get_matrix(0) - expected).norm() < 1e-9 * expected.norm()
    whole.restore()
    # Restricted and compensated: E is the gradient that the restricted steps have left.
    exact, _ = fixed("nse", lm, neuron_threshold=0.5, passes=3, compensate=True)
    for i in (0, 3, 6):
        exact.edit(facts[i : i + 3])
    K = exact.keys(facts[:9], 0)
    A = lm.get_matrix(0) - W0
    gradient = A @ (prior_of(exact) + K @ K.T) - (exact.targets(facts[:9]) - W0 @ K) @ K.T
    assert (gradient - exact.error[0]).norm() < 1e-8 * exact.error[0].norm()
    assert (exact.S[0] - K @ K.T).norm() < 1e-9 * (K @ K.T).norm()


def test_memorize_the_latest_is_anchored_at_the_original_weights():
    lm = double(make_lm("gpt2"))
    W0 = lm.get_matrix(0)
    editor, facts = fixed("memorize_latest", lm)
    for i in (0, 5):
        editor.edit(facts[i : i + 5])
    expected = one_time(editor, facts[5:], W0, prior_of(editor))
    assert (lm.get_matrix(0) - expected).norm() < 1e-9 * expected.norm()
    editor.restore()
    simple, _ = fixed("memorize_latest", lm, simplified=True, ridge=1.0)
    for i in (0, 5):
        simple.edit(facts[i : i + 5])
    assert (lm.get_matrix(0) - expected).norm() > 1e-2 * expected.norm()
    with pytest.raises(ConfigError, match="no prior"):
        fixed("memorize_latest", lm, simplified=True)


def test_regularized_is_memit_with_history_without_a_weight():
    lm = double(make_lm("gpt2"))
    W0 = lm.get_matrix(0)
    for weight in (0.0, 2.0):
        editor, facts = fixed("regularized", lm, weight=weight, ridge=0.0, tolerance=1e-11)
        for i in (0, 5):
            editor.edit(facts[i : i + 5])
        A = lm.get_matrix(0) - W0
        free = one_time(editor, facts, W0, prior_of(editor)) - W0
        if weight == 0.0:
            assert (A - free).norm() < 1e-6 * free.norm()
        else:
            assert (A.norm(dim=0) == 0).sum() > 0 or A.norm() < 0.99 * free.norm()
            # Optimality of the one-time problem: gradient + subgradient of the sum of column norms is zero.
            K = editor.keys(facts, 0)
            gradient = 2 * (A @ (prior_of(editor) + K @ K.T) - (editor.targets(facts) - W0 @ K) @ K.T)
            size = A.norm(dim=0)
            on = size > 1e-8
            assert (gradient[:, on] + weight * A[:, on] / size[on]).abs().max() < 1e-3
            assert (gradient[:, ~on].norm(dim=0) <= weight + 1e-3).all()
        editor.restore()


# --- conflicts


def test_conflict_policies():
    lm = double(make_lm("gpt2"))
    W0 = lm.get_matrix(0)
    new = Fact("fact 1 of {} is", "Li", "Rome", case_id="9")  # the fact "1" with another value and key
    for policy in ("replace", "append"):
        editor, facts = fixed("memit_seq", lm, conflicts=policy)
        editor.edit(facts[:5])
        editor.edit([new])
        kept = [f for f in facts[:5] if policy == "append" or f.case_id != "1"]
        expected = one_time(editor, [*kept, new], W0, prior_of(editor))
        assert (lm.get_matrix(0) - expected).norm() < 1e-9 * expected.norm()
        editor.restore()
    # The same key with a new value costs only the value difference.
    editor, facts = fixed("memit_seq", lm, conflicts="replace")
    editor.edit(facts[:5])
    W1, C1 = lm.get_matrix(0), editor.gram(0)
    editor.K["9"] = editor.K["1"]
    editor.edit([new])
    difference = torch.outer(editor.V["9"] - editor.V["1"], editor.K["1"])
    assert torch.allclose(lm.get_matrix(0) - W1, torch.linalg.solve(C1, difference.T).T, atol=1e-9)
    assert torch.allclose(editor.gram(0), C1, atol=1e-9)
    editor.restore()
    editor, facts = fixed("memit_seq", lm, conflicts="refuse")
    editor.edit(facts[:5])
    W1 = lm.get_matrix(0)
    with pytest.raises(RequestError, match="already written"):
        editor.edit([new])
    assert torch.equal(lm.get_matrix(0), W1)
    with pytest.raises(RequestError, match="same fact"):
        editor.edit([facts[7].replace(relation="P1"), facts[8].replace(relation="P1")])
    editor.edit(facts[5:6])  # a refusal does not end the stream
    with pytest.raises(ConfigError, match="history=True"):
        make("memit", lm, conflicts="replace")


def test_fact_identity():
    a = Fact("The job of {} is", "Li", "farmer", relation="P106")
    assert fact_id(a) == fact_id(a.replace(prompt="{} works as a", target="teacher"))
    assert fact_id(a) != fact_id(a.replace(subject="Ana"))
    assert fact_id(a.replace(relation=None)) != fact_id(a.replace(relation=None, prompt="{} works as a"))


# --- life cycle


def test_history_of_another_model_layer_set_or_editor_is_refused(facts, tmp_path):
    lm = make_lm("gpt2")
    editor = make("memit_seq", lm)
    editor.edit(facts[:2])
    path = editor.save(tmp_path / "history.safetensors")
    editor.restore()
    with pytest.raises(ConfigError, match="layers"):
        make("memit_seq", lm, layers=[1]).load(path)
    with pytest.raises(ConfigError, match="lam"):
        make("memit_seq", lm, lam=11.0).load(path)
    with pytest.raises(ConfigError, match="editor 'memit_seq'"):
        make("rect", lm).load(path)
    with pytest.raises(ModelError, match="another model"):
        make("memit_seq", make_lm("gpt2", seed=1)).load(path)
    scaled = {k: 2 * C for k, C in statistics(lm).items()}
    with pytest.raises(NumericsError, match="prior"), pytest.warns(UserWarning, match="other second moments"):
        make("memit_seq", lm, statistics=scaled, force=True).load(path)
    with pytest.raises(ModelError, match="other second moments"):
        make("memit_seq", lm, statistics=scaled).load(path)
    assert torch.equal(lm.weight(0), make_lm("gpt2").weight(0))


def test_changed_weights_under_a_history_are_noticed(facts):
    lm = make_lm("llama")
    editor = make("memit_seq", lm)
    delta = editor.edit(facts[:2])
    delta.restore(lm)
    with pytest.raises(ModelError, match="apply that edit again"):
        editor.edit(facts[2:])
    delta.apply(lm)
    editor.edit(facts[2:])
    plain = make("memit", lm)
    plain.edit(facts[:2]).restore(lm)
    plain.edit(facts[2:])


def test_a_failed_edit_leaves_the_weights_and_blocks_the_history(facts, monkeypatch):
    for name, blocked in (("memit_seq", True), ("memit", False)):
        lm = make_lm("gpt2")
        editor = make(name, lm)
        before = lm.fingerprint()
        keys = type(editor).keys

        def failing(self, facts, layer, keys=keys):
            if layer == 1:
                raise KeyboardInterrupt
            return keys(self, facts, layer)

        with monkeypatch.context() as patch:
            patch.setattr(type(editor), "keys", failing)
            with pytest.raises(KeyboardInterrupt):
                editor.edit(facts)
        assert lm.fingerprint() == before
        if blocked:
            with pytest.raises(ConfigError, match="restore"):
                editor.edit(facts)
            editor.restore()
        again = editor.edit(facts)
        editor.restore()
        fresh = make(name, lm)
        expected = fresh.edit(facts)
        assert all(torch.equal(again.after[n], expected.after[n]) for n in expected.names)


def test_bfloat16_models_are_edited_on_float32_masters(facts):
    for name in ("memit_seq", "ft"):
        lm = make_lm("llama")
        lm.model.to(torch.bfloat16)
        start = lm.fingerprint()
        editor = make(name, lm)
        first = editor.edit(facts[:2])
        assert first.after[first.names[0]].dtype == torch.float32
        assert 0 < max(first.metadata["cast_loss"].values()) < 1
        second = editor.edit(facts[2:])
        # The second edit starts from the master, not from its rounding.
        name0 = first.names[0]
        if name != "ft":
            assert torch.equal(editor.matrix(0), lm.to_matrix(second.after[name0]).double())
            assert not torch.equal(editor.matrix(0), lm.get_matrix(0))
        editor.restore()
        assert lm.fingerprint() == start
    low = make_lm("llama")
    low.model.to(torch.bfloat16)
    editor = make("memit", low)
    editor.edit(facts[:1]).restore(low)
    editor.edit(facts[:1])  # the master of the restored weights is not used again
    other = make_lm("llama")
    other.model.to(torch.bfloat16)
    alone = make("memit", other).edit(facts[:1])
    assert torch.equal(low.weight(0), other.weight(0)) and alone.names


def test_ft_objectives(facts):
    lm = make_lm("gpt2")
    two = [facts[0].replace(target="French violin"), facts[1]]
    first = make("ft", lm, steps=8, lr=0.01)
    delta = first.edit(two)
    assert delta.metadata["losses"][1] < 0.8 * delta.metadata["losses"][0]
    first.restore()
    seen = {}
    editor = make("ft", lm, steps=1, record=seen.__setitem__)
    editor.edit(two)
    ids = [lm.tokenizer(f"{f.text} {f.target}")["input_ids"] for f in two]
    start = [len(lm.tokenizer(f.text)["input_ids"]) for f in two]
    editor.restore()

    def said(row, n, bag):
        with torch.no_grad():
            p = lm.model(torch.tensor([row])).logits[0].log_softmax(-1)
        return -sum(p[n - 1 if bag else t - 1, row[t]] for t in range(n, len(row))) / (len(row) - n)

    for objective, bag in (("target", False), ("prompt_last", True)):
        editor = make("ft", lm, steps=1, objective=objective, record=seen.__setitem__)
        editor.edit(two)
        editor.restore()
        expected = sum(said(r, n, bag) for r, n in zip(ids, start, strict=True)) / 2
        assert float(seen["batch_losses"][0]) == pytest.approx(float(expected), rel=1e-5)
    limited = make("ft", lm, steps=5, lr=0.1, limit=0.02)
    change = limited.edit(two)
    assert change.update(change.names[0]).abs().max() == pytest.approx(0.02, rel=1e-3)
    limited.restore()
    idle = make("ft", lm, loss_threshold=1e6)
    unchanged = idle.edit(two)
    assert unchanged.update(unchanged.names[0]).abs().max() == 0 and unchanged.metadata["steps"] == 1


def test_names_and_options(facts):
    lm = make_lm("gpt2")
    with pytest.raises(ConfigError, match="did you mean 'memit'"):
        make_editor("memitt", lm)
    with pytest.raises(ConfigError, match="did you mean 'lam'"):
        make("memit", lm, lamb=1.0)
    with pytest.raises(ConfigError, match="twice"):
        make("memit", lm, layers=[1, 1])
    with pytest.raises(ConfigError, match="ascend"):
        make("memit_seq", lm, layers=[1, 0])
    with pytest.raises(ConfigError, match="history=True"):
        make("rect", lm, compensate=True)
    with pytest.raises(ConfigError, match="second moment"):
        make("memit", lm, statistics=None)
    with pytest.raises(NumericsError, match="keys have width"):
        make("memit", lm, statistics={0: torch.eye(3), 1: torch.eye(3)})
    with pytest.raises(NumericsError, match="null-space threshold"):
        make("alphaedit", lm, threshold=1e-9).edit(facts)
    assert {row["name"] for row in EDITORS["memit"].Config.describe()} >= {"layers", "lam", "z_lr", "token"}
    assert make("memit", lm).config.targets.lr == 0.3
