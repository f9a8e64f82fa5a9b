"""Residual spreads: what each strategy does to alignment, amplitude and gradients."""

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, NumericsError
from editkit.linear.spread import STRATEGIES, alignment, projection_coefficient, spread
from editkit.methods import make_editor
from editkit.methods.hypernet.data import Draw
from editkit.methods.hypernet.sites import find_sites
from editkit.methods.hypernet.strength import drift_at, strength_curve

TINY = {"max_examples": 25, "deadline": None}
shapes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))


def draw(layers, rows, columns, seed, shared=1.0):
    """Residuals with a common part, and unrelated gradients."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(rows, columns, generator=g, dtype=torch.float64)  # noqa: E731
    common = normal()
    return [shared * common + normal() for _ in range(layers)], [normal() for _ in range(layers)]


def inner(a, b):
    return float((a * b).sum())


@settings(**TINY)
@given(shapes)
def test_consecutive_is_orthogonal_to_the_previous_residual(shape):
    R, _ = draw(*shape)
    out = spread(R, "consecutive")
    assert torch.equal(out[0], R[0])
    cos = alignment(R)
    for layer in range(1, len(R)):
        scale = float(R[layer].norm() * R[layer - 1].norm())
        assert abs(inner(out[layer], R[layer - 1])) < 1e-12 * scale
        # the energy that is left is 1 - cos^2 of the residual's
        expected = float(R[layer].norm() ** 2 * (1 - cos[layer, layer - 1] ** 2))
        assert math.isclose(float(out[layer].norm() ** 2), expected, rel_tol=1e-8, abs_tol=1e-12 * scale)


@settings(**TINY)
@given(shapes)
def test_gram_schmidt_is_orthogonal_and_spans_the_same(shape):
    R, _ = draw(*shape)
    Q = spread(R, "gram_schmidt")
    for i, a in enumerate(Q):
        for j, b in enumerate(Q[:i]):
            assert abs(inner(a, b)) < 1e-10 * float(R[i].norm() * R[j].norm())
    flat_R, flat_Q = (torch.stack([x.flatten() for x in X]) for X in (R, Q))
    # Every residual is a combination of the orthogonal ones: projecting on their span changes nothing.
    left = flat_R - flat_R @ torch.linalg.pinv(flat_Q) @ flat_Q
    assert float(left.norm()) < 1e-8 * float(flat_R.norm())


def test_gram_schmidt_of_dependent_residuals_is_zero_and_stays_out_of_the_way():
    R, _ = draw(2, 4, 3, seed=5)
    Q = spread([R[0], -2.5 * R[0], R[1]], "gram_schmidt")
    assert torch.equal(Q[1], torch.zeros_like(Q[1]))
    assert torch.allclose(Q[2], spread(R, "gram_schmidt")[1])


@settings(**TINY)
@given(shapes, st.sampled_from(["consecutive", "gram_schmidt"]))
def test_per_fact_orthogonality_holds_for_every_fact(shape, strategy):
    layers, rows, columns, seed = shape
    R, _ = draw(layers, rows, columns, seed)
    out = spread(R, strategy, axis=0)
    single = [spread([r[:, [f]] for r in R], strategy) for f in range(columns)]
    for layer in range(layers):
        together = torch.cat([single[f][layer] for f in range(columns)], dim=1)
        assert torch.allclose(out[layer], together, atol=1e-10)
    # rows instead of columns: the same facts, transposed
    turned = spread([r.T for r in R], strategy, axis=1)
    assert all(torch.allclose(a.T, b, atol=1e-10) for a, b in zip(turned, out))


@settings(**TINY)
@given(shapes)
def test_released_is_not_orthogonal_by_the_derived_amount(shape):
    R, g = draw(*shape)
    out = spread(R, "released", gradients=g)
    for layer in range(1, len(R)):
        p = float(projection_coefficient(R[layer], R[layer - 1]))
        expected = p * (inner(R[layer - 1], R[layer - 1]) - inner(g[layer - 1], R[layer - 1]))
        assert math.isclose(inner(out[layer], R[layer - 1]), expected, rel_tol=1e-8, abs_tol=1e-10)


def test_released_with_the_residuals_as_gradients_is_consecutive():
    R, _ = draw(4, 3, 5, seed=1)
    for a, b in zip(spread(R, "released", gradients=R), spread(R, "consecutive")):
        assert torch.equal(a, b)


def test_descent_directions_make_released_increase_the_alignment():
    """Residuals are descent directions, <g, R> < 0; then R - p g turns towards the previous residual."""
    R, _ = draw(2, 8, 20, seed=2, shared=1.5)
    before = float(alignment(R)[0, 1])
    after = [
        float(alignment([R[0], spread(R, "released", gradients=[-scale * r for r in R])[1]])[0, 1])
        for scale in (0.1, 1.0, 10.0)
    ]
    assert before < after[0] < after[1] < after[2]


def test_uniform_and_linear_decay():
    R, _ = draw(3, 4, 2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(spread(R, "uniform"), R))
    assert all(torch.allclose(a, b / k) for a, b, k in zip(spread(R, "linear_decay"), R, (3, 2, 1)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("axis", [None, 1])
def test_gradients_agree_with_finite_differences(strategy, axis):
    R, g = draw(3, 3, 2, seed=4)
    R = [r.requires_grad_() for r in R]
    assert torch.autograd.gradcheck(lambda *x: tuple(spread(x, strategy, gradients=g, axis=axis)), R)


def test_detached_gradients_are_the_derived_ones():
    """Fact sheet 5.3: with P and g constant, dL/dR = G' - <G', x> / <P, P> P, x = P or g."""
    R, g = draw(2, 4, 3, seed=6)
    up, P = draw(1, 4, 3, seed=7)[0][0], R[0]
    for strategy, subtracted in (("consecutive", P), ("released", g[0])):
        leaves = [r.clone().requires_grad_() for r in R]
        (spread(leaves, strategy, gradients=g, detach=True)[1] * up).sum().backward()
        expected = up - inner(up, subtracted) / inner(P, P) * P
        assert torch.allclose(leaves[1].grad, expected, atol=1e-12)
        assert leaves[0].grad is None
    # not detached: also through the previous layer
    leaves = [r.clone().requires_grad_() for r in R]
    (spread(leaves, "consecutive")[1] * up).sum().backward()
    a, b, c = inner(up, P), inner(R[1], P), inner(P, P)
    expected = -(a * R[1] + b * up - 2 * a * b / c * P) / c
    assert torch.allclose(leaves[0].grad, expected, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_zero_layer_is_harmless(strategy):
    R, g = draw(3, 3, 2, seed=8)
    R[1] = torch.zeros_like(R[1])
    R = [r.requires_grad_() for r in R]
    out = spread(R, strategy, gradients=g)
    sum(o.sum() for o in out).backward()
    assert all(torch.isfinite(o).all() for o in out)
    assert all(r.grad is None or torch.isfinite(r.grad).all() for r in R)


def test_low_precision_is_widened():
    R, _ = draw(2, 3, 2, seed=9)
    assert all(o.dtype == torch.float64 for o in spread([r.float() for r in R], "uniform"))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda R: spread(R, "orthogonal"), ConfigError, "choose one of uniform"),
        (lambda R: spread([], "uniform"), NumericsError, "empty"),
        (lambda R: spread(R, "released"), ConfigError, "gradients="),
        (lambda R: spread(R, "released", gradients=R[:1]), NumericsError, "one each"),
        (lambda R: spread([R[0], R[1][:2]], "uniform"), NumericsError, "equal shape"),
        (lambda R: spread([R[0], R[1] * math.nan], "uniform"), NumericsError, "layer 1 has NaN"),
        (lambda R: spread(R, "uniform", axis=2), ConfigError, "axis = 2"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    R, _ = draw(2, 3, 2, seed=10)
    with pytest.raises(error, match=words):
        call(R)


# --- the spread of a locate-then-edit method's residual


def edited(lm, facts, n_layers=3, **options):
    """Recorded intermediates of one MEMIT batch on a tiny model; the model is restored."""
    seen = {}
    C = {layer: torch.eye(lm.d_key, dtype=torch.float64) for layer in range(n_layers)}
    editor = make_editor(
        "memit", lm, layers=list(range(n_layers)), lam=5.0, statistics=C, contexts=[["{}"]],
        z_lr=0.3, z_steps=3, z_clamp_factor=2.0, record=seen.__setitem__, **options,
    )  # fmt: skip
    editor.edit(facts)
    seen["weights"] = [lm.get_matrix(layer) for layer in range(n_layers)]
    editor.restore()
    seen["measured"] = [seen["z"] - seen[f"curz_{layer}"] for layer in range(n_layers)]
    seen["written"] = [seen[f"resid_{layer}"] for layer in range(n_layers)]
    return seen


def test_memit_divides_its_residual_by_the_layers_to_come(tiny_lm, facts):
    seen = edited(tiny_lm("llama", n_layers=3), facts)
    for measured, written, left in zip(seen["measured"], seen["written"], (3, 2, 1)):
        assert torch.equal(written, measured / left)


@pytest.mark.parametrize("by", ["layer", "fact"])
@pytest.mark.parametrize("strategy", ["uniform", "consecutive", "gram_schmidt"])
def test_memit_spreads_what_it_measures(tiny_lm, facts, strategy, by):
    lm = tiny_lm("llama", n_layers=3)
    seen = edited(lm, facts, spread=strategy, spread_by=by)
    expected = spread(seen["measured"], strategy, axis=0 if by == "fact" else None)
    for a, b in zip(seen["written"], expected):
        assert torch.allclose(a, b, atol=1e-12 * float(b.norm()) + 1e-15)
    default = edited(lm, facts)
    assert any(not torch.equal(a, b) for a, b in zip(default["weights"], seen["weights"]))


def test_memit_has_no_gradients_to_subtract(tiny_lm, facts):
    with pytest.raises(ConfigError, match="spread"):
        edited(tiny_lm("llama", n_layers=3), facts, spread="released")


# --- the derivation page


PAGE = Path(__file__).parents[1] / "book" / "horse" / "derivation.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
needs_book = pytest.mark.skipif(not TEXT, reason="the book is not part of this installation")


@needs_book
def test_blocks_of_the_derivation_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S)
    assert len(blocks) >= 4
    page: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), page)


@needs_book
def test_labels_are_unique_and_every_reference_has_one():
    labels = Counter(re.findall(r"^:label: (\S+)$", TEXT, flags=re.M))
    assert max(labels.values()) == 1
    used = re.findall(r"\{(?:eq|prf:ref)\}`([^`]+)`", TEXT)
    assert used and {name for name in used if "horse-" in name} <= set(labels)
    blocks = " ".join(re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S))
    assert set(re.findall(r"(?:eq|prop|thm)-horse-[a-z-]+", blocks)) <= set(labels)


def exchangeable(layers, s, seed=0, rows=5, columns=6):
    """Residuals of norm 1 with a shared unit direction b, orthogonal noise, and equal cosines s."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(rows * columns, layers + 1, dtype=torch.float64, generator=g)
    basis = torch.linalg.qr(X).Q.T.reshape(-1, rows, columns)
    return [s**0.5 * basis[0] + (1 - s) ** 0.5 * n for n in basis[1:]], basis[0]


