"""Neighbours among keys that pass run by run are those that a search among all of them finds."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.passing_keys import NearestOfRuns
from knn_lm_eval.system.checkpoints import SavedStates


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 30),
    st.sampled_from(["l2", "dot"]),
    st.integers(0, 99),
    st.randoms(),
)
def test_runs_have_together_what_a_search_of_all_finds(lengths, k: int, sim_func: str, seed: int, order) -> None:
    rng = np.random.default_rng(seed)
    # Of few numbers, so that many are equally near, and far from zero.
    keys = (rng.integers(-2, 3, (sum(lengths), 8)) + 40).astype(np.float16)
    queries = (keys[rng.integers(0, len(keys), 5)] + rng.integers(0, 2, (5, 8))).astype(np.float32)
    starts, k = np.cumsum([0, *lengths]), min(k, len(keys))
    expected = ExactSearch(keys, sim_func).search(queries, k)
    with TemporaryDirectory() as folder:
        runs = list(range(len(lengths)))
        order.shuffle(runs)
        for number in runs:  # each by a process of its own
            nearest = NearestOfRuns(SavedStates(Path(folder) / "progress.json", {}), queries, k, sim_func)
            nearest.take(number, keys[starts[number] : starts[number + 1]])
        distances, entries = nearest.found(starts[:-1].tolist())
    assert np.array_equal(entries, expected[1])
    assert np.array_equal(distances, expected[0])
