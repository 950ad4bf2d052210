"""Taking over published clusters: a pickled sparse matrix that says which entry is in which cluster."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np

from knn_lm_eval.compiling import compiled
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import UnfinishedClusters
from knn_lm_eval.make.sparse_pickle import SparseMatrix, bytes_to_load, load_sparse_matrix
from knn_lm_eval.store.clusters import Clusters, cluster_dtype
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.files import check_free_space, disk_errors_in, sha256
from knn_lm_eval.system.memory import allowed_bytes, size_text

logger = logging.getLogger(__name__)

CHUNK = 2**24  # entries


def import_members(
    datastore: Datastore, name: str, pickle_file: str | Path, overwrite: bool = False, memory: int | None = None
) -> Clusters:
    """Take over the clusters of a published ``members*.pkl``: a pickled scipy matrix ``[clusters, entries]``
    whose elements other than 0 say which entry is in which cluster.

    The rows' numbers stay the clusters' numbers. Entries without an element, or beyond the matrix's last
    column, are in no cluster.

    Parameters
    ----------
    name : the clustering's name.
    pickle_file : see ``load_sparse_matrix``.
    overwrite : replace a finished clustering of that name.
    memory : bytes that it may take, the pickle included, which is read whole; None is half of what is available.

    Raises
    ------
    UserError
        Where the pickle is not such a matrix, has more columns than the store has entries, or has an entry in
        two clusters; where the name is taken, or ``memory`` is too little, or the disk is full.
    """
    pickle_file = Path(pickle_file)
    settings = {"method": "import", "file": pickle_file.name}
    unfinished = UnfinishedClusters(datastore, name, settings, overwrite, memory=memory)
    check_memory(pickle_file, memory)
    matrix = load_sparse_matrix(pickle_file)
    rows, columns = matrix.shape
    if columns > len(datastore):
        raise UserError(
            f"{pickle_file} clusters {columns:,} entries, the datastore {datastore.path} has "
            f"{len(datastore):,}: it was made for another datastore."
        )
    if rows > len(datastore):  # a matrix by columns may have any number of rows without holding anything
        raise UserError(
            f"{pickle_file} has {rows:,} clusters, and the datastore {datastore.path} only {len(datastore):,} entries: "
            f"it was made for another datastore."
        )
    # The entries' clusters lie in a file that has no name, so that nothing of it stays, wherever this ends.
    with disk_errors_in(datastore.path), tempfile.TemporaryFile(dir=datastore.path) as file:
        dtype = np.dtype(cluster_dtype(rows))
        check_free_space(datastore.path, dtype.itemsize * len(datastore), "the entries' clusters")
        cluster_of_entry = np.memmap(file, dtype, "w+", shape=(len(datastore),))
        for begin in range(0, len(datastore), CHUNK):
            cluster_of_entry[begin : begin + CHUNK] = -1
        if (entry := _place_rows(cluster_of_entry, matrix)) >= 0:
            raise UserError(f"{pickle_file} has entry {entry} in more than one cluster; each may be in one only.")
        if outside := len(datastore) - np.count_nonzero(matrix.data):  # no entry is in two
            logger.warning("%d of %d entries are in no cluster of %s.", outside, len(datastore), pickle_file)
        del matrix
        with unfinished.begun(rows):
            return unfinished.finish(cluster_of_entry, rows, file_sha256=sha256(pickle_file))


def check_memory(pickle_file: Path, memory: int | None) -> None:
    """Raise UserError where reading published clusters takes more than ``memory``, as ``import_members`` has it."""
    needed, allowed = bytes_to_load(pickle_file), allowed_bytes(memory)
    if needed > allowed:
        raise UserError(
            f"{pickle_file} is read whole, which takes about {size_text(needed)} of memory, and {size_text(allowed)} "
            f"may be taken: give --memory {size_text(needed)} or more."
        )


def _place_rows(cluster_of_entry: np.ndarray, matrix: SparseMatrix) -> int:
    """Enter the matrix's rows into ``cluster_of_entry``; an entry that is in two of them, or -1."""
    return _place(cluster_of_entry, matrix.by_row, matrix.indptr, matrix.indices, matrix.data != 0)


@compiled
def _place(
    cluster_of_entry: np.ndarray, by_row: bool, indptr: np.ndarray, indices: np.ndarray, is_member: np.ndarray
) -> int:
    for major in range(len(indptr) - 1):
        for place in range(indptr[major], indptr[major + 1]):
            cluster, entry = (major, indices[place]) if by_row else (indices[place], major)
            if is_member[place]:
                if cluster_of_entry[entry] >= 0:
                    return entry
                cluster_of_entry[entry] = cluster
    return -1