def weights(strategy, L, s):
    """c_j of the proof of the theorem on noise: the written sum is sum_j c_j R_j."""
    w = [s / (1 + (l - 2) * s) for l in range(1, L + 1)]
    return {
        "uniform": [1.0] * L,
        "linear_decay": [1 / (L - j) for j in range(L)],
        "consecutive": [1 - s] * (L - 1) + [1.0],
        "gram_schmidt": [1 - sum(w[j + 1 :]) for j in range(L)],
    }[strategy]


def energy(strategy, L, s):
    return {
        "uniform": L,
        "linear_decay": sum(1 / k**2 for k in range(1, L + 1)),
        "consecutive": 1 + (L - 1) * (1 - s**2),
        "gram_schmidt": sum((1 - s) * (1 + (l - 1) * s) / (1 + (l - 2) * s) for l in range(1, L + 1)),
    }[strategy]


@settings(**TINY)
@given(st.integers(2, 7), st.floats(0.05, 0.95), st.sampled_from(sorted(set(STRATEGIES) - {"released"})))
def test_signal_noise_and_energy(L, s, strategy):
    R, b = exchangeable(L, s)
    out = spread(R, strategy)
    total, c = sum(out), torch.tensor(weights(strategy, L, s), dtype=torch.float64)
    signal = inner(total, b)
    noise = float((total - signal * b).square().sum())
    assert math.isclose(signal, s**0.5 * float(c.sum()), rel_tol=1e-9)
    assert math.isclose(noise, (1 - s) * float(c.square().sum()), rel_tol=1e-9)
    assert math.isclose(sum(float(o.square().sum()) for o in out), energy(strategy, L, s), rel_tol=1e-9)
    # no strategy beats the uniform one in signal to noise, nor in energy at equal signal
    assert signal**2 / noise <= L * s / (1 - s) * (1 + 1e-9)
    assert energy(strategy, L, s) >= signal**2 / (L * s) * (1 - 1e-9)


