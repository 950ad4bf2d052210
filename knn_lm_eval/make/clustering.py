"""Clustering a datastore's entries: by k-means of their keys, by greedy merging, or as others published it.

Each way leads to one number per entry, in a plain array; a counting sort turns it into the lists of members
(see ``knn_lm_eval.store.clusters`` for the files). Keys are streamed in text order, and the state is saved now and
then, so that an interrupted clustering goes on from there and gives the same bytes.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numba
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.members import SparseMatrix, load_sparse_matrix
from knn_lm_eval.search.faiss_index import DEFAULT_PROBE, faiss_gpus, inverted_file, open_index, search, set_probe
from knn_lm_eval.search.kmeans import SAMPLE_PER_CLUSTER, train_kmeans
from knn_lm_eval.store.clusters import (
    ARRAYS,
    FORMAT,
    FORMAT_VERSION,
    METADATA,
    Clusters,
    clusters_folder,
    entry_dtype,
)
from knn_lm_eval.store.datastore import Datastore, record_derived
from knn_lm_eval.store.index_files import DEFAULT_INDEX
from knn_lm_eval.store.key_stream import number_entries
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import (
    check_free_space,
    disk_errors_in,
    replace_file,
    sha256,
    write_json,
    write_npy_header,
)

logger = logging.getLogger(__name__)

ENTRIES_PER_CLUSTER = 100  # on average, by default; Alon et al. 2022, figures 8 and 9


def cluster_kmeans(
    datastore: Datastore,
    name: str = "kmeans",
    num_clusters: int | None = None,
    sample: int | None = None,
    iterations: int = 20,
    seed: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> Clusters:
    """Cluster the entries by k-means of their keys (Alon et al. 2022); an entry belongs to the nearest
    centroid (exact squared L2).

    Takes all GPUs that faiss sees. The time goes with ``num_clusters * (iterations * sample + count)``.

    Parameters
    ----------
    name : the clustering's name.
    num_clusters : None takes 1/100 of the entries. Clusters may turn out empty.
    sample : random keys to train on, all in memory as float32; None takes 64 per cluster, or all keys.
    iterations : of k-means on the sample.
    seed : of the sample and the first centroids.
    resume : go on with an interrupted clustering of that name.
    overwrite : replace a finished clustering of that name.

    Raises
    ------
    UserError
        Where the numbers do not fit the store, the sample does not fit the memory, the name is taken, or the
        disk is full.
    """
    keys = datastore.require_keys("clustering")
    datastore.require_text_order("clustering, which is for RetoMaton,")
    count = len(datastore)
    num_clusters = max(1, count // ENTRIES_PER_CLUSTER) if num_clusters is None else num_clusters
    if not 1 <= num_clusters <= count:
        raise UserError(f"num_clusters={num_clusters} must be between 1 and the store's {count:,} entries.")
    sample = min(SAMPLE_PER_CLUSTER * num_clusters if sample is None else sample, count)
    if sample < num_clusters:
        raise UserError(f"sample={sample} is too small: k-means needs at least one key per cluster ({num_clusters:,}).")
    if iterations < 1:
        raise UserError(f"iterations={iterations} must be at least 1.")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed} must be between 0 and 2,147,483,647.")
    settings = {
        "method": "kmeans",
        "num_clusters": num_clusters,
        "sample": sample,
        "iterations": iterations,
        "seed": seed,
    }
    work = _Work(datastore, name, settings, resume, overwrite)
    with disk_errors_in(work.folder):
        work.begin()
        centroids = train_kmeans(keys, num_clusters, sample, iterations, seed, work)
        index: faiss.Index = faiss.IndexFlatL2(datastore.dimension)
        if faiss_gpus():
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(centroids)

        def assign(clusters: np.ndarray, begin: int, chunk: np.ndarray) -> None:
            clusters[begin : begin + len(chunk)] = index.search(chunk, 1)[1][:, 0]

        cluster_of_entry = number_entries(keys, work, np.int32, assign, "Assigning keys to clusters")
        return work.finish(cluster_of_entry, num_clusters)


def cluster_greedy_merge(
    datastore: Datastore,
    name: str = "greedy_merge",
    k: int = 9,
    index: str = DEFAULT_INDEX,
    probe: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Clusters:
    """Cluster the entries by greedy merging (He et al. 2021): near neighbours of the same value.

    Entries are taken in text order. One that no other has absorbed yet absorbs those of its ``k`` nearest
    neighbours that have its value and have neither been absorbed nor absorbed others. As in the published
    script, ``k`` does not count the entry itself: its first ``k + 1`` search results are looked at, itself
    passed over. (The script goes through the entries in random order.) An entry and what it absorbed are a
    cluster: its members have the same value, and are ``k + 2`` at most. Clusters are numbered in the order of
    the entries that were not absorbed.

    Parameters
    ----------
    name : the clustering's name.
    k : neighbours looked at.
    index : the name of the index to search.
    probe : inverted lists visited per search; None takes what the index was found to need.
    resume : go on with an interrupted clustering of that name.
    overwrite : replace a finished clustering of that name.

    Raises
    ------
    UserError
        Where the store has no such index or fewer than ``k`` other entries, the name is taken, or the disk is
        full.
    """
    datastore.require_keys("clustering")
    datastore.require_text_order("clustering, which is for RetoMaton,")
    searched = NeighbourSearch.open(datastore, k, index, probe)
    work = _Work(datastore, name, {"method": "greedy_merge", **searched.settings}, resume, overwrite)
    with disk_errors_in(work.folder):
        work.begin()
        absorber = find_absorbers(searched, work)
        cluster_of_entry = np.empty(len(datastore), dtype=np.int32)
        return work.finish(cluster_of_entry, _number_clusters(absorber, cluster_of_entry))


@dataclass(frozen=True)
class NeighbourSearch:
    """The search for the ``k`` nearest other entries of each entry, checked and opened."""

    datastore: Datastore
    k: int
    index: faiss.Index
    settings: dict[str, Any]

    @classmethod
    def open(cls, datastore: Datastore, k: int, index: str, probe: int | None) -> NeighbourSearch:
        """See ``cluster_greedy_merge`` for the arguments; raises UserError where they do not fit the store."""
        if not 1 <= k < len(datastore):
            raise UserError(f"k={k} must be at least 1 and less than the store's {len(datastore):,} entries.")
        if probe is not None and probe < 1:
            raise UserError(f"probe={probe} must be at least 1.")
        faiss_index, metadata = open_index(datastore, index)
        probe = None if inverted_file(faiss_index) is None else probe or metadata.get("probe") or DEFAULT_PROBE
        if probe is not None:
            set_probe(faiss_index, probe)
        settings = {"k": k, "index": index, "factory": metadata["factory"], "probe": probe}
        return cls(datastore, k, faiss_index, settings)


def find_absorbers(searched: NeighbourSearch, work: SavedStates) -> np.ndarray:
    """Greedy merging, as ``cluster_greedy_merge`` says.

    Returns
    -------
    int32 or int64 (see ``entry_dtype``) ``[count]``: the entry that absorbed each; itself where it absorbed
    others; -1 where neither.
    """
    datastore = searched.datastore
    values = np.asarray(datastore.values)

    def merge(absorber: np.ndarray, begin: int, chunk: np.ndarray) -> None:
        _merge(absorber, values, search(searched.index, chunk, searched.k + 1)[1], begin)

    keys = datastore.require_keys("clustering")
    return number_entries(keys, work, entry_dtype(len(datastore)), merge, "Merging near neighbours")


def import_members(datastore: Datastore, name: str, pickle_file: str | Path, overwrite: bool = False) -> Clusters:
    """Take over the clusters of a published ``members*.pkl``: a pickled scipy matrix ``[clusters, entries]``
    whose elements other than 0 say which entry is in which cluster.

    The rows' numbers stay the clusters' numbers. Entries without an element, or beyond the matrix's last
    column, are in no cluster.

    Parameters
    ----------
    name : the clustering's name.
    pickle_file : see ``knn_lm_eval.make.members``.
    overwrite : replace a finished clustering of that name.

    Raises
    ------
    UserError
        Where the pickle is not such a matrix, has more columns than the store has entries, or has an entry in
        two clusters; where the name is taken or the disk is full.
    """
    pickle_file = Path(pickle_file)
    settings = {"method": "import", "file": pickle_file.name}
    work = _Work(datastore, name, settings, resume=False, overwrite=overwrite)
    matrix = load_sparse_matrix(pickle_file)
    rows, columns = matrix.shape
    if columns > len(datastore):
        raise UserError(
            f"{pickle_file} clusters {columns:,} entries, the datastore {datastore.path} has "
            f"{len(datastore):,}: it was made for another datastore."
        )
    cluster_of_entry = np.full(len(datastore), -1, dtype=np.int32)
    if (entry := _place_rows(cluster_of_entry, matrix)) >= 0:
        raise UserError(f"{pickle_file} has entry {entry} in more than one cluster; each may be in one only.")
    if outside := int((cluster_of_entry < 0).sum()):
        logger.warning("%d of %d entries are in no cluster of %s.", outside, len(datastore), pickle_file)
    with disk_errors_in(work.folder):
        work.begin()
        work.settings["file_sha256"] = sha256(pickle_file)
        return work.finish(cluster_of_entry, rows)


def summarize(clusters: Clusters, values: np.ndarray) -> dict[str, float]:
    """Describe a clustering.

    Parameters
    ----------
    values : int32 ``[count]``, the store's.

    Returns
    -------
    ``mean``, ``median`` and ``max`` size of the clusters that are not empty, how many are ``empty``, the
    share of those not empty that have one entry (``singletons``), and ``purity``: the share of clustered
    entries whose value is the most common one of their cluster.
    """
    sizes = np.diff(clusters.member_starts)
    filled = sizes[sizes > 0]
    if not len(filled):
        return {"empty": len(sizes)}
    common = _most_common_values(np.asarray(values), np.asarray(clusters.member_starts), np.asarray(clusters.members))
    return {
        "mean": round(float(filled.mean()), 2),
        "median": float(np.median(filled)),
        "max": int(filled.max()),
        "empty": len(sizes) - len(filled),
        "singletons": round(float((filled == 1).mean()), 4),
        "purity": round(common / int(filled.sum()), 4),
    }


class _Work(SavedStates):
    """A clustering under way: its folder, and states saved in it now and then."""

    def __init__(
        self, datastore: Datastore, name: str, settings: dict[str, Any], resume: bool, overwrite: bool
    ) -> None:
        settings = {**settings, "keys_sha256": datastore.keys_checksum}
        super().__init__(clusters_folder(datastore, name), settings, resume)
        self.datastore, self.name = datastore, name
        if (self.folder / METADATA).exists() and not overwrite:
            raise UserError(f"The clusters {self.folder} exist already; choose another --name or give --overwrite.")

    def begin(self) -> None:
        """As the states', if there is space."""
        super().begin()
        # Cluster and place in the members' list of each entry, and a saved state of it and its successor.
        check_free_space(self.folder, 4 * 4 * len(self.datastore), "the clusters' arrays")

    def finish(self, cluster_of_entry: np.ndarray, num_clusters: int) -> Clusters:
        """Write the arrays and, last, ``clusters.json``."""
        member_starts, members = members_by_cluster(cluster_of_entry, num_clusters)
        arrays = dict(zip(ARRAYS, (cluster_of_entry, member_starts, members), strict=True))
        (self.folder / METADATA).unlink(missing_ok=True)
        for name, array in arrays.items():
            path = self.folder / f"{name}.npy"
            with open(path.with_name(path.name + ".tmp"), "wb") as file:
                write_npy_header(file, array.dtype, array.shape)
                file.write(array.data)
            replace_file(path.with_name(path.name + ".tmp"), path)
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **self.settings,
            "count": len(cluster_of_entry),
            "num_clusters": num_clusters,
            "entries_in_clusters": len(members),
            "summary": summarize(Clusters(self.folder, {}, **arrays), self.datastore.values),
            "files": {f"{name}.npy": (self.folder / f"{name}.npy").stat().st_size for name in ARRAYS},
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "faiss": faiss.__version__,
        }
        write_json(self.folder / METADATA, metadata)
        names = [METADATA, *metadata["files"]]
        record_derived(self.datastore.path, [f"clusters/{self.name}/{name}" for name in names])
        self.remove()
        return Clusters.open(self.datastore, self.name)


