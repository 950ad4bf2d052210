"""Narrower keys: the directions are those of most variance, and a store of them is like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stores import make_store
from hypothesis import given
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.projection import Projection
from knn_lm_eval.make.directions import draw_windows, principal_directions
from knn_lm_eval.make.growing import grow_datastore
from knn_lm_eval.make.projecting import project_datastore
from knn_lm_eval.make.pruning import prune_random
from knn_lm_eval.make.windows import WindowSettings, cut_windows
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import PROJECTION
from knn_lm_eval.store.whole_store import verify_store


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return make_store(tmp_path / "store", 3000, 16, common=30.0)


@pytest.mark.parametrize("dimension", [1, 5, 12])
def test_no_other_directions_keep_more_variance(dimension: int) -> None:
    rng = np.random.default_rng(1)
    sample = (rng.standard_normal((400, 12)) * np.linspace(0.1, 3, 12)) @ rng.standard_normal((12, 12)) + 50
    directions, kept = principal_directions(np.split(sample.astype(np.float32), 8), 12, dimension)
    assert directions.dtype == np.float32 and directions.shape == (12, dimension)
    np.testing.assert_allclose(directions.T @ directions, np.eye(dimension), atol=1e-5)
    centred = sample - sample.mean(axis=0)
    singular_values = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(kept, (singular_values[:dimension] ** 2).sum() / (singular_values**2).sum(), rtol=1e-5)
    of_directions = ((centred @ directions) ** 2).sum() / (centred**2).sum()
    np.testing.assert_allclose(of_directions, kept, rtol=1e-5)


def test_the_same_sample_gives_the_same_directions_however_it_comes() -> None:
    sample = np.random.default_rng(2).standard_normal((300, 8)).astype(np.float32)
    at_once, _ = principal_directions([sample], 8, 4)
    by_row, _ = principal_directions(np.split(sample, 300), 8, 4)
    np.testing.assert_allclose(at_once, by_row, atol=1e-6)
    assert (at_once[np.abs(at_once).argmax(axis=0), np.arange(4)] > 0).all()


def test_keys_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite numbers"):
        principal_directions([np.array([[1.0, np.nan]])], 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_projection_is_the_product_in_float32(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    directions = rng.standard_normal((16, 6)).astype(np.float32)
    keys = torch.from_numpy(rng.standard_normal((2, 5, 16))).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        projected = Projection(directions)(keys)
    assert projected.dtype == torch.float32 and projected.shape == (2, 5, 6)
    np.testing.assert_allclose(projected.numpy(), keys.double().numpy() @ directions.astype(np.float64), atol=1e-5)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))),
    st.integers(1, 200),
)
def test_about_as_many_windows_are_drawn_as_have_so_many_entries(lengths, length_and_stride, entries) -> None:
    starts, count = np.cumsum([0, *lengths[:-1]]), sum(lengths)
    settings = WindowSettings(*length_and_stride, batch_size=2)
    drawn = draw_windows(starts, count, settings, entries)
    all_windows = list(cut_windows(starts, count, settings))
    assert drawn == [window for window in all_windows if window in drawn]
    mean = count / len(all_windows)
    assert len(drawn) == len(all_windows) or (len(drawn) - 1) * mean < entries <= len(drawn) * mean


def test_entries_of_long_windows_are_drawn_as_likely_as_those_of_short_ones() -> None:
    starts = np.concatenate([np.arange(0, 8000, 8), [8000]])  # the last document is as long as all others together
    drawn = draw_windows(starts, 16000, WindowSettings(64, 64, 4), 8000)
    of_long = sum(window.stop - window.start for window in drawn if window.start >= 8000)
    assert 0.4 < of_long / sum(window.stop - window.start for window in drawn) < 0.6


def test_a_projected_store_finds_what_the_whole_keys_find(store: Datastore, tmp_path: Path) -> None:
    turned = project_datastore(store, tmp_path / "turned", store.dimension)
    keys = store.keys.astype(np.float32)
    queries = keys[:50] + 0.1
    assert turned.projection is not None
    projected = Projection(turned.projection)(torch.from_numpy(queries)).numpy()
    before = np.square(queries[:, None].astype(np.float64) - keys).sum(axis=2)
    after = np.square(projected[:, None].astype(np.float64) - turned.keys).sum(axis=2)
    np.testing.assert_allclose(after, before, rtol=2e-2, atol=2e-2)
    assert np.array_equal(turned.values, store.values)


def test_inner_products_lose_a_number_that_is_the_same_for_all(store: Datastore, tmp_path: Path) -> None:
    """The keys' common part is long and constant: what the projection leaves out of it changes no ranking."""
    keys = np.array(store.keys)
    keys[:, 10:] = 25 + 0.01 * keys[:, 10:]  # much that is common, little that varies
    np.save(store.path / "keys.npy", keys)
    flat = make_over(store)
    narrow = project_datastore(flat, tmp_path / "narrow", 10)
    whole, projected = keys.astype(np.float64), narrow.keys.astype(np.float64)
    lost = whole[:50] @ whole[50:].T - projected[:50] @ projected[50:].T
    assert lost.mean() > 1000 and lost.std(axis=1).max() < 0.02 * (whole[:50] @ whole[50:].T).std(axis=1).min() + 2