@settings(**TINY)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_the_bound_holds_for_any_linear_spread(L, rows, seed):
    g = torch.Generator().manual_seed(seed)
    R, b = exchangeable(L, 0.4, seed)
    T = torch.randn(L, L, dtype=torch.float64, generator=g)
    out = [sum(t * r for t, r in zip(row, R)) for row in T]
    signal = inner(sum(out), b)
    noise = float((sum(out) - signal * b).square().sum())
    assert signal**2 <= L * 0.4 / 0.6 * noise * (1 + 1e-9)
    bound = signal**2 / L * (1 + 0.6 / (L * 0.4))
    assert sum(float(o.square().sum()) for o in out) >= bound * (1 - 1e-9)


@settings(**TINY)
@given(shapes)
def test_one_coefficient_per_fact_leaves_no_more_energy(shape):
    R, _ = draw(*shape)
    for whole, single in zip(spread(R, "consecutive"), spread(R, "consecutive", axis=0)):
        assert float(single.norm()) <= float(whole.norm()) * (1 + 1e-12)


@settings(**TINY)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=7))
def test_memits_loop_contributes_what_the_theorem_says_and_never_overshoots(rho):
    """The loop itself, with shares from the library, against the closed form."""
    L, left, written = len(rho), 1.0, []
    for i, realised in enumerate(rho):
        share = spread([torch.full((1,), left, dtype=torch.float64)] * L, "linear_decay")[i]
        written.append(realised * float(share))
        left -= written[-1]
    for i, value in enumerate(written):
        before = math.prod(1 - rho[k] / (L - k) for k in range(i))
        assert math.isclose(value, rho[i] / (L - i) * before, abs_tol=1e-12) and value >= 0
    assert math.isclose(left, math.prod(1 - r / (L - i) for i, r in enumerate(rho)), abs_tol=1e-9)
    assert left >= -1e-12


