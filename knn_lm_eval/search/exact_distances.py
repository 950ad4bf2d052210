"""Exact distances of queries to given entries, from the keys on disk, read forwards."""

from __future__ import annotations

import numpy as np
import torch

# Keys gathered at a time for exact distances: bounds the memory that recompute_dists takes.
GATHER_BYTES = 2**26


def exact_distances(keys: np.ndarray, queries: np.ndarray, entries: np.ndarray, sim_func: str) -> np.ndarray:
    """The distances of queries to given entries, from the keys themselves.

    The entries of all queries are gone through in file order, so that each key is read once and a disk reads
    forwards. Takes 24 bytes of memory per distance, and ``GATHER_BYTES`` three times.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    queries : float32 ``[n, dimension]``.
    entries : int64 ``[n, k]``; -1 in empty slots.

    Returns
    -------
    float32 ``[n, k]``: squared L2 or negated inner products; infinity in empty slots.
    """
    distances = np.full(entries.size, np.inf, dtype=np.float32)  # [n k]
    wanted, all_queries = entries.ravel(), torch.from_numpy(queries)  # [n k], [n, dimension]
    order = np.argsort(wanted, kind="stable")  # [n k]
    order = order[np.searchsorted(wanted, 0, sorter=order) :]  # [filled slots]
    block = max(1, GATHER_BYTES // (keys.shape[1] * 4))
    for start in range(0, len(order), block):
        slots = order[start : start + block]  # [block]
        unique, inverse = np.unique(wanted[slots], return_inverse=True)
        vectors = torch.from_numpy(keys[unique].astype(np.float32))[torch.from_numpy(inverse)]  # [block, dimension]
        query = all_queries[torch.from_numpy(slots // entries.shape[1])]  # [block, dimension]
        result = -(query * vectors).sum(-1) if sim_func == "dot" else (query - vectors).square_().sum(-1)
        distances[slots] = result.numpy()
    return distances.reshape(entries.shape)
