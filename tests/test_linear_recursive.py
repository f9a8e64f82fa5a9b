"""Engines of recursive least squares: one update, four ways to get it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, NumericsError
from editkit.linear import inverse_gram
from editkit.linear.engines import ENGINES, make_engine
from editkit.linear.normal import Projector, one_time_solution
from editkit.linear.recursive import DirectGram

EXACT = 1e-10
CASES = {
    "direct": ("direct", {}), "lu": ("direct", {"method": "lu"}),
    "inverse": ("inverse", {"check_every": 2}), "cholesky": ("cholesky", {"block": 3}), "keys": ("keys", {}),
}
engines = pytest.mark.parametrize("case", CASES)


def rand(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def spd(rng, d, low=0.1, high=1.0):
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return torch.from_numpy((Q * np.geomspace(low, high, d)) @ Q.T)


def distance(a, b):
    return float(torch.linalg.vector_norm(a - b) / max(1e-300, float(torch.linalg.vector_norm(b))))


def build(case, M0, d, **options):
    name, extra = CASES[case]
    return make_engine(name, M0, d, **extra, **options)


@engines
@settings(max_examples=15, deadline=None)
@given(d=st.integers(2, 12), m=st.integers(1, 6), sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6),
       seed=st.integers(0, 10**6), scalar=st.booleans(), projected=st.booleans())
def test_every_engine_reaches_the_one_time_solution(case, d, m, sizes, seed, scalar, projected):
    rng = np.random.default_rng(seed)
    U = torch.linalg.qr(rand(rng, d, max(1, d // 2)))[0] if projected else None
    M0 = 0.7 if scalar else spd(rng, d)
    engine = build(case, M0, d, basis=U)
    A, W0 = torch.zeros(m, d, dtype=torch.float64), rand(rng, m, d)
    Ks, Vs = [rand(rng, d, n) for n in sizes], [rand(rng, m, n) for n in sizes]
    for K, V in zip(Ks, Vs):
        A = A + engine.add(K, V - (W0 + A) @ K)
    K, V = torch.cat(Ks, dim=1), torch.cat(Vs, dim=1)
    target = one_time_solution(K, V, W0, M0, None if U is None else Projector(U @ U.T, U))
    assert torch.linalg.vector_norm(A - target) <= EXACT * max(1.0, float(torch.linalg.vector_norm(target)))
    assert engine.n_facts == sum(sizes)
    # times and solve are inverse to each other on the basis, and error() says so
    X = rand(rng, 3, d) if U is None else rand(rng, 3, d) @ U @ U.T
    assert distance(engine.solve(engine.times(X)), X) < 1e-9
    C = (M0 * torch.eye(d, dtype=torch.float64) if scalar else M0) + K @ K.T
    assert distance(engine.times(X), X @ C if U is None else X @ C @ U @ U.T) < EXACT
    assert engine.error(probes=None) < 1e-9 and engine.error(probes=3) < 1e-9


@engines
@settings(max_examples=12, deadline=None)
@given(d=st.integers(2, 10), seed=st.integers(0, 10**6),
       out=st.lists(st.integers(0, 7), max_size=8, unique=True))
def test_retired_facts_leave_no_trace(case, d, seed, out):
    rng = np.random.default_rng(seed)
    M0, W0, K, V = spd(rng, d), rand(rng, 4, d), rand(rng, d, 8), rand(rng, 4, 8)
    engine = build(case, M0, d)
    A = engine.add(K[:, :5], V[:, :5] - W0 @ K[:, :5])
    A = A + engine.add(K[:, 5:], V[:, 5:] - (W0 + A) @ K[:, 5:])
    A = A + engine.retire(K[:, out], V[:, out] - (W0 + A) @ K[:, out])
    stay = [i for i in range(8) if i not in out]
    target = one_time_solution(K[:, stay], V[:, stay], W0, M0)
    assert torch.linalg.vector_norm(A - target) <= 1e-9 * max(1.0, float(torch.linalg.vector_norm(target)))
    assert engine.n_facts == len(stay)


@engines
def test_revise_replaces_and_same_key_costs_the_value_difference(case):
    rng = np.random.default_rng(5)
    M0, W0, K, V = spd(rng, 9), rand(rng, 4, 9), rand(rng, 9, 6), rand(rng, 4, 6)
    engine = build(case, M0, 9)
    A = engine.add(K, V - W0 @ K)
    C = M0 + K @ K.T
    old, new = slice(1, 3), V[:, 1:3] + rand(rng, 4, 2)
    W = W0 + A
    delta = engine.revise(K[:, old], V[:, old] - W @ K[:, old], K[:, old], new - W @ K[:, old])
    assert distance(delta @ C, (new - V[:, old]) @ K[:, old].T) < EXACT       # C did not change
    other, values = rand(rng, 9, 3), rand(rng, 4, 3)                    # now another key and count
    A = A + delta
    W = W0 + A
    A = A + engine.revise(K[:, old], new - W @ K[:, old], other, values - W @ other)
    stay = [0, 3, 4, 5]
    target = one_time_solution(torch.cat([K[:, stay], other], 1), torch.cat([V[:, stay], values], 1), W0, M0)
    assert distance(A, target) < EXACT and engine.n_facts == 7


@engines
def test_retiring_what_was_never_written_is_refused_and_changes_nothing(case):
    rng = np.random.default_rng(1)
    engine = build(case, 1.0, 6)
    K = rand(rng, 6, 3)
    engine.add(K, rand(rng, 2, 3))
    before = {k: v.clone() for k, v in engine.state_dict()["tensors"].items()}
    zero = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"columns \[0\] of K were never added"):
        engine.retire(K[:, :1] + 1e-9, zero)
    with pytest.raises(NumericsError, match=r"columns \[0, 1\]"):             # once written, twice retired
        engine.retire(K[:, [0, 0]], torch.zeros(2, 2))
    with pytest.raises(NumericsError, match="never added"):
        engine.revise(rand(rng, 6, 1), zero, K[:, :1], zero)
    assert all(torch.equal(v, before[k]) for k, v in engine.state_dict()["tensors"].items())
    engine.retire(K[:, :1], zero)
    with pytest.raises(NumericsError, match="already retired"):
        engine.retire(K[:, :1], zero)


@engines
def test_interrupted_stream_repeats_every_bit(case):
    rng = np.random.default_rng(2)
    M0, batches = spd(rng, 10), [(rand(rng, 10, 4), rand(rng, 3, 4)) for _ in range(7)]
    whole, first = build(case, M0, 10, tag="m/3"), build(case, M0, 10, tag="m/3")
    for K, R in batches[:4]:
        whole.add(K, R)
        first.add(K, R)
    whole.retire(batches[0][0][:, :2], batches[0][1][:, :2])
    first.retire(batches[0][0][:, :2], batches[0][1][:, :2])
    second = build(case, M0, 10, tag="m/3")
    second.load_state_dict(first.state_dict())
    for K, R in batches[4:]:
        assert torch.equal(whole.add(K, R), second.add(K, R))
    assert (second.n_facts, second.steps) == (whole.n_facts, whole.steps) == (26, 8)
    with pytest.raises(NumericsError, match="never added"):                   # the record of keys travels too
        second.retire(batches[0][0][:, :1], torch.zeros(3, 1))


@pytest.mark.parametrize(("other", "field"), [
    ({"tag": "other model"}, "tag"), ({"M0": 2.0}, "prior"), ({"d": 5}, "'?d'?"),
    ({"basis": torch.eye(4, dtype=torch.float64)[:, :2]}, "rank"), ({"name": "keys"}, "engine"),
])
def test_history_of_something_else_is_refused(other, field):
    def build(name="inverse", M0=1.0, d=4, **options):
        return make_engine(name, M0, d, **options)

    state = build(tag="this model").state_dict()
    with pytest.raises(NumericsError, match=f"saved history has {field}"):
        build(**({"tag": "this model"} | other)).load_state_dict(state)


def test_states_do_not_share_memory():
    engine = make_engine("inverse", 1.0, 4)
    state = engine.state_dict()
    engine.add(torch.eye(4), torch.eye(4))
    fresh = make_engine("inverse", 1.0, 4)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.solve(torch.eye(4)), torch.eye(4, dtype=torch.float64))


def test_drift_is_measured_and_repaired():
    """An inverse that went wrong is noticed at the next check, re-factorised, and the step after is exact
    again."""
    rng = np.random.default_rng(3)
    M0 = spd(rng, 12)
    engine, exact = make_engine("inverse", M0, check_every=3), DirectGram(M0)
    batches = [(rand(rng, 12, 2), rand(rng, 5, 2)) for _ in range(8)]
    for K, R in batches[:2]:
        engine.add(K, R)
        exact.add(K, R)
    engine._Pi.mul_(1.0 + 1e-6)
    measured = engine.error(probes=None)
    assert 1e-7 < measured < 1e-4
    assert 0.3 * measured < engine.error(probes=64) < 3 * measured      # the estimate is of the right size
    K, R = batches[2]
    good = exact.add(K, R)
    delta = engine.add(K, R)                                            # the third batch: check, repair
    assert engine.refactored == 1 and engine.last_error < 1e-12 and distance(delta, good) < 1e-12
    for K, R in batches[3:]:
        assert distance(engine.add(K, R), exact.add(K, R)) < 1e-12
    assert engine.refactored == 1


def test_error_bounds_the_next_update():
    """Relative error of ``B Pi`` is at most ``||Pi C - I||``."""
    rng = np.random.default_rng(4)
    M0 = spd(rng, 12)
    engine, exact = make_engine("inverse", M0, check_every=10**6), DirectGram(M0)
    noise = rand(rng, 12, 12)
    engine._Pi.add_(1e-5 * (noise + noise.T))
    B = rand(rng, 3, 12)
    assert distance(engine.solve(B), exact.solve(B)) <= engine.error(probes=None)


def test_large_matrices_cross_block_borders(monkeypatch):
    """Symmetric storage in blocks: d larger than one block, keys folded more than once."""
    rng = np.random.default_rng(6)
    monkeypatch.setattr(inverse_gram, "_BLOCK", 7)
    M0 = spd(rng, 20)
    engine, exact = make_engine("inverse", M0), DirectGram(M0)
    for _ in range(12):
        K, R = rand(rng, 20, 5), rand(rng, 3, 5)
        assert distance(engine.add(K, R), exact.add(K, R)) < EXACT
    X = rand(rng, 3, 20)
    assert distance(engine.times(X), exact.times(X)) < EXACT
    engine.refactor()
    assert distance(engine.solve(X), exact.solve(X)) < EXACT


def test_bad_input():
    with pytest.raises(ConfigError, match="use one of direct, inverse, cholesky, keys"):
        make_engine("qr", 1.0, 3)
    with pytest.raises(NumericsError, match="give the key width d"):
        make_engine("direct", 1.0)
    with pytest.raises(NumericsError, match="singular"):
        make_engine("inverse", torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(NumericsError, match="M0 is 0"):
        make_engine("keys", 0.0, 3)
    with pytest.raises(NumericsError, match="must be >= 0"):
        make_engine("keys", -1.0, 3)
    with pytest.raises(NumericsError, match="not orthonormal"):
        make_engine("inverse", 1.0, 3, basis=torch.ones(3, 2))
    engine = make_engine("inverse", 1.0, 3)
    with pytest.raises(NumericsError, match=r"K has shape \(4, 2\)"):
        engine.add(torch.ones(4, 2), torch.ones(5, 2))
    with pytest.raises(NumericsError, match=r"R has shape \(5, 3\)"):
        engine.add(torch.ones(3, 2), torch.ones(5, 3))
    assert sorted(ENGINES) == ["cholesky", "direct", "inverse", "keys"]


def test_singular_prior_needs_the_direct_engine():
    rng = np.random.default_rng(7)
    engine, W0 = make_engine("direct", 0.0, 9), rand(rng, 4, 9)
    K, V, A = rand(rng, 9, 6), rand(rng, 4, 6), torch.zeros(4, 9, dtype=torch.float64)
    for cols in ([0, 1], [2, 3, 4], [5]):
        A = A + engine.add(K[:, cols], V[:, cols] - (W0 + A) @ K[:, cols])
    assert distance(A, one_time_solution(K, V, W0, 0.0)) < 1e-9
