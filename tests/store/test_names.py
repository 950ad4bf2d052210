"""A name that becomes a file leaves all other files alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.retriever import LocalRetriever
from knn_lm_eval.store.clusters import Clusters

OUTSIDE = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a\nb", "a\0b"]
TAKEN = [
    *("manifest", "params", "Params", "progress", "fetched", "keys", "values", "weights", "document_starts"),
    *("lm_log_probs", "index.000", "index.faiss.part", ".hidden", "a" * 200),
]


def files(folder: Path) -> dict[str, str]:
    """The checksum of every file below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("name", [*OUTSIDE, *TAKEN])
def test_a_name_that_would_be_another_files_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    (store.path / "params.json").write_text("{}")
    before = files(tmp_path)
    for make in (
        lambda: build_index(store, "Flat", name=name, quality_queries=0),
        lambda: build_index(store, "Flat", name=name, quality_queries=0, overwrite=True),
        lambda: cluster_kmeans(store, name, num_clusters=2),
    ):
        with pytest.raises(UserError, match="cannot name (an index|clusters)"):
            make()
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_store_is_opened(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    with pytest.raises(UserError, match="cannot name an index"):
        LocalRetriever(store, k=2, index=name)
    with pytest.raises(UserError, match="cannot name clusters"):
        Clusters.open(store, name)


@pytest.mark.parametrize("name", ["index", "IVF16,PQ8", "a.b", "with space", "Größe", "key"])
def test_other_names_stay(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    build_index(store, "Flat", name=name, quality_queries=0)
    assert LocalRetriever(store, k=2, index=name).index.ntotal == 200
    assert len(cluster_kmeans(store, name, num_clusters=2)) == 2
