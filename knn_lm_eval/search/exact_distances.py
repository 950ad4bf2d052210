# mypy: disable-error-code="no-untyped-def"
"""Exact distances of queries to given entries, from the keys on disk, read forwards."""

from __future__ import annotations

import numpy as np

from knn_lm_eval.compiling import compiled

# Keys gathered at a time for exact distances: bounds the memory that recompute_dists takes.
GATHER_BYTES = 2**26


def exact_distances(keys: np.ndarray, queries: np.ndarray, entries: np.ndarray, sim_func: str) -> np.ndarray:
    """The distances of queries to given entries, from the keys themselves.

    The entries of all queries are gone through in file order, so that each key is read once and a disk reads
    forwards. Takes 24 bytes of memory per distance, and ``GATHER_BYTES``.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    queries : float32 ``[n, dimension]``.
    entries : int64 ``[n, k]``; -1 in empty slots.

    Returns
    -------
    float32 ``[n, k]``: squared L2 or negated inner products; infinity in empty slots.
    """
    import torch  # takes seconds, and a shard on a Ray node may never come here

    distances = np.full(entries.size, np.inf, dtype=np.float32)  # [n k]
    wanted = entries.ravel()  # [n k]
    order = np.argsort(wanted)  # [n k]
    order = order[np.searchsorted(wanted, 0, sorter=order) :]  # [filled slots]
    block = max(1, GATHER_BYTES // (keys.shape[1] * 4))
    for start in range(0, len(order), block):
        slots = order[start : start + block]  # [block]
        entry = wanted[slots]  # [block], ascending
        is_first = np.diff(entry, prepend=-1) > 0  # [block]
        vectors = torch.from_numpy(keys[entry[is_first]]).float().numpy()  # [unique, dimension]
        place = np.cumsum(is_first) - 1  # [block]
        _fill(distances, slots, place, vectors, queries, entries.shape[1], sim_func == "dot")
    return distances.reshape(entries.shape)


def filled_slots(entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``entries`` ``[n, m]`` with -1 beyond the first ``counts`` ``[n]`` of each row."""
    return np.where(np.arange(entries.shape[1]) < counts[:, None], entries, -1)


# Sums may be taken in any order: that is what lets them be taken sixteen numbers at a time.
@compiled(fastmath={"reassoc", "contract"})
def _fill(distances, slots, place, vectors, queries, k, dot):
    for i in range(len(slots)):
        query, vector = queries[slots[i] // k], vectors[place[i]]
        if dot:
            # Inner products may all lie near a large common number, and differ in what single precision leaves out.
            product = 0.0
            for j in range(len(query)):
                product -= np.float64(query[j]) * np.float64(vector[j])
            distances[slots[i]] = product
        else:
            square = np.float32(0.0)
            for j in range(len(query)):
                difference = query[j] - vector[j]
                square += difference * difference
            distances[slots[i]] = square
