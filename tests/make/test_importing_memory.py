"""Importing within a stated memory: under a control group, and refused with what would be enough."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import scipy.sparse as sp
from helpers.control_groups import needs_groups, run_within

from knn_lm_eval.errors import UserError
from knn_lm_eval.make import members
from knn_lm_eval.make.importing import import_datastore
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.memory import parse_bytes

LIMIT = 3 * 2**27
COUNT = 2**25  # entries, whose values and documents' starts take 256 MiB each as they are published
CLUSTERED = 1000
CHILD = """
import sys
from knn_lm_eval.make.importing import import_datastore

import_datastore([sys.argv[1]], sys.argv[2], document_starts=sys.argv[3], memory=int(sys.argv[4]))
"""


def write_published(folder: Path, count: int, dimension: int, clusters: sp.csr_matrix, protocol: int = 4) -> None:
    """Entries of value 0, with keys of zeros, which take no room on the disk."""
    folder.mkdir()
    for role, row_bytes in (("keys", 2 * dimension), ("vals", 8)):
        with open(folder / f"dstore_size{count}_embed{dimension}_fp16_{role}.npy", "wb") as file:
            file.truncate(count * row_bytes)
    (folder / "members.pkl").write_bytes(pickle.dumps(clusters, protocol))


@needs_groups
@pytest.mark.slow
def test_entries_that_take_more_than_the_memory(tmp_path: Path) -> None:
    """All of the process is within the limit, and pages of files as well."""
    in_clusters = sp.csr_matrix(np.eye(10, CLUSTERED, 500, dtype=np.int8))
    write_published(tmp_path / "theirs", COUNT, 1, in_clusters)
    np.save(tmp_path / "starts.npy", np.arange(COUNT))
    arguments = [tmp_path / "theirs", tmp_path / "ours", tmp_path / "starts.npy", str(LIMIT // 4)]
    process, most = run_within(LIMIT, [sys.executable, "-c", CHILD, *arguments])
    assert process.returncode == 0, process.stderr[-3000:]
    assert most <= LIMIT
    store = Datastore.open(tmp_path / "ours", verify="never")
    assert len(store) == len(store.document_starts) == COUNT and store.document_starts[-1] == COUNT - 1
    clusters = Clusters.open(store, "members")
    assert (np.asarray(clusters.cluster_of_entry[499:511]) == [-1, *range(10), -1]).all()
    assert len(clusters.cluster_of_entry) == COUNT and clusters.metadata["entries_in_clusters"] == 10


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_clusters_that_do_not_fit_the_memory_are_refused_before_anything_is_written(
    tmp_path: Path, protocol: int
) -> None:
    one_each = sp.identity(200_000, dtype=np.int64, format="csr")
    write_published(tmp_path / "theirs", 200_000, 1, one_each, protocol)
    with pytest.raises(UserError, match=r"members.pkl is read whole, which takes about \d+MiB of memory") as error:
        import_datastore([tmp_path / "theirs"], tmp_path / "ours", memory=2**20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    enough = re.search("1MiB may be taken: give --memory (.*) or more", str(error.value))
    assert enough is not None
    store = import_datastore([tmp_path / "theirs"], tmp_path / "ours", memory=parse_bytes(enough[1]))
    with pytest.raises(UserError, match="members.pkl is read whole"):
        members.import_members(store, "again", tmp_path / "theirs" / "members.pkl", memory=2**20)
    assert not (store.path / "clusters" / "again").exists()


def test_an_index_that_is_not_mapped_is_refused(tmp_path: Path) -> None:
    write_published(tmp_path / "theirs", 100_000, 64, sp.csr_matrix((1, 1), dtype=np.int8))
    keys = np.zeros((100_000, 64), dtype=np.float32)
    index = faiss.index_factory(64, "PQ32x4fs")
    index.train(np.random.default_rng(1).random((1000, 64), dtype=np.float32))
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "theirs" / "knn.index"))
    with pytest.raises(UserError, match=r"The opened index takes 2MiB of memory and more, and 1MiB .* knn.index out"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours", memory=2**20)
    assert len(import_datastore([tmp_path / "theirs"], tmp_path / "ours", memory=2**23)) == 100_000
