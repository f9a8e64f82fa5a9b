"""Batches under a token budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import ConfigError
from editkit.models.batching import by_length


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=40), budget=st.integers(1, 100))
def test_every_sequence_once_and_within_budget(lengths, budget):
    batches = by_length(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_no_needless_batches():
    assert by_length([3, 1, 2], 100) == [[1, 2, 0]]
    assert by_length([], 5) == []


def test_budget_must_be_positive():
    with pytest.raises(ConfigError, match="at least 1"):
        by_length([1], 0)
