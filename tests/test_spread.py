"""Residual spreads: what each strategy does to alignment, amplitude and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.editors import make_editor
from editkit.errors import ConfigError, NumericsError
from editkit.linear.spread import STRATEGIES, alignment, projection_coefficient, spread

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
