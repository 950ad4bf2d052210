"""Centroids in two levels: what is found against plain loops, and training that is interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from knn_lm_eval.errors import UserError
from knn_lm_eval.search import two_levels
from knn_lm_eval.search.two_levels import PROBE, TwoLevels, spread_sample, train_two_levels
from knn_lm_eval.system import checkpoints
from knn_lm_eval.system.checkpoints import SavedStates


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 2**31))
def test_a_vector_gets_the_nearest_centroid_of_its_nearest_coarse_clusters(
    sizes: list[int], count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    coarse = rng.standard_normal((len(sizes), 5)).astype(np.float32)
    centroids = np.repeat(coarse, sizes, axis=0) + rng.standard_normal((starts[-1], 5)).astype(np.float32)
    vectors = rng.standard_normal((count, 5)).astype(np.float32)
    found = TwoLevels(coarse, starts, centroids).nearest(vectors)
    assert found.dtype == np.int64 and found.shape == (count,)
    for vector, centroid in zip(vectors.astype(np.float64), found, strict=True):
        cells = np.argsort(((coarse - vector) ** 2).sum(axis=1))[:PROBE]
        near = [number for cell in cells for number in range(starts[cell], starts[cell + 1])]
        least = min(((centroids[number] - vector) ** 2).sum() for number in near)
        assert centroid in near
        assert ((centroids[centroid] - vector) ** 2).sum() == pytest.approx(least, rel=1e-4, abs=1e-4)


@pytest.fixture
def keys() -> np.ndarray:
    """Keys in 60 groups, float16 ``[6000, 8]``."""
    rng = np.random.default_rng(1)
    groups = 3 * rng.standard_normal((60, 8))
    return (groups[rng.integers(0, 60, 6000)] + rng.standard_normal((6000, 8))).astype(np.float16)


def states_in(folder: Path) -> SavedStates:
    states = SavedStates(folder / "progress.json", {})
    states.begin_or_resume(resume=True)
    return states


def test_trained_centroids_are_near_the_keys(keys: np.ndarray, tmp_path: Path) -> None:
    trained = train_two_levels(keys, 300, 5000, 10, 1, states_in(tmp_path))
    assert trained.centroids.shape == (300, 8) and np.isfinite(trained.centroids).all()
    assert trained.starts[0] == 0 and trained.starts[-1] == 300 and (np.diff(trained.starts) > 0).all()
    assert 40 <= len(trained.coarse) == len(trained.starts) - 1 <= 49  # sqrt(8 * 300)
    distances = cdist(keys.astype(np.float64), trained.centroids)
    found = trained.nearest(keys.astype(np.float32))
    assert (found == distances.argmin(axis=1)).mean() > 0.95
    random = cdist(keys.astype(np.float64), keys[:300].astype(np.float64)).min(axis=1)
    assert (distances[np.arange(6000), found] ** 2).mean() < 0.75 * (random**2).mean()


def test_as_many_centroids_as_keys_are_the_keys(keys: np.ndarray, tmp_path: Path) -> None:
    keys = np.unique(keys, axis=0)
    trained = train_two_levels(keys, len(keys), len(keys), 2, 1, states_in(tmp_path))
    np.testing.assert_array_equal(np.unique(trained.centroids, axis=0), keys.astype(np.float32))


def test_interrupted_training_goes_on_to_the_same_centroids(keys: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    whole = train_two_levels(keys, 300, 5000, 5, 1, states_in(tmp_path / "whole"))
    cut, done = two_levels.centroids_within, []

    def stops(*arguments, **more):
        done.append(cut(*arguments, **more))
        if len(done) in (1, 10):
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(two_levels, "centroids_within", stops)
    for kept in (0, 8):  # of coarse clusters, when it is interrupted
        with pytest.raises(KeyboardInterrupt):
            train_two_levels(keys, 300, 5000, 5, 1, states_in(tmp_path / "cut"))
        saved = states_in(tmp_path / "cut").load("centroids")
        assert len(saved["centroids"]) == (whole.starts[kept] if kept else 0) if saved else kept == 0
    resumed = train_two_levels(keys, 300, 5000, 5, 1, states_in(tmp_path / "cut"))
    assert len(done) == len(whole.coarse) + 2
    again = train_two_levels(keys, 300, 5000, 5, 1, states_in(tmp_path / "cut"))
    for one in (resumed, again):
        for name in ("coarse", "starts", "centroids"):
            assert getattr(one, name).tobytes() == getattr(whole, name).tobytes(), name


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 2**31))
def test_each_part_of_the_store_gives_its_share_of_the_sample(count: int, sample: int, seed: int) -> None:
    sample = min(sample, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_levels, "ADD_CHUNK", 32)
        drawn = spread_sample(np.arange(count, dtype=np.float32)[:, None], sample, seed)[:, 0]
    assert len(drawn) == sample and (np.diff(drawn) > 0).all()
    for end in range(32, count, 32):
        assert (drawn < end).sum() == end * sample // count


def test_keys_that_are_no_numbers_are_refused(keys: np.ndarray, tmp_path: Path) -> None:
    keys[4321, 3] = np.nan
    with pytest.raises(UserError, match="keys hold NaN or infinity"):
        train_two_levels(keys, 300, 6000, 5, 1, states_in(tmp_path))
