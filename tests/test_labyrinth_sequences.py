"""Fixed-key sequences: which rules reach the one-time solution, and which do not."""

import pytest
import torch

from editkit.base.errors import ConfigError, NumericsError
from editkit.studies.labyrinth.sequences import (
    VARIANTS,
    Problem,
    batches_of,
    distance_curves,
    fit_error,
    one_time_path,
    random_problem,
    relative,
    sequence,
)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return random_problem(24, 12, 20, seed=3)


@pytest.fixture(scope="module")
def curves(problem):
    return distance_curves(problem, 4)


def last(curves, variant, column="distance"):
    return curves[curves["variant"] == variant].iloc[-1][column]


def test_the_aligned_sequence_is_the_one_time_solution_at_every_step(curves):
    assert curves[curves["variant"] == "aligned"]["distance"].max() < 1e-11


@pytest.mark.parametrize(
    "variant", ["no-history", "recounted-prior", "stale-residual", "rect", "bfloat16-weights"]
)
def test_a_dropped_condition_shows(curves, variant):
    assert last(curves, variant) > 1e-3


def test_lower_precision_is_close_but_not_equal(curves):
    for variant in ("float32-weights", "float32-solve"):
        assert 1e-9 < last(curves, variant) < 1e-3


def test_every_rule_is_exact_for_the_first_batch_except_post_processing(curves):
    first = curves[curves["step"] == 1].set_index("variant")["distance"]
    for variant in ("no-history", "recounted-prior", "stale-residual"):
        assert first[variant] < 1e-11
    assert first["rect"] > 1e-3
    assert first["rect"] == first["rect-compensated"]  # nothing to feed back yet


def test_compensation_keeps_the_error_at_one_masked_step(problem, curves):
    """With compensation A_t + (raw - written) is the one-time solution, so the error does not accumulate."""
    assert last(curves, "rect-compensated") < last(curves, "rect")
    assert last(curves, "rect-compensated", "error") < last(curves, "rect", "error")


def test_no_history_forgets_the_first_batch(curves):
    assert last(curves, "no-history", "first") > 2 * last(curves, "aligned", "first")


def test_prune_acts_when_the_update_is_larger_than_the_weights():
    problem = random_problem(24, 12, 20, seed=1, change=40.0)
    found = distance_curves(problem, 5, ["prune", "prune-compensated"])
    assert last(found, "prune") > 1e-3
    assert last(found, "prune-compensated") < last(found, "prune")


def test_order_and_batching_do_not_matter(problem):
    best = one_time_path(problem, 20)[-1]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Problem(problem.K[:, order], problem.V[:, order], problem.W0, problem.M0)
    assert relative(sequence(shuffled, 3, VARIANTS["aligned"])[-1], best) < 1e-11


def test_fit_error_is_one_before_and_zero_when_written(problem):
    assert fit_error(problem, torch.zeros_like(problem.W0)) == pytest.approx(1.0)
    free = Problem(problem.K, problem.V, problem.W0, 1e-9 * problem.M0)
    assert fit_error(free, one_time_path(free, 20)[-1]) < 1e-4


def test_batches():
    assert [(b.start, b.stop) for b in batches_of(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    with pytest.raises(ConfigError, match="at least one fact"):
        batches_of(5, 0)


def test_bad_problems_are_named(problem):
    with pytest.raises(NumericsError, match="V has shape"):
        Problem(problem.K, problem.V[:, :3], problem.W0, problem.M0)
    with pytest.raises(ConfigError, match="variant"):
        distance_curves(problem, 4, ["algned"])
