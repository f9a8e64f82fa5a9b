"""Normal equations: stationarity, special cases, refused inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import NumericsError
from editkit.linear.normal import (
    Projector,
    alphaedit_update,
    as_projector,
    memit_update,
    null_projector,
    one_time_solution,
    rome_direction,
    rome_update,
    solve_step,
)
from editkit.linear.system import factorize

TINY = {"max_examples": 30, "deadline": None}


def rand(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def spd(seed, d, low=0.1, high=1.0):
    """A (d, d) second moment with eigenvalues between low and high."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return torch.from_numpy((Q * np.geomspace(low, high, d)) @ Q.T)


def close(a, b, tol=1e-10):
    return float(torch.linalg.vector_norm(a - b)) <= tol * max(1e-300, float(torch.linalg.vector_norm(b)))


dims = st.tuples(st.integers(2, 9), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))


@settings(**TINY)
@given(dims, st.floats(0.1, 100.0), st.booleans())
def test_memit_update_is_the_stationary_point(shape, lam, history):
    d, m, n, seed = shape
    K, R, C0 = rand(seed, d, n), rand(seed + 1, m, n), spd(seed, d)
    S = spd(seed + 2, d) if history else torch.zeros(d, d, dtype=torch.float64)
    delta, factor = memit_update(K, R, C0, lam, S if history else None, info=True)
    gradient = (delta @ K - R) @ K.T + delta @ (lam * C0 + S)
    assert float(gradient.abs().max()) < 1e-10 * max(1.0, float((R @ K.T).abs().max()))
    assert delta.dtype == torch.float64 and delta.shape == (m, d)
    assert factor.method == "cholesky" and factor.condition >= 1.0


@settings(**TINY)
@given(dims, st.floats(0.1, 10.0))
def test_push_through_form_and_unrealised_part(shape, lam):
    """Delta K = R (I + G)^{-1} G with G = K^T M0^{-1} K; the residual left is R (I + G)^{-1}."""
    d, m, n, seed = shape
    K, R, C0 = rand(seed, d, n), rand(seed + 1, m, n), spd(seed, d)
    G = K.T @ torch.linalg.solve(lam * C0, K)
    left = torch.linalg.solve(torch.eye(n, dtype=torch.float64) + G, R.T).T
    assert close(R - memit_update(K, R, C0, lam) @ K, left, 1e-8)


def test_thin_and_wide_right_hand_sides_agree():
    C0 = spd(0, 7)
    K, R = rand(1, 7, 3), rand(2, 11, 3)
    wide = memit_update(K, R[:2], C0, 2.0)      # n >= m: R K^T is solved
    thin = memit_update(K, R, C0, 2.0)          # n < m: K is solved
    assert close(thin[:2], wide, 1e-12)


def test_compensation_and_ridge_enter_the_equation():
    K, R, C0, S, E = rand(1, 6, 4), rand(2, 3, 4), spd(3, 6), spd(4, 6), rand(5, 3, 6)
    delta = memit_update(K, R, C0, 5.0, S, ridge=1.0, E=E)
    C = 5.0 * C0 + S + torch.eye(6, dtype=torch.float64) + K @ K.T
    assert close(delta @ C, R @ K.T - E)
    assert close(solve_step(K, R, C, E), delta)


@settings(**TINY)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10**6))
def test_rome_imposes_the_value_with_least_disturbance(d, m, seed):
    W, k, v, C0 = rand(seed, m, d), rand(seed + 1, d), rand(seed + 2, m), spd(seed, d)
    u = rome_direction(C0, k)
    delta = rome_update(W, k, v, u)
    assert abs(float(torch.linalg.vector_norm(u)) - 1.0) < 1e-12
    assert close((W + delta) @ k, v, 1e-9)
    # Any other update with the same value at k disturbs the second moment more.
    other = rand(seed + 3, m, d)
    other = other - torch.outer(other @ k, k) / (k @ k)
    assert torch.trace(delta @ C0 @ delta.T) <= torch.trace((delta + other) @ C0 @ (delta + other).T) + 1e-9


def test_rome_is_the_hard_limit_of_memit():
    W, k, v, C0 = rand(0, 4, 6), rand(1, 6), rand(2, 4), spd(3, 6)
    soft = memit_update(k[:, None], (v - W @ k)[:, None], C0, 1e-9)
    assert close(soft, rome_update(W, k, v, rome_direction(C0, k)), 1e-6)
    assert close(rome_direction(None, k), k / torch.linalg.vector_norm(k))


@settings(**TINY)
@given(dims, st.floats(0.05, 10.0), st.integers(1, 8))
def test_alphaedit_forms_agree_and_stay_in_the_subspace(shape, ridge, rank):
    d, m, n, seed = shape
    ridge = float(np.float32(ridge))            # the released form rounds it
    Q, _ = torch.linalg.qr(rand(seed + 5, d, min(rank, d)))
    P = Projector(Q @ Q.T, Q)
    K, R, S = rand(seed, d, n), rand(seed + 1, m, n), spd(seed, d)
    a = alphaedit_update(K, R, P, S, ridge)
    b = alphaedit_update(K, R, P.P, S, ridge, form="released")
    assert close(a, b, 1e-9) and close(a @ P.P, a, 1e-9)
    assert close(a @ ((S + K @ K.T) @ P.P + ridge * torch.eye(d, dtype=torch.float64)), R @ K.T @ P.P, 1e-9)
    assert close(alphaedit_update(K, R, P.P, S, ridge), a, 1e-9)