def make_over(store: Datastore) -> Datastore:
    """The store after its keys were written anew."""
    from dataclasses import replace

    from knn_lm_eval.store.manifest import file_record

    files = {name: file_record(store.path / name) for name in store.manifest.files}
    replace(store.manifest, files=files).write(store.path)
    return Datastore.open(store.path)


def test_what_cannot_be_projected(store: Datastore, tmp_path: Path) -> None:
    narrow = project_datastore(store, tmp_path / "narrow", 4)
    with pytest.raises(UserError, match="are a projection already"):
        project_datastore(narrow, tmp_path / "again", 2)
    with pytest.raises(UserError, match="have 16 numbers, of which 17 cannot"):
        project_datastore(store, tmp_path / "wide", 17)
    with pytest.raises(UserError, match="no projection, which another"):
        project_datastore(store, tmp_path / "shared", store)
    with pytest.raises(UserError, match="exists already|exist already|holds"):
        project_datastore(store, tmp_path / "narrow", 4)
    assert not (tmp_path / "again").exists() and not (tmp_path / "wide").exists()


def test_a_shared_projection_lets_stores_grow_into_one(store: Datastore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", 900, 16, seed=5)
    narrow = project_datastore(store, tmp_path / "narrow", 6)
    shared = project_datastore(other, tmp_path / "shared", narrow)
    own = project_datastore(other, tmp_path / "own", 6)
    table = (narrow.path / PROJECTION).read_bytes()
    assert (shared.path / PROJECTION).read_bytes() == table != (own.path / PROJECTION).read_bytes()
    np.testing.assert_allclose(
        shared.keys.astype(np.float64), other.keys.astype(np.float64) @ narrow.projection, atol=0.02
    )
    grown = grow_datastore([narrow, shared], tmp_path / "grown", 5000)
    assert grown.manifest.projection == narrow.manifest.projection
    assert (grown.path / PROJECTION).read_bytes() == table
    with pytest.raises(UserError, match="projected to other directions"):
        grow_datastore([narrow, own], tmp_path / "mixed", 5000)
    with pytest.raises(UserError, match="projected to other directions"):
        grow_datastore([store, narrow], tmp_path / "mixed", 5000)


def test_a_pruned_store_keeps_the_projection(store: Datastore, tmp_path: Path) -> None:
    narrow = project_datastore(store, tmp_path / "narrow", 6)
    pruned = prune_random(narrow, tmp_path / "pruned", 0.5)
    assert np.array_equal(pruned.projection, narrow.projection)
    assert pruned.manifest.projection == narrow.manifest.projection
    assert all(verdict.fault is None for verdict in verify_store(pruned.path))


def test_a_projection_is_verified_with_its_store(store: Datastore, tmp_path: Path) -> None:
    path = project_datastore(store, tmp_path / "narrow", 6).path / PROJECTION
    table = np.load(path)
    changed = table.copy()
    changed[3, 2] += 1
    np.save(path, changed)
    with pytest.raises(UserError, match=r"projection.npy is damaged: its SHA-256"):
        Datastore.open(path.parent)
    np.save(path, table[:8])
    with pytest.raises(UserError, match=r"projection.npy has \d+ bytes, the manifest says"):
        Datastore.open(path.parent)
    path.unlink()
    with pytest.raises(UserError, match=r"projection.npy is missing"):
        Datastore.open(path.parent)
