"""A damaged file is named in one sentence, before compiled code reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system import files


@pytest.mark.parametrize(
    ("file", "place", "number"),
    [
        ("cluster_of_entry", 7, 5),
        ("cluster_of_entry", 7, -2),
        ("members", 3, 200),
        ("members", 3, -1),
        ("member_starts", 2, 10**12),
        ("member_starts", 2, -5),
    ],
)
def test_clusters_name_entries_and_clusters_that_exist(file: str, place: int, number: int, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    folder = cluster_kmeans(store, "c", num_clusters=5).path
    array = np.load(folder / f"{file}.npy", mmap_mode="r+")
    array[place] = number
    array.flush()
    with pytest.raises(UserError, match=f"{file}.npy is damaged"):
        Clusters.open(store, "c")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, '{"count": ' + "9" * 9000 + "}", "\0", "[]"])
def test_json_of_any_shape_gets_one_sentence(content: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    (store.path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json is damaged") as caught:
        Datastore.open(store.path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_huge_json_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 1000)
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(UserError, match="is damaged: it has 1,009 bytes"):
        files.read_json(tmp_path / "a.json")