def test_released_float32_solve_is_measurably_worse():
    d = 40
    P = null_projector(spd(0, d, 1e-4, 1.0), 0.05)
    K, R = rand(1, d, 60), rand(2, 8, 60)
    exact = alphaedit_update(K, R, P, None, 0.5)
    single = alphaedit_update(K, R, P, None, 0.5, form="released", dtype=torch.float32)
    gap = float(torch.linalg.vector_norm(single - exact) / torch.linalg.vector_norm(exact))
    assert 1e-8 < gap < 1e-3


def test_null_projector_is_a_strict_threshold():
    C0 = torch.diag(torch.tensor([0.01, 0.02, 0.5, 1.0], dtype=torch.float64))
    P, U = null_projector(C0, 0.02)
    assert U.shape == (4, 1) and close(P, torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)))
    assert null_projector(C0, 10.0).rank == 4
    with pytest.raises(NumericsError, match="raise the null-space threshold"):
        null_projector(C0, 0.001)
    with pytest.raises(NumericsError, match="negative eigenvalue"):
        null_projector(-C0, 0.1)
    with pytest.raises(NumericsError, match="not an orthogonal projector"):
        as_projector(0.5 * torch.eye(4), 4)


@settings(**TINY)
@given(dims, st.booleans())
def test_one_time_solution_minimises(shape, projected):
    d, m, n, seed = shape
    K, V, W0, M0 = rand(seed, d, n), rand(seed + 1, m, n), rand(seed + 2, m, d), spd(seed, d)
    P = null_projector(M0, 0.5) if projected and d > 2 else None

    def objective(A):
        return float(torch.trace(A @ M0 @ A.T) + ((W0 + A) @ K - V).pow(2).sum())

    A = one_time_solution(K, V, W0, M0, P)
    step = rand(seed + 3, m, d) if P is None else rand(seed + 3, m, d) @ P.P
    assert all(objective(A) < objective(A + h * step) for h in (1e-3, -1e-3, 1.0))
    assert P is None or close(A @ P.P, A)


def test_singular_systems():
    K, R, W = rand(0, 6, 2), rand(1, 3, 2), rand(2, 3, 6)
    with pytest.raises(NumericsError, match="singular"):
        memit_update(K, R, torch.eye(6), 0.0)
    minimum = memit_update(K, R, torch.eye(6), 0.0, singular="min_norm")
    assert close(minimum, R @ torch.linalg.pinv(K), 1e-10)
    assert close(one_time_solution(K, R + W @ K, W, 0.0), minimum, 1e-10)
    assert factorize(K @ K.T, singular="min_norm").rank == 2
    # AlphaEdit without a ridge: minimum norm inside the subspace.
    P = Projector(torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    assert close(alphaedit_update(K, R, P, None, 0.0), minimum, 1e-10)


def test_condition_estimate_is_close():
    for low in (1e-1, 1e-4, 1e-8):
        C = spd(3, 30, low, 1.0)
        true = float(torch.linalg.cond(C, 1))
        assert true / 10 <= factorize(C).condition <= true * 1.001


NAN = torch.tensor([[1.0, float("nan")]])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: memit_update(NAN, NAN, [[1.0]], 1.0), r"K has 1 NaN or Inf entries \(first at index \(0, 1\)\)"),
    (lambda: memit_update([[1.0]], [[float("inf")]], [[1.0]], 1.0), "R has 1 NaN or Inf"),
    (lambda: memit_update(torch.eye(2), torch.ones(3, 5), torch.eye(2), 1.0), r"R has shape \(3, 5\)"),
    (lambda: memit_update(torch.eye(2), torch.ones(3, 2), torch.eye(3), 1.0), r"C0 has shape \(3, 3\)"),
    (lambda: memit_update(torch.eye(2), torch.ones(3, 2), torch.eye(2), -1.0), "lam is -1.0"),
    (lambda: memit_update(torch.eye(2), torch.ones(3, 2), [[1.0, 2.0], [0.0, 1.0]], 1.0), "not symmetric"),
    (lambda: memit_update("keys", 0, 0, 1.0), "cannot be read as a float64 tensor"),
    (lambda: rome_direction(torch.eye(2), [0.0, 0.0]), "the key is zero"),
    (lambda: rome_update(torch.eye(2), [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]), "orthogonal"),
    (lambda: alphaedit_update(*[torch.eye(2)] * 3, ridge=0.0, form="released"), "singular"),
    (lambda: alphaedit_update(*[torch.eye(2)] * 3, form="best"), "form='best'"),
    (lambda: one_time_solution(torch.eye(2), torch.eye(2), torch.eye(2), -3.0), "must be >= 0"),
    (lambda: one_time_solution(torch.eye(2), torch.eye(2), torch.eye(2), -9 * torch.eye(2)), "indefinite"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(NumericsError, match=message):
        call()


def test_python_numbers_are_not_rounded_to_float32():
    assert float(one_time_solution([[1.0]], [[1.1]], [[0.0]], 0.1)) == pytest.approx(1.0, abs=1e-15)


def test_float32_inputs_are_solved_in_float64():
    K, R, C0 = rand(1, 6, 4).float(), rand(2, 3, 4).float(), spd(3, 6).float()
    assert close(memit_update(K, R, C0, 2.0), memit_update(K.double(), R.double(), C0.double(), 2.0), 1e-14)
