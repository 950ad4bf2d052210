"""Suffixes are in order, whatever the text: also one of a single token, and one that repeats."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.make.suffix_sorting import sort_suffixes

words = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), max_size=4)


@settings(deadline=None, max_examples=300)
@given(words=words, times=st.integers(1, 4), more=st.lists(st.integers(1, 2**20), max_size=20))
def test_equal_to_sorting(words: list[list[int]], times: int, more: list[int]) -> None:
    text = [token for word in words for token in word] * times + more + [0]
    found = sort_suffixes(np.array(text, dtype=np.int32), max(text) + 1)
    assert found.tolist() == sorted(range(len(text)), key=lambda start: text[start:])


@pytest.mark.parametrize("period", [1, 2, 1000])
def test_repeats_take_no_longer(period: int) -> None:
    count = 300_000
    text = np.append(np.random.default_rng(period).integers(1, 50, period)[np.arange(count) % period], 0)
    sort_suffixes(text[-10:].astype(np.int32), 50)  # compiled
    start = time.process_time()
    found = sort_suffixes(text.astype(np.int32), 50)
    assert time.process_time() - start < 5
    assert np.array_equal(np.sort(found), np.arange(count + 1))
    last = np.append(0, found)  # pairs, in order, by what can be compared at once
    for one, other in np.random.default_rng(0).choice(np.stack([last[1:-1], last[2:]], axis=1), 50):
        assert text[one : one + 2 * period].tolist() <= text[other : other + 2 * period].tolist()


def test_all_of_the_work_is_told() -> None:
    told: list[float] = []
    sort_suffixes(np.append(np.random.default_rng(0).integers(1, 4, 5000), 0).astype(np.int32), 4, told.append)
    assert sum(told) == pytest.approx(1, abs=0.05)
