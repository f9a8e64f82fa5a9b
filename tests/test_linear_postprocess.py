"""RECT, PRUNE, error compensation, NSE, memorize-the-latest and convex regularisers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from editkit.base.errors import ConfigError, NumericsError
from editkit.linear.engines import ENGINES, make_engine
from editkit.linear.normal import memit_update, null_projector, one_time_solution, solve_step
from editkit.linear.nse import nse_step, restricted_update, select_neurons
from editkit.linear.postprocess import (
    compensated_step,
    compensation_cache,
    gradient_cache,
    prune_spectrum,
    rect,
    rect_mask,
    squash,
)
from editkit.linear.sequential import (
    Regularizer,
    convex_step,
    l1,
    latest_update,
    minimize_convex,
    neuron_groups,
    nuclear,
)

seeds = st.integers(0, 10**6)
EXACT = 1e-10


def rand(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def spd(rng, d, low=0.5, high=2.0):
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return torch.from_numpy((Q * np.geomspace(low, high, d)) @ Q.T)


def distance(a, b):
    return float(torch.linalg.vector_norm(a - b) / max(1e-300, float(torch.linalg.vector_norm(b))))


def problem(seed, d=8, m=5, n=4, batches=4):
    rng = np.random.default_rng(seed)
    M0, W0 = spd(rng, d), rand(rng, m, d)
    return M0, W0, [rand(rng, d, n) for _ in range(batches)], [rand(rng, m, n) for _ in range(batches)]


def one_time(M0, W0, Ks, Vs):
    return one_time_solution(torch.cat(Ks, dim=1), torch.cat(Vs, dim=1), W0, M0)


def gram(Ks):
    return sum(K @ K.T for K in Ks)


def cross(W0, Ks, Vs):
    return sum((V - W0 @ K) @ K.T for K, V in zip(Ks, Vs))


# RECT and PRUNE.


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.2, 0.4, 0.5, 1.0]), seeds)
def test_rect_keeps_the_largest_relative_changes(m, d, keep, seed):
    rng = np.random.default_rng(seed)
    delta, W = rand(rng, m, d), rand(rng, m, d)
    mask, ratio = rect_mask(delta, W, keep), (delta / (W + 1e-8)).abs()
    k = math.floor(m * d * (1 - keep) + 1e-9)
    assert int(mask.sum()) == m * d - max(k - 1, 0)
    assert not (~mask).any() or ratio[mask].min() > ratio[~mask].max()
    assert torch.equal(rect(delta, W, keep), delta * mask)


def test_rect_mask_by_hand():
    delta = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    W = torch.tensor([[1.0, -4.0, 3.0, 0.0, 50.0]])          # ratios 1, 0.5, 1, huge, 0.1
    assert rect_mask(delta, W, 0.4).tolist() == [[True, False, True, True, False]]
    with pytest.raises(ConfigError, match="keep is 0"):
        rect_mask(delta, W, 0)
    with pytest.raises(NumericsError, match="W has shape"):
        rect_mask(delta, W.T)


@pytest.mark.parametrize(("curve", "expected"), [
    ("log", math.log(8) - math.log(2) + 2), ("log2", 4.0), ("log1.5", math.log(4, 1.5) + 2),
    ("log1.2", math.log(4, 1.2) + 2), ("linear", 5.0),
])
def test_prune_squashes_above_the_limit_only(curve, expected):
    s = torch.tensor([8.0, 2.0, 1.0], dtype=torch.float64)
    assert squash(s, 2.0, curve).tolist() == pytest.approx([expected, 2.0, 1.0])
    rng = np.random.default_rng(0)
    U, V = torch.linalg.qr(rand(rng, 5, 3))[0], torch.linalg.qr(rand(rng, 6, 3))[0]
    W = 2.0 * torch.linalg.qr(rand(rng, 6, 5))[0].T           # spectral norm 2
    delta = (U * s) @ V.T
    pruned = prune_spectrum(delta, W, curve)
    assert sorted(torch.linalg.svdvals(pruned)[:3].tolist()) == pytest.approx(sorted([expected, 2.0, 1.0]))
    assert distance(U @ (U.T @ pruned), pruned) < EXACT       # singular vectors are kept
    assert torch.equal(prune_spectrum(delta / 8, W, curve), delta / 8)


def test_log_squash_enlarges_on_small_weights():
    """Not a damping: below 1 / ln(b) the logarithm has slope above 1."""
    s = torch.tensor([0.2], dtype=torch.float64)
    assert float(squash(s, 0.1)) == pytest.approx(math.log(2) + 0.1) and float(squash(s, 0.1)) > 0.2
    assert float(squash(s, 0.1, "linear")) < 0.2
    with pytest.raises(ConfigError, match="curve='root'"):
        squash(s, 1.0, "root")
    with pytest.raises(NumericsError, match="is the weight matrix zero"):
        prune_spectrum(torch.ones(2, 2), torch.zeros(2, 2))


# Algorithm 1.

MAPS = {
    "rect": lambda W: lambda delta: rect(delta, W, 0.4),
    "prune": lambda W: lambda delta: prune_spectrum(delta, 0.1 * W, "linear"),
    "bfloat16": lambda W: lambda delta: delta.to(torch.bfloat16).double(),
    "zero": lambda W: lambda delta: torch.zeros_like(delta),
}


def sequence(engine, W0, Ks, Vs, post, compensate=True):
    """Written weights, their last raw and written update, the last cache."""
    W, E, errors = W0.clone(), None, []
    for K, V in zip(Ks, Vs):
        written, raw, cache = compensated_step(engine, K, V - W @ K, E if compensate else None, post(W))
        before, W = W, W + written
        errors.append(cache)
        E = cache
    return before, W, raw, written, errors


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_compensation_leaves_only_the_last_error(name, engine, seed):
    """A_T C_T = B_T + E_T, hence A_{T-1} + Delta_T is the one-time solution whatever Q did before."""
    M0, W0, Ks, Vs = problem(seed)
    before, W, raw, written, errors = sequence(make_engine(engine, M0), W0, Ks, Vs, MAPS[name])
    target = one_time(M0, W0, Ks, Vs)
    C, B = M0 + gram(Ks), cross(W0, Ks, Vs)
    assert distance(before - W0 + raw, target) < EXACT
    assert torch.linalg.vector_norm((W - W0) @ C - B - errors[-1]) < EXACT * B.norm()
    assert torch.linalg.vector_norm(errors[-1] - compensation_cache(raw, written, C)) < EXACT * B.norm()
    # Without compensation all errors stay: A_T C_T = B_T + sum_t E_t.
    before, W, raw, _, errors = sequence(make_engine(engine, M0), W0, Ks, Vs, MAPS[name], compensate=False)
    assert torch.linalg.vector_norm((W - W0) @ C - B - sum(errors)) < EXACT * B.norm()
    if name != "bfloat16":
        assert distance(before - W0 + raw, target) > 0.01


def test_written_error_obeys_the_feedback_bound():
    """||e_t|| <= sum_s gamma^(t-s+1) ||A*_s - A*_(s-1)|| when ||Q(X) - X|| <= gamma ||X||."""
    M0, W0, Ks, Vs = problem(5, batches=8)
    gamma, engine, W, E = 0.6, make_engine("direct", M0), W0.clone(), None
    bound, previous = 0.0, torch.zeros_like(W0)
    for t, (K, V) in enumerate(zip(Ks, Vs)):
        written, _, E = compensated_step(engine, K, V - W @ K, E, lambda X: (1 - gamma) * X)
        W = W + written
        target = one_time(M0, W0, Ks[:t + 1], Vs[:t + 1])
        bound = gamma * (bound + float(torch.linalg.vector_norm(target - previous)))
        assert float(torch.linalg.vector_norm(W - W0 - target)) <= bound * (1 + 1e-9)
        previous = target


def test_cache_is_half_the_gradient_at_the_written_weights():
    M0, W0, Ks, Vs = problem(2)
    W, E = W0.clone(), None
    for t, (K, V) in enumerate(zip(Ks, Vs)):
        delta = rand(np.random.default_rng(t), *W0.shape)          # any update at all
        E = gradient_cache(E, K, V - W @ K, delta, M0 + gram(Ks[:t + 1]))
        W = W + delta
    A = (W - W0).requires_grad_()
    value = torch.trace(A @ M0 @ A.T) + sum(((W0 + A) @ K - V).pow(2).sum() for K, V in zip(Ks, Vs))
    assert distance(E, torch.autograd.grad(value, A)[0] / 2) < EXACT


def test_one_step_gets_no_compensation():
    """A single batch of everything is cut by RECT and nothing repairs it (the E2000 rows of the paper's
    table)."""
    M0, W0, Ks, Vs = problem(3)
    K, V = torch.cat(Ks, 1), torch.cat(Vs, 1)
    *_, once, _ = sequence(make_engine("direct", M0), W0, [K], [V], MAPS["rect"])
    assert distance(once, rect(one_time(M0, W0, Ks, Vs), W0, 0.4)) < EXACT
    assert distance(once, one_time(M0, W0, Ks, Vs)) > 0.1


# NSE.


def test_neurons_by_key_mass():
    K = torch.tensor([[1.0, -1.0], [5.0, 5.0], [0.0, 1.0], [-3.0, 4.0]])      # masses 2, 10, 1, 7 of 20
    assert select_neurons(K, 0.85).tolist() == [1, 3]
    assert select_neurons(K, 0.96).tolist() == [1, 3, 0]
    assert select_neurons(K, 0.1).tolist() == [1]
    assert select_neurons(K, 1.0).tolist() == [1, 3, 0, 2]
    with pytest.raises(ConfigError, match="neuron_threshold is"):
        select_neurons(K, 1.5)
    with pytest.raises(NumericsError, match="distinct indices"):
        restricted_update(K, K, torch.eye(4), [0, 0])


def test_all_neurons_is_memit_with_history():
    M0, W0, Ks, Vs = problem(4)
    C = M0 + gram(Ks[:2])
    R = Vs[1] - W0 @ Ks[1]
    assert distance(restricted_update(Ks[1], R, C, range(8)), solve_step(Ks[1], R, C)) < EXACT


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_consistent_nse_minimises_on_its_block_and_the_released_form_does_not(seed):
    M0, W0, Ks, Vs = problem(seed, batches=3)
    leftover = {}
    blocks = [set(select_neurons(K, 0.7).tolist()) for K in Ks]
    for consistent in (True, False):
        W, E = W0.clone(), None
        for t, (K, V) in enumerate(zip(Ks, Vs)):
            index = select_neurons(K, 0.7)
            delta, E = nse_step(K, V - W @ K, M0 + gram(Ks[:t + 1]), index, E, consistent=consistent)
            off = [j for j in range(8) if j not in index.tolist()]
            assert off and not delta[:, off].any()
            W = W + delta
        gradient = (W - W0) @ (M0 + gram(Ks)) - cross(W0, Ks, Vs)
        leftover[consistent] = float(gradient[:, index].abs().max())
        if consistent:
            assert distance(E, gradient) < EXACT
    assert leftover[True] < 1e-10
    # a neuron of the last block that an earlier step left out keeps that step's gradient; without one both agree
    if any(not blocks[-1] <= earlier for earlier in blocks[:-1]):
        assert leftover[False] > 1e-6
    else:
        assert leftover[False] < 1e-10


def test_consistent_nse_passes_converge_to_the_one_time_solution():
    """Block-coordinate descent: restricted steps without new facts keep reducing the gradient to zero."""
    M0, W0, Ks, Vs = problem(6)
    K, V, C = torch.cat(Ks, 1), torch.cat(Vs, 1), M0 + gram(Ks)
    delta, E = nse_step(K, V - W0 @ K, C, select_neurons(K, 0.6))
    A, none = delta, torch.zeros(8, 0)
    for sweep in range(400):
        delta, E = nse_step(none, torch.zeros(5, 0), C, [(sweep + j) % 8 for j in range(4)], E)
        A = A + delta
    assert distance(A, one_time(M0, W0, Ks, Vs)) < 1e-8


# Memorize the latest.


@settings(max_examples=30, deadline=None)
@given(seeds, st.booleans())
def test_latest_full_form_is_the_one_time_solution_of_the_last_batch(seed, projected):
    M0, W0, Ks, Vs = problem(seed)
    P = null_projector(M0, 1.0) if projected else None
    A, drift = torch.zeros_like(W0), torch.zeros_like(W0)
    for K, V in zip(Ks, Vs):
        A = A + latest_update(K, V - (W0 + A) @ K, M0 / 3, 3.0, A, projector=P, ridge=0.0)
        drift = drift + latest_update(K, V - (W0 + drift) @ K, M0 / 3, 3.0, drift, projector=P, ridge=0.1,
                                      simplified=True)
    target = one_time_solution(Ks[-1], Vs[-1], W0, M0, P)
    assert distance(A, target) < EXACT
    assert distance(drift, target) > 0.05 and torch.linalg.vector_norm(drift) > torch.linalg.vector_norm(A)


def test_latest_ridge_pulls_the_increment_not_the_total():
    """With a ridge the full form minimises ridge ||Delta||^2 + lam tr(A C0 A^T) + the last batch."""
    M0, W0, Ks, Vs = problem(8)
    A = rand(np.random.default_rng(0), *W0.shape)
    D = latest_update(Ks[0], Vs[0] - (W0 + A) @ Ks[0], M0, 2.0, A, ridge=0.5)
    gradient = 0.5 * D + 2.0 * (A + D) @ M0 + ((W0 + A + D) @ Ks[0] - Vs[0]) @ Ks[0].T
    assert float(gradient.abs().max()) < 1e-10


# Convex regularisers (Proposition 3.4).

REGULARIZERS = {"l1": l1(0.8), "nuclear": nuclear(1.5), "neurons": neuron_groups(1.0), "none": l1(0.0)}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", REGULARIZERS)
def test_convex_steps_are_differences_of_one_time_solutions(name, seed):
    M0, W0, Ks, Vs = problem(seed, d=6, m=4, batches=3)
    R, A, previous = REGULARIZERS[name], torch.zeros_like(W0), None
    for t in range(1, 4):
        C, B = M0 + gram(Ks[:t]), cross(W0, Ks[:t], Vs[:t])
        delta = convex_step(A, C, B, R)
        target = minimize_convex(C, B, R)
        assert distance(A + delta, target) < 1e-9
        assert previous is None or distance(delta, target - previous) < 1e-7
        A, previous = A + delta, target
    if name == "none":
        assert distance(A, one_time(M0, W0, Ks, Vs)) < 1e-9
    else:
        assert distance(A, one_time(M0, W0, Ks, Vs)) > 1e-3
    # A naive step that regularises the increment instead of the total is another sequence.
    naive = torch.zeros_like(W0)
    for t in range(1, 4):
        C, B = M0 + gram(Ks[:t]), cross(W0, Ks[:t], Vs[:t])
        naive = naive + minimize_convex(C, B - naive @ C, R)
    assert (distance(naive, A) > 1e-4) == (name != "none")


@pytest.mark.parametrize("name", ["l1", "nuclear", "neurons"])
def test_convex_solver_against_scipy(name):
    """No direction found by a general-purpose optimiser improves on the proximal solution."""
    M0, W0, Ks, Vs = problem(9, d=3, m=2, batches=1)
    C, B, R = M0 + gram(Ks), cross(W0, Ks, Vs), REGULARIZERS[name]

    def objective(flat):
        A = torch.from_numpy(np.asarray(flat).reshape(2, 3))
        return float(torch.trace(A @ C @ A.T) - 2 * (A * B).sum()) + R.value(A)

    ours = objective(minimize_convex(C, B, R).numpy())
    found = minimize(objective, one_time(M0, W0, Ks, Vs).numpy().ravel(), method="Powell",
                     options={"xtol": 1e-6, "ftol": 1e-10, "maxiter": 200})
    assert ours <= found.fun + 1e-9 and found.fun - ours < 1e-2 * abs(ours)


def test_smooth_regulariser_by_its_prox_against_lbfgs():
    """A smooth convex R whose prox is closed: weight ||A - G||^2 with a fixed G."""
    M0, W0, Ks, Vs = problem(10, batches=2)
    C, B, G = M0 + gram(Ks), cross(W0, Ks, Vs), rand(np.random.default_rng(1), 5, 8)
    R = Regularizer(lambda A: 2.0 * float((A - G).pow(2).sum()),
                    lambda A, h: (A + 4.0 * h * G) / (1.0 + 4.0 * h))

    def value_and_gradient(flat):
        A = torch.from_numpy(flat.reshape(5, 8).copy())
        value = torch.trace(A @ C @ A.T) - 2 * (A * B).sum() + 2.0 * (A - G).pow(2).sum()
        return float(value), (2 * A @ C - 2 * B + 4.0 * (A - G)).numpy().ravel()

    found = minimize(value_and_gradient, np.zeros(40), jac=True, method="L-BFGS-B",
                     options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000})
    assert distance(minimize_convex(C, B, R), torch.from_numpy(found.x.reshape(5, 8))) < 1e-6


def test_convex_solver_says_when_it_did_not_converge():
    with pytest.raises(NumericsError, match="after 2 iterations"):
        minimize_convex(torch.diag(torch.tensor([1.0, 1e-6])), torch.ones(1, 2), l1(0.1), max_iter=2)


def test_released_err_variant_is_algorithm_1_with_one_more_identity():
    """memit_update(ridge=1, E=...) equals the compensated step on the prior lam C0 + I."""
    M0, W0, Ks, Vs = problem(12)
    engine = make_engine("direct", 2.0 * M0 + torch.eye(8))
    W, E, S = W0.clone(), None, torch.zeros(8, 8, dtype=torch.float64)
    for K, V in zip(Ks, Vs):
        R = V - W @ K
        released = memit_update(K, R, M0, 2.0, S, ridge=1.0, E=E)
        written, raw, E = compensated_step(engine, K, R, E, MAPS["rect"](W))
        assert distance(raw, released) < EXACT
        W, S = W + written, S + K @ K.T
