"""Samples: of how many, which are likely, and what they take."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knn_lm_eval.system.sampling import draw_entries


@given(count=st.integers(0, 300), wanted=st.integers(0, 400), seed=st.integers(0, 2**32))
def test_a_sample_is_of_different_entries_in_order(count: int, wanted: int, seed: int) -> None:
    drawn = draw_entries(count, wanted, seed)
    assert drawn.dtype == np.int64 and len(drawn) == min(wanted, count)
    assert (np.diff(drawn) > 0).all() and ((drawn >= 0) & (drawn < count)).all()
    np.testing.assert_array_equal(drawn, draw_entries(count, wanted, seed))


@pytest.mark.parametrize("wanted", [2, 4])
def test_each_set_is_as_likely(wanted: int) -> None:
    times = 6000
    drawn = [tuple(draw_entries(6, wanted, seed).tolist()) for seed in range(times)]
    expected = times / 15
    off = sum((drawn.count(entries) - expected) ** 2 / expected for entries in combinations(range(6), wanted))
    assert off < 42.6  # chi-squared of 14 degrees of freedom is above that once in 10,000


def test_memory_goes_with_the_sample() -> None:
    count, wanted = 2_200_000_000, 100_000
    tracemalloc.start()
    drawn = draw_entries(count, wanted, 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(drawn) == wanted and drawn[-1] > 2**31
    assert most < 50 * wanted
