"""Entries whose numbers are beyond 2^31: what is found there is what a small store finds, moved.

A small store's arrays lie at the end of files of more than 2^31 entries, which are holes before. Nothing
reads holes, so the test takes next to no disk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pytest
from helpers.stores import make_store

from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.packing import packed_queries
from knn_lm_eval.search.shard import Shard, of_shard
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexFiles, find_parts
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, KEYS, VALUES
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.seals import write_sealed_json

COUNT, DIMENSION, K, PROBE = 3000, 16, 64, 6
BEFORE = 2**31 - 1500  # entries; the small store lies across the border
FACTORIES = ["IVF16,PQ4", "IVF16,RaBitQ", "RR16,IVF16,RaBitQfs"]


class Stores(NamedTuple):
    """A small store, and one in which it is moved behind ``BEFORE`` entries."""

    small: Datastore
    large: Datastore


def moved(array: np.ndarray, path: Path) -> np.ndarray:
    """A file of an array behind ``BEFORE`` rows that are a hole; mapped."""
    large = np.lib.format.open_memmap(path, "w+", array.dtype, (BEFORE + len(array), *array.shape[1:]))
    large[BEFORE:] = array
    large.flush()
    if path.stat().st_blocks * 512 > 2**30:
        pytest.skip("this file system has no holes")
    return np.load(path, mmap_mode="r")


@pytest.fixture(scope="module", params=FACTORIES)
def stores(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Stores:
    small = make_store(tmp_path_factory.mktemp("small") / "store", COUNT, DIMENSION)
    build_index(small, request.param, parts=1, quality_queries=0)
    cluster_kmeans(small, num_clusters=40, sample=COUNT)
    folder = tmp_path_factory.mktemp("large") / "store"
    folder.mkdir()
    moved(small.require_keys("a test"), folder / KEYS)
    moved(small.values, folder / VALUES)
    np.save(folder / DOCUMENT_STARTS, np.array([0, BEFORE], dtype=np.int64))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in folder.glob("*.npy")}
    manifest = replace(small.manifest, count=BEFORE + COUNT, documents=2, files=files, derived={})
    manifest.write(folder)
    place_index(small, folder, manifest.keys_checksum)
    return Stores(Datastore.open(small.path), Datastore.open(folder, verify="never"))


def place_index(small: Datastore, folder: Path, keys_sha256: str) -> None:
    """The small store's index as a second part; the first is said to have entries, and has none in its lists."""
    of_small, of_large = IndexFiles(small.path), IndexFiles(folder)
    first = faiss.read_index(str(of_small.part(0)))
    first.reset()
    first.ntotal = BEFORE
    if isinstance(first, faiss.IndexPreTransform):
        faiss.downcast_index(first.index).ntotal = BEFORE
    faiss.write_index(first, str(of_large.part(0)))
    of_large.part(1).write_bytes(of_small.part(0).read_bytes())
    ends = [0, BEFORE, BEFORE + COUNT]
    parts = [
        {"start": ends[part], "stop": ends[part + 1], "bytes": of_large.part(part).stat().st_size} for part in range(2)
    ]
    said: dict[str, Any] = {**read_json(of_small.metadata), "parts": parts, "keys_sha256": keys_sha256}
    said.pop("sha256")
    write_sealed_json(of_large.metadata, said)


def queries(store: Datastore) -> np.ndarray:
    """Near some keys, those at both sides of the border among them."""
    near = np.concatenate([np.arange(1490, 1510), np.arange(0, COUNT, 100)])
    noise = np.random.default_rng(3).standard_normal((len(near), DIMENSION)) * 0.1
    return (store.require_keys("a test")[near] + noise).astype(np.float32)


@pytest.mark.parametrize("recompute", [False, True])
def test_neighbours_are_the_small_stores_moved(stores: Stores, recompute: bool) -> None:
    settings = {"k": K, "probe": PROBE, "recompute_dists": recompute}
    found = LocalRetriever(stores.small, **settings).find(queries(stores.small))
    retriever = LocalRetriever(stores.large, **settings)
    distances, entries = retriever.find(queries(stores.small))
    np.testing.assert_array_equal(entries, found[1] + BEFORE)
    assert (entries >= 2**31).any() and (entries < 2**31).any()
    np.testing.assert_array_equal(distances, found[0])
    np.testing.assert_array_equal(retriever.datastore.values[entries], stores.small.values[found[1]])


def test_a_shard_sends_entries_beyond(stores: Stores) -> None:
    asked = queries(stores.small)
    part = find_parts(stores.large)[1][1]
    shard = Shard(stores.large.path, part, "index", 1)
    found = of_shard(shard.search(packed_queries(asked), K, PROBE)[0], part.first_id)
    _, entries = LocalRetriever(stores.small, K, PROBE).find(asked)
    np.testing.assert_array_equal(found.entries, entries + BEFORE)
    counts = np.full(len(asked), K)
    distances, values = shard.distances(packed_queries(asked), (found.entries - part.start).ravel(), counts, "l2")
    exact = exact_distances(stores.small.require_keys("a test"), asked, entries, "l2")
    np.testing.assert_array_equal(distances, exact.ravel())
    np.testing.assert_array_equal(values, stores.small.values[entries].ravel())


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("duplicates", ["merge", "keep"])
def test_retomaton_walks_there_as_in_the_small_store(
    stores: Stores, tmp_path: Path, clustered: bool, duplicates: str
) -> None:
    small, large = stores
    retriever = LocalRetriever(small, K, PROBE)
    codes = CodeDistances.open(small, retriever.cpu_index, "index")
    assert codes is not None
    arrays = {
        name: moved(getattr(codes, name), tmp_path / f"{name}.npy") for name in ("lists", "offsets", "scales", "codes")
    }
    clusters = Clusters.open(small, "kmeans")
    of_small = clusters.cluster_of_entry, clusters.member_starts, clusters.members
    of_large = (
        moved(clusters.cluster_of_entry, tmp_path / "cluster_of_entry.npy"),
        clusters.member_starts,
        clusters.members.astype(np.int64) + BEFORE,
    )
    settings = AutomatonSettings(k=K, min_knns=8, max_knns=128, duplicates=duplicates)  # type: ignore[arg-type]
    keys = small.require_keys("a test")
    walks = {}
    for store, of_store, in_clusters, distances in (
        (small, retriever, of_small, codes),
        (large, LocalRetriever(large, K, PROBE), of_large, replace(codes, **arrays)),
    ):
        automaton = Automaton(
            store.values,
            store.document_starts,
            in_clusters if clustered else None,
            of_store.find,
            distances,
            settings,
        )
        starts = (1480, 200, 2500)  # the first walks across the border
        walks[store.path] = [
            Walk(keys[start : start + 40].astype(np.float32), small.values[start : start + 40]) for start in starts
        ]
        automaton.walk(walks[store.path], keep_neighbours=True)
    for of_small_store, of_large_store in zip(walks[small.path], walks[large.path], strict=True):
        np.testing.assert_array_equal(of_small_store.log_p_knn, of_large_store.log_p_knn)
        np.testing.assert_array_equal(of_small_store.searched, of_large_store.searched)
        assert not of_small_store.searched.all()
        for (distances, entries), (as_large, moved_entries) in zip(
            of_small_store.neighbours, of_large_store.neighbours, strict=True
        ):
            np.testing.assert_array_equal(moved_entries, entries + BEFORE)
            np.testing.assert_array_equal(as_large, distances)
