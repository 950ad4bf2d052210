"""Exact search without an index, against a float64 oracle: any offset of the keys, any sizes of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.search import exact
from knn_lm_eval.search.exact import ExactSearch


def oracle(keys: np.ndarray, queries: np.ndarray, sim_func: str) -> np.ndarray:
    """Distances ``[n, count]`` in double precision."""
    keys, queries = keys.astype(np.float64), queries.astype(np.float64)
    if sim_func == "dot":
        return -queries @ keys.T
    return np.stack([((keys - query) ** 2).sum(1) for query in queries])


def check(keys: np.ndarray, queries: np.ndarray, k: int, sim_func: str) -> None:
    distances, entries = ExactSearch(keys, sim_func).search(queries, k)
    of_all = oracle(keys, queries, sim_func)
    expected = np.sort(of_all, axis=1)[:, :k]
    assert distances.dtype == np.float32 and entries.dtype == np.int64 and distances.shape == (len(queries), k)
    assert all(len(set(row)) == k for row in entries.tolist())
    spread = of_all.std(axis=1, keepdims=True) + 1e-6
    of_found = np.take_along_axis(of_all, entries, 1)
    # What float32 can hold of an inner product, which may lie near a large number, and of a sum of squares.
    rounding = np.abs(expected) * (1.2e-7 if sim_func == "dot" else 1e-6)
    assert (np.abs(of_found - expected) <= 1e-5 * spread + rounding).all()  # those found are the nearest
    assert (np.abs(distances - of_found) <= 1e-5 * spread + rounding).all()
    assert (np.diff(distances, axis=1) >= 0).all()


@settings(deadline=None)  # compiles when it is first called
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from(["l2", "dot"]),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 2**32 - 1),
)
def test_it_is_the_oracle(
    count: int, dimension: int, queries: int, k: int, sim_func: str, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((count, dimension)).astype(dtype)
    keys[rng.integers(0, count, count // 3)] = keys[0]  # ties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK_BYTES", 4 * dimension * int(rng.integers(1, 90)))
        patch.setattr(exact, "SCORE_BYTES", int(rng.integers(4, 4000)))
        patch.setattr(exact, "MARGIN", 3)
        check(keys, rng.standard_normal((queries, dimension)).astype(np.float32), min(k, count), sim_func)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("norm", [0, 30, 1414, 20_000])
def test_a_large_common_part_of_the_keys_costs_nothing(norm: float, sim_func: str) -> None:
    """Where it is asked 1,000 at once, faiss expands the square, and loses the spread at a norm of 1,414."""
    rng = np.random.default_rng(0)
    common = norm * rng.standard_normal(96) / np.sqrt(96)
    keys = (rng.standard_normal((6000, 96)) + common).astype(np.float32)
    queries = (rng.standard_normal((1100, 96)) + (common if sim_func == "l2" else 0)).astype(np.float32)
    check(keys, queries, 50, sim_func)


def test_of_equally_near_keys_the_first_come_first() -> None:
    keys = np.zeros((500, 4), dtype=np.float16)
    _, entries = ExactSearch(keys, "l2").search(np.ones((2, 4), dtype=np.float32), 500)
    assert (entries == np.arange(500)).all()


def test_a_key_that_is_not_finite_is_said() -> None:
    keys = np.zeros((500, 4), dtype=np.float16)
    keys[400, 2] = np.inf
    with pytest.raises(UserError, match="hold NaN or infinity"):
        ExactSearch(keys, "l2").search(np.ones((2, 4), dtype=np.float32), 5)
