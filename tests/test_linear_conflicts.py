"""Conflicting edits: retire-and-replace against the one-time problem of the latest values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, NumericsError, RequestError
from editkit.linear.conflicts import EditStream, retire_replace
from editkit.linear.engines import ENGINES, make_engine
from editkit.linear.normal import one_time_solution

D, M = 9, 4
EXACT = 1e-9


def rand(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def spd(rng, d, low=0.5, high=2.0):
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return torch.from_numpy((Q * np.geomspace(low, high, d)) @ Q.T)


def distance(a, b):
    return float(torch.linalg.vector_norm(a - b) / max(1e-300, float(torch.linalg.vector_norm(b))))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 4))
def test_proposition_is_the_difference_of_one_time_solutions(seed, retired, fresh):
    rng = np.random.default_rng(seed)
    M0, W0, K, V = spd(rng, D), rand(rng, M, D), rand(rng, D, 7), rand(rng, M, 7)
    K_new, V_new = rand(rng, D, fresh), rand(rng, M, fresh)
    A = one_time_solution(K, V, W0, M0)
    delta, C = retire_replace(K[:, :retired], V[:, :retired], K_new, V_new, W0 + A, M0 + K @ K.T)
    keys, values = torch.cat([K[:, retired:], K_new], 1), torch.cat([V[:, retired:], V_new], 1)
    assert distance(C, M0 + keys @ keys.T) < EXACT
    assert distance(A + delta, one_time_solution(keys, values, W0, M0)) < EXACT


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_same_key_costs_only_the_value_difference(seed):
    rng = np.random.default_rng(seed)
    M0, W0, K, V, new = spd(rng, D), rand(rng, M, D), rand(rng, D, 5), rand(rng, M, 5), rand(rng, M, 2)
    C = M0 + K @ K.T
    W = W0 + one_time_solution(K, V, W0, M0)
    delta, after = retire_replace(K[:, :2], V[:, :2], K[:, :2], new, W, C)
    assert distance(after, C) < EXACT
    assert distance(delta, torch.linalg.solve(C, K[:, :2] @ (new - V[:, :2]).T).T) < EXACT
    nothing, _ = retire_replace(K[:, :2], V[:, :2], K[:, :2], V[:, :2], W, C)
    assert float(nothing.abs().max()) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_stream_of_revisions_is_one_time_on_the_latest_values(engine, seed, data):
    """Facts revised again and again, with new keys each time, single and in batches, some taken back."""
    rng = np.random.default_rng(seed)
    M0, W0 = spd(rng, D), rand(rng, M, D)
    stream, W, latest = EditStream(make_engine(engine, M0)), W0.clone(), {}
    for _ in range(6):
        ids = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
        if data.draw(st.booleans()) or not set(ids) <= set(latest):
            K, V = rand(rng, D, len(ids)), rand(rng, M, len(ids))
            W = W + stream.write(ids, K, V, W)
            latest |= {i: (K[:, n], V[:, n]) for n, i in enumerate(ids)}
        else:
            W = W + stream.retire(ids, W)
            latest = {i: pair for i, pair in latest.items() if i not in ids}
        keys = torch.stack([k for k, _ in latest.values()], 1) if latest else torch.zeros(D, 0)
        values = torch.stack([v for _, v in latest.values()], 1) if latest else torch.zeros(M, 0)
        target = one_time_solution(keys, values, W0, M0)
        assert float(torch.linalg.vector_norm(W - W0 - target)) < EXACT * max(1.0, float(target.norm()))
    if latest:
        ids, K, V = stream.constraints()
        assert set(ids) == set(latest) and distance(one_time_solution(K, V, W0, M0), target) < EXACT


@pytest.mark.parametrize("versions", [2, 3, 10])
def test_append_fits_the_mean_of_all_versions(versions):
    """m versions on one key: A k = (m s / (1 + m s)) * mean of the wanted changes, s = k^T M_0^{-1} k."""
    rng = np.random.default_rng(versions)
    M0, W0, k, V = spd(rng, D), rand(rng, M, D), rand(rng, D, 1), rand(rng, M, versions)
    stream, W = EditStream(make_engine("inverse", M0), policy="append"), W0.clone()
    for v in V.T:
        W = W + stream.write(["capital"], k, v[:, None], W)
    s = float(k.T @ torch.linalg.solve(M0, k))
    mean = (V - W0 @ k).mean(dim=1, keepdim=True)
    assert distance((W - W0) @ k, versions * s / (1 + versions * s) * mean) < EXACT
    # replace: the latest value, whatever was there before
    stream, W = EditStream(make_engine("inverse", M0)), W0.clone()
    for v in V.T:
        W = W + stream.write(["capital"], k, v[:, None], W)
    assert distance((W - W0) @ k, s / (1 + s) * (V[:, -1:] - W0 @ k)) < EXACT


def test_append_contradiction_ends_between_the_values():
    """Weak prior: after two opposite values neither is produced, the newest weighs 1/m."""
    k, target = torch.eye(3)[:, :1], torch.ones(1, 1)
    stream, W = EditStream(make_engine("direct", 1e-9, 3), policy="append"), torch.zeros(1, 3).double()
    for value in (target, -target, target, target):
        W = W + stream.write(["x"], k, value, W)
    assert float(W @ k.double()) == pytest.approx(0.5, abs=1e-6)


def test_refuse_changes_nothing():
    rng = np.random.default_rng(0)
    stream, W = EditStream(make_engine("inverse", 1.0, D), policy="refuse"), rand(rng, M, D)
    stream.write(["a", "b"], rand(rng, D, 2), rand(rng, M, 2), W)
    with pytest.raises(RequestError, match="'b'; drop them from the batch or use policy='replace'"):
        stream.write(["c", "b"], rand(rng, D, 2), rand(rng, M, 2), W)
    assert list(stream.pairs) == ["a", "b"] and stream.engine.n_facts == 2
    stream.write(["c"], rand(rng, D, 1), rand(rng, M, 1), W)


def test_near_keys_count_as_the_same_fact_when_asked():
    rng = np.random.default_rng(1)
    M0, W0, k, V = spd(rng, D), rand(rng, M, D), rand(rng, D, 1), rand(rng, M, 2)
    near = k + 1e-3 * rand(rng, D, 1)
    for cosine, left in ((None, 2), (0.999, 1)):
        stream = EditStream(make_engine("keys", M0), cosine=cosine)
        W = W0 + stream.write(["old name"], k, V[:, :1], W0)
        W = W + stream.write(["new name"], near, V[:, 1:], W)
        assert len(stream.pairs) == left
        keys = torch.cat([k, near], 1)[:, -left:]
        assert distance(W - W0, one_time_solution(keys, V[:, -left:], W0, M0)) < EXACT


def test_resumed_stream_repeats_every_bit():
    rng = np.random.default_rng(2)
    M0, W0 = spd(rng, D), rand(rng, M, D)
    batches = [(["a", "b"], rand(rng, D, 2), rand(rng, M, 2)), (["b", "c"], rand(rng, D, 2), rand(rng, M, 2)),
               (["a", "c"], rand(rng, D, 2), rand(rng, M, 2))]
    whole, W = EditStream(make_engine("inverse", M0)), W0.clone()
    for ids, K, V in batches:
        if ids == ["a", "c"]:
            resumed, W2 = EditStream(make_engine("inverse", M0)), W.clone()
            resumed.load_state_dict(whole.state_dict())
            W2 = W2 + resumed.write(ids, K, V, W2)
        W = W + whole.write(ids, K, V, W)
    assert torch.equal(W, W2)
    empty = EditStream(make_engine("inverse", M0))
    empty.load_state_dict(EditStream(make_engine("inverse", M0)).state_dict())
    assert not empty.pairs
    with pytest.raises(NumericsError, match="saved history has prior"):
        EditStream(make_engine("inverse", 2 * M0)).load_state_dict(whole.state_dict())


def test_bad_streams():
    rng = np.random.default_rng(3)
    engine = make_engine("direct", 1.0, D)
    with pytest.raises(ConfigError, match="use one of replace, append, refuse"):
        EditStream(engine, policy="overwrite")
    with pytest.raises(ConfigError, match="cosine is"):
        EditStream(engine, cosine=1.0)
    stream, W = EditStream(engine), rand(rng, M, D)
    with pytest.raises(NumericsError, match="fact 'a' was never written or is already retired"):
        stream.retire(["a"], W)
    with pytest.raises(RequestError, match="'a' occurs twice in one batch"):
        stream.write(["a", "a"], rand(rng, D, 2), rand(rng, M, 2), W)
    with pytest.raises(NumericsError, match=r"V has shape \(3, 1\)"):
        stream.write(["a"], rand(rng, D, 1), rand(rng, 3, 1), W)
    with pytest.raises(NumericsError, match="no fact is in force"):
        stream.constraints()
    with pytest.raises(NumericsError, match=r"indefinite|singular"):
        none = torch.zeros(D, 0), torch.zeros(M, 0)
        retire_replace(2 * torch.eye(D), torch.zeros(M, D), *none, W, torch.eye(D))
