"""Sequential editing equals one-time editing, and each violated condition breaks it by what the theory says.

Conditions are numbered as in book/labyrinth/derivation.md. Every violation is checked twice: the closed form
of the damaged sequence holds to round-off, and its distance to the one-time solution is bounded away from
zero.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.linear.normal import Projector, alphaedit_update, memit_update, one_time_solution, solve_step

D, M, N, T = 8, 5, 4, 4                # key width, value width, facts a batch, batches of the violation tests
EXACT = 1e-10
seeds = st.integers(0, 10**6)


def rand(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def spd(rng, d, low=0.5, high=2.0):
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return torch.from_numpy((Q * np.geomspace(low, high, d)) @ Q.T)


def distance(a, b):
    """Relative Frobenius distance of a to b."""
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def problem(seed, d=D, m=M, n=N, batches=T):
    """Prior, original weights, keys and absolute targets of `batches` batches."""
    rng = np.random.default_rng(seed)
    Ks = [rand(rng, d, n) for _ in range(batches)]
    Vs = [rand(rng, m, n) for _ in range(batches)]
    return spd(rng, d), rand(rng, m, d), Ks, Vs


def one_time(M0, W0, Ks, Vs, P=None):
    return one_time_solution(torch.cat(Ks, dim=1), torch.cat(Vs, dim=1), W0, M0, P)


def gram(Ks):
    return sum(K @ K.T for K in Ks)


def cross(W0, Ks, Vs):
    """B_t = sum_s (V_s - W_0 K_s) K_s^T."""
    return sum((V - W0 @ K) @ K.T for K, V in zip(Ks, Vs))


def run(M0, W0, Ks, Vs, gram_of=None, residual_of=None, write=lambda W, delta: W + delta):
    """The sequence A_1..A_T. Hooks replace the Gram matrix of step t, the residual, or the writing of
    Delta."""
    W, history = W0.clone(), []
    for t, (K, V) in enumerate(zip(Ks, Vs)):
        C = gram_of(t) if gram_of else M0 + gram(Ks[:t + 1])
        R = residual_of(t, W) if residual_of else V - W @ K
        W = write(W, solve_step(K, R, C))
        history.append(W - W0)
    return history


# The theorem.


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 10), st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=6), seeds,
       st.sampled_from([1e-2, 1.0, 1e3]), st.booleans())
def test_memit_with_history_is_one_time_after_every_batch(d, m, sizes, seed, lam, duplicates):
    rng = np.random.default_rng(seed)
    C0, W0 = spd(rng, d, 0.1, 1.0), rand(rng, m, d)
    Ks, Vs = [rand(rng, d, n) for n in sizes], [rand(rng, m, n) for n in sizes]
    if duplicates:                          # the same key again with another value: both pairs stay in force
        Ks.append(Ks[0].clone())
        Vs.append(rand(rng, m, sizes[0]))
    A, S = torch.zeros(m, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for t, (K, V) in enumerate(zip(Ks, Vs)):
        A = A + memit_update(K, V - (W0 + A) @ K, C0, lam, S)
        S = S + K @ K.T
        assert distance(A, one_time(lam * C0, W0, Ks[:t + 1], Vs[:t + 1])) < EXACT


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=5), seeds,
       st.sampled_from([0.05, 1.0, 10.0]), st.integers(1, 10), st.booleans())
def test_alphaedit_is_one_time_for_any_projector_and_prior(d, m, sizes, seed, ridge, rank, extra_prior):
    rng = np.random.default_rng(seed)
    U = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, min(rank, d))))[0])
    P, W0 = Projector(U @ U.T, U), rand(rng, m, d)
    # The preservation term need not vanish on range(P).
    M0 = spd(rng, d) if extra_prior else torch.zeros(d, d, dtype=torch.float64)
    Ks, Vs = [rand(rng, d, n) for n in sizes], [rand(rng, m, n) for n in sizes]
    A, S = torch.zeros(m, d, dtype=torch.float64), M0
    for K, V in zip(Ks, Vs):
        A = A + alphaedit_update(K, V - (W0 + A) @ K, P, S, ridge)
        S = S + K @ K.T
    prior = M0 + ridge * torch.eye(d, dtype=torch.float64)
    assert distance(A, one_time(prior, W0, Ks, Vs, P)) < EXACT


@settings(max_examples=40, deadline=None)
@given(seeds, st.randoms(use_true_random=False), st.lists(st.integers(1, 15), max_size=4, unique=True))
def test_condition_7_batching_and_order_do_not_matter(seed, random, cuts):
    M0, W0, Ks, Vs = problem(seed)
    K, V = torch.cat(Ks, dim=1), torch.cat(Vs, dim=1)
    order = list(range(K.shape[1]))
    random.shuffle(order)
    pieces = np.split(np.array(order), sorted(cuts))
    A = run(M0, W0, [K[:, p] for p in pieces], [V[:, p] for p in pieces])[-1]
    assert distance(A, one_time(M0, W0, Ks, Vs)) < EXACT


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 3))
def test_singular_prior_gives_the_minimum_norm_solution(seed, n):
    """M_0 = 0 and fewer facts than dimensions: Moore-Penrose at every step, and facts are fitted exactly."""
    _, W0, Ks, Vs = problem(seed, d=16, n=n, batches=3)
    W = W0.clone()
    for t, (K, V) in enumerate(zip(Ks, Vs)):
        W = W + solve_step(K, V - W @ K, gram(Ks[:t + 1]), singular="min_norm")
    keys, values = torch.cat(Ks, dim=1), torch.cat(Vs, dim=1)
    assert distance(W @ keys, values) < 1e-8
    assert distance(W - W0, (values - W0 @ keys) @ torch.linalg.pinv(keys)) < 1e-8


def test_step_is_the_minimum_of_the_variational_problem():
    """min over Delta of ||(W + Delta) K - V||^2 + tr(Delta C_{t-1} Delta^T): the penalty is the Hessian."""
    M0, W0, Ks, Vs = problem(3)
    A = run(M0, W0, Ks[:-1], Vs[:-1])[-1]
    C, K, V, W = M0 + gram(Ks[:-1]), Ks[-1], Vs[-1], W0 + A
    delta = torch.zeros_like(W, requires_grad=True)
    value = ((W + delta) @ K - V).pow(2).sum() + torch.trace(delta @ C @ delta.T)
    step = solve_step(K, V - W @ K, C + K @ K.T)
    gradient, = torch.autograd.grad(value, delta)
    assert distance(-gradient / 2, (V - W @ K) @ K.T) < EXACT
    assert float(torch.autograd.grad(((W + step.requires_grad_()) @ K - V).pow(2).sum()
                                     + torch.trace(step @ C @ step.T), step)[0].abs().max()) < 1e-10


# Each violated condition.


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_condition_1_stale_keys(seed):
    """Cached keys K~ differ from those solved with: A_T C_T = B_T + sum_{s<T} A_s (K~_s K~_s^T - K_s
    K_s^T)."""
    M0, W0, Ks, Vs = problem(seed)
    rng = np.random.default_rng(seed + 1)
    stale = [K + 0.5 * rand(rng, *K.shape) for K in Ks]
    As = run(M0, W0, Ks, Vs, gram_of=lambda t: M0 + sum((K @ K.T for K in stale[:t]), Ks[t] @ Ks[t].T))
    drift = sum(A @ (L @ L.T - K @ K.T) for A, K, L in zip(As[:-1], Ks, stale))
    assert distance(As[-1] @ (M0 + gram(stale[:-1]) + Ks[-1] @ Ks[-1].T), cross(W0, Ks, Vs) + drift) < EXACT
    assert distance(As[-1], one_time(M0, W0, Ks, Vs)) > 0.02
    # Keys that moved before insertion and are then kept: exact for the moved keys, wrong for the others.
    assert distance(run(M0, W0, stale, Vs)[-1], one_time(M0, W0, stale, Vs)) < EXACT
    assert distance(run(M0, W0, stale, Vs)[-1], one_time(M0, W0, Ks, Vs)) > 0.02


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_condition_2_stale_residual(seed):
    """Residual against W_0: A_T C_T = B_T + sum_t A_{t-1} K_t K_t^T."""
    M0, W0, Ks, Vs = problem(seed)
    As = run(M0, W0, Ks, Vs, residual_of=lambda t, W: Vs[t] - W0 @ Ks[t])
    extra = sum(A @ K @ K.T for A, K in zip(As[:-1], Ks[1:]))
    assert distance(As[-1] @ (M0 + gram(Ks)), cross(W0, Ks, Vs) + extra) < EXACT
    assert distance(As[-1], one_time(M0, W0, Ks, Vs)) > 0.02


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_condition_3_prior_counted_again(seed):
    """C_t = C_{t-1} + M_0 + K_t K_t^T: A_T (T M_0 + S_T) = B_T + sum_{t<T} A_t M_0, a proximal method."""
    M0, W0, Ks, Vs = problem(seed)
    As = run(M0, W0, Ks, Vs, gram_of=lambda t: (t + 1) * M0 + gram(Ks[:t + 1]))
    pulled = sum(A @ M0 for A in As[:-1])
    assert distance(As[-1] @ (T * M0 + gram(Ks)), cross(W0, Ks, Vs) + pulled) < EXACT
    assert distance(As[-1], one_time(M0, W0, Ks, Vs)) > 0.01


def test_condition_3_constant_ridge_is_a_prior():
    """A ridge inside every solve but not accumulated only redefines M_0."""
    M0, W0, Ks, Vs = problem(11)
    eye = torch.eye(D, dtype=torch.float64)
    A = run(M0, W0, Ks, Vs, gram_of=lambda t: M0 + eye + gram(Ks[:t + 1]))[-1]
    assert distance(A, one_time(M0 + eye, W0, Ks, Vs)) < EXACT
    assert distance(A, one_time(M0, W0, Ks, Vs)) > 0.01


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_condition_4_history_dropped(seed):
    """Plain MEMIT repeated: A_T M_0 = sum_t (V_t - W_t K_t) K_t^T, every residual frozen when written."""
    M0, W0, Ks, Vs = problem(seed)
    As = run(M0, W0, Ks, Vs, gram_of=lambda t: M0 + Ks[t] @ Ks[t].T)
    frozen = sum((V - (W0 + A) @ K) @ K.T for A, K, V in zip(As, Ks, Vs))
    assert distance(As[-1] @ M0, frozen) < EXACT
    assert distance(As[-1], one_time(M0, W0, Ks, Vs)) > 0.02


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.05, 20.0))
def test_condition_4_damage_to_an_old_fact(seed, scale):
    """What a new fact does to an old key: history damps it by exactly 1 / (1 + k_j^T M_0^{-1} k_j)."""
    M0, _, Ks, _ = problem(seed)
    old, new = scale * Ks[0][:, :1], Ks[1][:, :1]
    inverse = torch.linalg.inv(M0)
    residual = rand(np.random.default_rng(seed), M, 1)
    forget = solve_step(new, residual, M0 + new @ new.T)
    keep = solve_step(new, residual, M0 + old @ old.T + new @ new.T)
    reach = residual @ (new.T @ inverse @ old)
    assert distance(forget @ old, reach / (1 + new.T @ inverse @ new)) < EXACT
    damping = 1 / (1 + old.T @ inverse @ old)
    C_inv = torch.linalg.inv(M0 + old @ old.T)
    assert distance(keep @ old, reach * damping / (1 + new.T @ C_inv @ new)) < EXACT
    assert torch.linalg.vector_norm(keep @ old) < torch.linalg.vector_norm(forget @ old)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.3, 0.9))
def test_condition_4_forgetting_factor_is_a_weighted_one_time_problem(seed, gamma):
    """C_t = gamma C_{t-1} + K_t K_t^T: the one-time problem with weights gamma^{T-s} and prior gamma^T
    M_0."""
    M0, W0, Ks, Vs = problem(seed)

    def fading(t):
        C = M0
        for K in Ks[:t + 1]:
            C = gamma * C + K @ K.T
        return C

    A = run(M0, W0, Ks, Vs, gram_of=fading)[-1]
    roots = [gamma ** ((T - 1 - s) / 2) for s in range(T)]      # a weight is a column scaled by its root
    scaled = [[w * X for w, X in zip(roots, columns)] for columns in (Ks, Vs)]
    weighted = one_time(gamma**T * M0, W0, *scaled)
    assert distance(A, weighted) < EXACT
    assert distance(A, one_time(M0, W0, Ks, Vs)) > 1e-3


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_condition_5_post_processing_without_compensation(seed):
    """Half of each update masked out: A_T C_T = B_T + sum_t E_t with E_t = (Q(Delta_t) - Delta_t) C_t."""
    M0, W0, Ks, Vs = problem(seed)
    mask = torch.from_numpy(np.random.default_rng(seed).random((T, M, D)) < 0.5)
    errors = []

    def write(W, delta):
        t = len(errors)
        errors.append((mask[t] * delta - delta) @ (M0 + gram(Ks[:t + 1])))
        return W + mask[t] * delta

    A = run(M0, W0, Ks, Vs, write=write)[-1]
    assert distance(A @ (M0 + gram(Ks)), cross(W0, Ks, Vs) + sum(errors)) < EXACT
    assert distance(A, one_time(M0, W0, Ks, Vs)) > 0.05


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 1e-9, 1e-5), (torch.bfloat16, 1e-5, 0.3)])
def test_condition_6_low_precision(dtype, low, high):
    """Weights stored in low precision drift off the one-time solution, by the size of their rounding."""
    for seed in range(20):
        M0, W0, Ks, Vs = problem(seed)
        W0 = W0.to(dtype).double()
        A = run(M0, W0, Ks, Vs, write=lambda W, delta: (W + delta).to(dtype).double())[-1]
        assert low < distance(A, one_time(M0, W0, Ks, Vs)) < high


def test_condition_6_float32_solve():
    """Everything in float32 as in the released AlphaEdit: off by much more than float64 round-off."""
    for seed in range(10):
        M0, W0, Ks, Vs = problem(seed)
        W = W0.float()
        for t, (K, V) in enumerate(zip(Ks, Vs)):
            K, V, C = K.float(), V.float(), (M0 + gram(Ks[:t + 1])).float()
            W = W + torch.linalg.solve(C, K @ (V - W @ K).T).T
        assert 1e-8 < distance(W.double() - W0, one_time(M0, W0, Ks, Vs)) < 1e-3