def members_by_cluster(cluster_of_entry: np.ndarray, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of ``cluster_of_entry``, by a counting sort.

    Parameters
    ----------
    cluster_of_entry : int32 ``[count]``, -1 for an entry in no cluster.

    Returns
    -------
    member_starts : int64 ``[num_clusters + 1]``.
    members : int32 or int64 (see ``entry_dtype``) ``[entries in clusters]``, ascending within each cluster.
    """
    member_starts = np.zeros(num_clusters + 1, dtype=np.int64)
    _count(cluster_of_entry, member_starts[1:])
    np.cumsum(member_starts, out=member_starts)
    members = np.empty(member_starts[-1], dtype=entry_dtype(len(cluster_of_entry)))
    _sort(cluster_of_entry, member_starts[:-1].copy(), members)
    return member_starts, members


@numba.njit(cache=True)
def _count(cluster_of_entry: np.ndarray, counts: np.ndarray) -> None:
    for cluster in cluster_of_entry:
        if cluster >= 0:
            counts[cluster] += 1


@numba.njit(cache=True)
def _sort(cluster_of_entry: np.ndarray, free: np.ndarray, members: np.ndarray) -> None:
    """Put each entry in its cluster's first free place."""
    for entry in range(len(cluster_of_entry)):
        cluster = cluster_of_entry[entry]
        if cluster >= 0:
            members[free[cluster]] = entry
            free[cluster] += 1


@numba.njit(cache=True)
def _merge(absorber: np.ndarray, values: np.ndarray, neighbours: np.ndarray, begin: int) -> None:
    """Let the entries from ``begin`` on, whose neighbours are given, absorb them where they may.

    ``absorber`` has, for each entry, the one that absorbed it; itself where it absorbed others; else -1.
    """
    for row in range(len(neighbours)):
        entry = begin + row
        if absorber[entry] >= 0:
            continue
        for other in neighbours[row]:
            if other >= 0 and other != entry and absorber[other] < 0 and values[other] == values[entry]:
                absorber[other] = entry
                absorber[entry] = entry


@numba.njit(cache=True)
def _number_clusters(absorber: np.ndarray, cluster_of_entry: np.ndarray) -> int:
    """Number the entries that were not absorbed, in order; the others take their absorber's number."""
    clusters = 0
    for entry in range(len(absorber)):
        if absorber[entry] < 0 or absorber[entry] == entry:
            cluster_of_entry[entry] = clusters
            clusters += 1
    for entry in range(len(absorber)):
        if absorber[entry] >= 0:
            cluster_of_entry[entry] = cluster_of_entry[absorber[entry]]
    return clusters


def _place_rows(cluster_of_entry: np.ndarray, matrix: SparseMatrix) -> int:
    """Enter the matrix's rows into ``cluster_of_entry``; an entry that is in two of them, or -1."""
    return _place(cluster_of_entry, matrix.by_row, matrix.indptr, matrix.indices, matrix.data != 0)


@numba.njit(cache=True)
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


@numba.njit(cache=True)
def _most_common_values(values: np.ndarray, member_starts: np.ndarray, members: np.ndarray) -> int:
    """How many entries have the most common value of their cluster."""
    total = 0
    for cluster in range(len(member_starts) - 1):
        ordered = np.sort(values[members[member_starts[cluster] : member_starts[cluster + 1]]])
        longest = run = 0
        for place in range(len(ordered)):
            run = run + 1 if place > 0 and ordered[place] == ordered[place - 1] else 1
            longest = max(longest, run)
        total += longest
    return total