def test_simultaneous_layers_overshoot_as_derived():
    """J(x) = -x + x^2 / 2: rises when the written sum exceeds twice the best step."""
    for L in range(1, 8):
        R = [torch.ones(1, 1)] * L
        tau = {name: float(sum(spread(R, name))) for name in ("uniform", "linear_decay", "consecutive")}
        tau["gram_schmidt"] = float(sum(spread(R, "gram_schmidt")))
        rises = {name: t**2 / 2 - t > 1e-12 for name, t in tau.items()}
        assert rises == {
            "uniform": L >= 3, "linear_decay": L >= 4, "consecutive": False, "gram_schmidt": False
        }  # fmt: skip


@settings(**TINY)
@given(st.integers(2, 6), st.floats(0.1, 0.9), st.floats(0.0, 1.0))
def test_orthogonal_spreads_of_a_remeasured_residual(L, realised, turn):
    """Case 1: nothing after the first layer. Case 2: the second layer writes the first one's error."""
    r, _ = draw(2, 4, 3, seed=L)
    r1, error = r[0], spread(r, "consecutive")[1] * turn
    for strategy in ("consecutive", "gram_schmidt"):
        seen = [r1]
        for _ in range(L - 1):
            seen.append(seen[-1] - realised * spread(seen, strategy)[-1])
        out = spread(seen, strategy)
        assert all(float(o.norm()) < 1e-12 * float(r1.norm()) for o in out[1:])
        assert torch.allclose(seen[-1], (1 - realised) * r1)
        second = spread([r1, (1 - realised) * r1 - error], strategy)[1]
        assert torch.allclose(second, -error, atol=1e-12)


