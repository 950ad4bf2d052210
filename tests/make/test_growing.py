"""Large datastores made of small ones: the real entries, then noisy copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import change_json, make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.growing import grow_datastore
from knn_lm_eval.store.datastore import Datastore


@pytest.fixture
def sources(tmp_path: Path) -> list[Datastore]:
    return [make_store(tmp_path / "a", count=300, seed=1), make_store(tmp_path / "b", count=200, seed=2)]


def test_the_real_entries_come_first_and_copies_keep_values_and_documents(
    sources: list[Datastore], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("knn_lm_eval.make.growing.ROWS_AT_ONCE", 64)
    grown = grow_datastore(sources, tmp_path / "big", 1234)
    a, b = sources
    assert len(grown) == 1234
    np.testing.assert_array_equal(grown.keys[:500], np.concatenate([a.keys, b.keys]))
    expected = np.concatenate([a.values, b.values] * 3)[:1234]
    np.testing.assert_array_equal(grown.values, expected)
    np.testing.assert_array_equal(grown.document_starts, [0, 300, 500, 800, 1000])


def test_noise_is_a_difference_of_two_keys_with_the_same_value(sources: list[Datastore], tmp_path: Path) -> None:
    grown = grow_datastore(sources[:1], tmp_path / "big", 600, noise=0.5)
    source = sources[0]
    for i in range(40):
        added = grown.keys[300 + i].astype(np.float64) - source.keys[i]
        kin = source.keys[source.values == source.values[i]].astype(np.float64)
        differences = 0.5 * (kin[:, None] - kin[None]).reshape(-1, source.dimension)
        assert np.abs(differences - added).max(axis=1).min() < 0.02  # float16
    assert np.abs(grown.keys[300:].astype(np.float64) - source.keys).max() > 0.5


def test_the_seed_decides_and_without_noise_copies_are_equal(sources: list[Datastore], tmp_path: Path) -> None:
    first, same, other = (
        grow_datastore(sources, tmp_path / name, 1000, seed=seed)
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    np.testing.assert_array_equal(first.keys, same.keys)
    assert (first.keys != other.keys).any()
    exact = grow_datastore(sources, tmp_path / "exact", 1000, noise=0)
    np.testing.assert_array_equal(exact.keys[:500], exact.keys[500:])


def test_what_cannot_be_grown_is_refused(sources: list[Datastore], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        grow_datastore(sources, sources[0].path, 1000)
    shutil.copytree(sources[1].path, tmp_path / "foreign")
    change_json(tmp_path / "foreign" / "manifest.json", fingerprint={"key": [1.0], "token_ids": []})
    with pytest.raises(UserError, match="different models"):
        grow_datastore([sources[0], Datastore.open(tmp_path / "foreign")], tmp_path / "big", 1000)
    assert not (tmp_path / "big").exists()
