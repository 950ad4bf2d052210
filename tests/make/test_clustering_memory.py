"""Clustering and pruning within a stated memory: under a control group, and refused with what would be enough."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.control_groups import needs_groups, run_within
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.growing import grow_datastore
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import ARRAYS
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.memory import parse_bytes

LIMIT = 2**29
CHILD = """
import sys
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.pruning import prune_greedy_merge, prune_random
from knn_lm_eval.store.datastore import Datastore

store = Datastore.open(sys.argv[1], verify="never")
what, memory = sys.argv[2], int(sys.argv[3])
if what == "kmeans":
    cluster_kmeans(store, num_clusters=50, iterations=2, memory=memory)
elif what == "greedy_merge":
    cluster_greedy_merge(store, k=2, probe=1, memory=memory)
elif what == "merged":
    prune_greedy_merge(store, sys.argv[1] + "-merged", neighbours=2, probe=1, memory=memory)
else:
    prune_random(store, sys.argv[1] + "-random", keep=0.5)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """A store whose keys take more than the limit, with an index that is mapped."""
    folder = tmp_path_factory.mktemp("large")
    store = grow_datastore([make_store(folder / "s", 10_000, 768)], folder / "store", 370_000)
    build_index(store, "IVF64,PQ16x4fs", train_sample=5000, quality_queries=0)
    assert store.keys is not None and store.keys.nbytes > LIMIT
    return Datastore.open(store.path)


@needs_groups
@pytest.mark.slow
@pytest.mark.parametrize("what", ["kmeans", "greedy_merge", "merged", "random"])
def test_keys_that_take_more_than_the_memory(large: Datastore, what: str) -> None:
    """All of the process is within the limit, and pages of files as well."""
    process, most = run_within(LIMIT, [sys.executable, "-c", CHILD, str(large.path), what, str(LIMIT // 2)])
    assert process.returncode == 0, process.stderr[-3000:]
    assert most <= LIMIT
    if what == "kmeans":
        outside = cluster_kmeans(large, "outside", num_clusters=50, iterations=2)
        for name in ARRAYS:
            inside = large.path / "clusters" / "kmeans" / f"{name}.npy"
            assert inside.read_bytes() == (outside.path / f"{name}.npy").read_bytes()
    elif what in ("merged", "random"):
        pruned = Datastore.open(f"{large.path}-{what}")
        assert 0.2 < len(pruned) / len(large) < 0.9
        if what == "merged":
            assert np.asarray(pruned.weights).sum() == len(large)


def test_with_less_memory_the_sample_is_smaller_down_to_39_keys_per_cluster(tmp_path: Path, caplog) -> None:
    store, held = make_store(tmp_path / "s"), 3 * (30 + 3000) * 64
    for bytes_, sample, warned in ((2**30, 64 * 30, False), (held + 76 * 1500, 1500, True)):
        caplog.clear()
        clusters = cluster_kmeans(store, num_clusters=30, iterations=1, memory=bytes_, overwrite=True)
        assert clusters.metadata["sample"] == sample and ("instead of 1920" in caplog.text) == warned
    with pytest.raises(UserError, match="k-means of 1,170 keys into 30 clusters takes .*; choose .* or more") as error:
        cluster_kmeans(store, num_clusters=30, memory=held + 76 * 1169, overwrite=True)
    enough = re.search("give --memory (.*) or more", str(error.value))
    assert enough is not None
    clusters = cluster_kmeans(
        store, num_clusters=30, sample=1170, iterations=1, memory=parse_bytes(enough[1]), overwrite=True
    )
    assert clusters.metadata["sample"] == 1170
    with pytest.raises(UserError, match=r"k-means of 1,900 keys .* --memory is 1MiB; choose --sample \d+ or less"):
        cluster_kmeans(store, num_clusters=30, sample=1900, memory=held + 76 * 1700, overwrite=True)


def test_an_index_that_does_not_fit_the_memory_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    build_index(store, "HNSW8", quality_queries=0)
    with pytest.raises(UserError, match="search the index index takes about .* give --memory (.*) or more") as error:
        cluster_greedy_merge(store, k=2, memory=2**20)
    enough = re.search("give --memory (.*) or more", str(error.value))
    assert enough is not None and not (store.path / "clusters").exists()
    assert len(cluster_greedy_merge(store, k=2, memory=parse_bytes(enough[1]))) > 0
