"""The lists of a clustering's members, sorted by cluster in memory that does not grow with the entries.

Clusters are taken range by range, as many at a time as ``memory`` has room for, and each range reads all entries'
clusters once, from the front. What is written at random places then lies close together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_lm_eval.compiling import compiled
from knn_lm_eval.store.clusters import ARRAYS, cluster_dtype, entry_dtype

READ_CHUNK = 2**24  # entries at a time


def write_arrays(
    folder: Path, ending: str, cluster_of_entry: np.ndarray, num_clusters: int, memory: int
) -> dict[str, np.ndarray]:
    """Write the arrays of a clustering, each to the file of its name with this ending.

    Parameters
    ----------
    cluster_of_entry : int32 or int64 ``[count]``, may be memory-mapped; -1 for an entry in no cluster.
    memory : bytes that it may take.

    Returns
    -------
    The arrays by their names (``ARRAYS``), memory-mapped.
    """
    count = len(cluster_of_entry)

    def new_array(name: str, dtype: type[Any], length: int) -> np.memmap[Any, Any]:
        return np.lib.format.open_memmap(folder / f"{name}{ending}", "w+", dtype, (length,))

    clusters = new_array(ARRAYS[0], cluster_dtype(num_clusters), count)
    for begin in range(0, count, READ_CHUNK):
        clusters[begin : begin + READ_CHUNK] = cluster_of_entry[begin : begin + READ_CHUNK]
    member_starts = new_array(ARRAYS[1], np.int64, num_clusters + 1)
    count_members(clusters, member_starts, memory // 2)
    members = new_array(ARRAYS[2], entry_dtype(count), int(member_starts[-1]))
    sort_members(clusters, member_starts, members, memory // 2)
    for array in (clusters, member_starts, members):
        array.flush()
    return dict(zip(ARRAYS, (clusters, member_starts, members), strict=True))


def count_members(cluster_of_entry: np.ndarray, member_starts: np.ndarray, memory: int) -> None:
    """Fill in where the members of each cluster begin.

    Parameters
    ----------
    cluster_of_entry : int32 or int64 ``[count]``, -1 for an entry in no cluster.
    member_starts : int64 ``[clusters + 1]``, may be memory-mapped.
    memory : bytes for a range's counts.
    """
    clusters, total = len(member_starts) - 1, 0
    at_once = max(1, memory // 8)
    member_starts[0] = 0
    for first in range(0, clusters, at_once):
        counts = np.zeros(min(at_once, clusters - first), dtype=np.int64)
        for _, chunk in _chunks(cluster_of_entry, "Counting members"):
            _count(chunk, first, counts)
        np.cumsum(counts, out=counts)
        member_starts[first + 1 : first + 1 + len(counts)] = counts
        member_starts[first + 1 : first + 1 + len(counts)] += total
        total += int(counts[-1])


def sort_members(cluster_of_entry: np.ndarray, member_starts: np.ndarray, members: np.ndarray, memory: int) -> None:
    """Fill in the clusters' members, ascending within each cluster: a counting sort.

    Parameters
    ----------
    cluster_of_entry, member_starts : as ``count_members`` takes and leaves them.
    members : int32 or int64 ``[entries in clusters]``, may be memory-mapped.
    memory : bytes for a range's members and places; a single cluster's members may be more.
    """
    clusters, first = len(member_starts) - 1, 0
    while first < clusters:
        # Half for the places that are free, half for the members.
        last = min(clusters, first + max(1, memory // 16))
        most = int(member_starts[first]) + memory // 2 // members.itemsize
        last = min(last, max(first + 1, int(np.searchsorted(member_starts, most, side="right")) - 1))
        free = np.array(member_starts[first:last])
        for begin, chunk in _chunks(cluster_of_entry, "Sorting members"):
            _sort(chunk, begin, first, free, members)
        first = last


def _chunks(cluster_of_entry: np.ndarray, description: str) -> Iterator[tuple[int, np.ndarray]]:
    """The entries' clusters from the front: the first entry of each chunk, and its clusters."""
    count = len(cluster_of_entry)
    bar = tqdm(total=count, desc=description, unit=" entries", unit_scale=True, disable=count < READ_CHUNK)
    with bar:
        for begin in range(0, count, READ_CHUNK):
            chunk = np.asarray(cluster_of_entry[begin : begin + READ_CHUNK])
            yield begin, chunk
            bar.update(len(chunk))


@compiled
def _count(cluster_of_entry: np.ndarray, first: int, counts: np.ndarray) -> None:
    for cluster in cluster_of_entry:
        if 0 <= cluster - first < len(counts):
            counts[cluster - first] += 1


@compiled
def _sort(cluster_of_entry: np.ndarray, begin: int, first: int, free: np.ndarray, members: np.ndarray) -> None:
    """Put each entry that is in the range of clusters in its cluster's first free place."""
    for row in range(len(cluster_of_entry)):
        cluster = cluster_of_entry[row] - first
        if 0 <= cluster < len(free):
            members[free[cluster]] = begin + row
            free[cluster] += 1