@settings(**TINY)
@given(st.floats(1e-2, 1e6), st.integers(0, 10**6))
def test_a_large_ridge_gives_the_sum_of_rank_one_moves(ridge, seed):
    g = torch.Generator().manual_seed(seed)
    K, R = (torch.randn(k, 4, dtype=torch.float64, generator=g) for k in (6, 3))
    Delta = torch.linalg.solve(K @ K.T + ridge * torch.eye(6, dtype=torch.float64), K @ R.T).T
    sigma = float(torch.linalg.matrix_norm(K, 2)) ** 2
    gap = float((ridge * Delta - R @ K.T).norm())
    assert gap <= sigma / (sigma + ridge) * float((R @ K.T).norm()) * (1 + 1e-9)


# --- strength


def test_strength_curve_scales_one_plan_and_leaves_the_model(tiny_lm):
    lm = tiny_lm("gpt2")
    sites = find_sites(lm, [0, 1])
    g = torch.Generator().manual_seed(0)
    shifts = [torch.randn(s.m, s.d, dtype=torch.float64, generator=g) for s in sites]
    asked = Draw(
        (("The mother tongue of Li is", "French"), ("Hugo Castro plays the", "violin")),
        (("Li speaks", "French"), ("The music of Hugo Castro is", "violin")),
        (("The weather was", "fine"), ("Mary lives in", "Rome")),
    )
    before = lm.fingerprint()
    found = strength_curve(lm, sites, shifts, asked, [0.0, 0.5, 1.0])
    assert lm.fingerprint() == before
    assert abs(found["drift"][0]) < 1e-12 and (found["drift"][1:] > 0).all()
    assert found["norm"][2] == pytest.approx(2 * found["norm"][1])
    twice = strength_curve(lm, sites, [2 * s for s in shifts], asked, [0.5])
    columns = ["edits", "paraphrases", "unrelated", "edit_nll", "paraphrase_nll", "drift"]
    assert np.allclose(found.iloc[2][columns].tolist(), twice.iloc[0][columns].tolist(), rtol=1e-5)
    assert list(twice.columns) == list(found.columns) and set(columns) < set(found.columns)


def test_drift_at_equal_success_interpolates():
    curve = pd.DataFrame(
        {"scale": [0, 1, 2, 3], "paraphrases": [0.0, 0.4, 0.8, 0.8], "drift": [0.0, 1.0, 3.0, 9.0]}
    )
    assert drift_at(curve, 0.6) == pytest.approx(2.0)
    assert drift_at(curve, 0.0) == 0.0 and math.isnan(drift_at(curve, 0.9))
    with pytest.raises(ConfigError, match="ascend"):
        drift_at(curve.iloc[::-1], 0.6)
