"""What exact search costs beside faiss's Flat: time, error and memory of one of them, in a process of its own.

    python tests/helpers/exact_cost.py STORE exact|flat [--entries N] [--queries 512] [--k 1024]

Queries lie between keys of the store. Time is CPU time of one thread, the median of three searches of all queries after
a first one; errors are of 16 queries, against distances in double precision.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch

from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.system.memory import resident_bytes

CHUNK, CHECKED, SEARCHES = 2**16, 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("kind", choices=("exact", "flat"))
    parser.add_argument("--entries", type=int)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    keys = np.load(arguments.store / "keys.npy", mmap_mode="r")[: arguments.entries]
    queries = between_keys(keys, arguments.queries)
    before = resident_bytes()
    search = open_search(arguments.kind, keys)
    search(queries, arguments.k)
    seconds = []
    for _ in range(SEARCHES):
        start = time.process_time()
        found = search(queries, arguments.k)
        seconds.append(time.process_time() - start)
    after = resident_bytes()
    assert before is not None and after is not None, "on Linux only"
    checked = slice(0, len(queries), max(1, len(queries) // CHECKED))
    truth = nearest_distances(keys, queries[checked], arguments.k)
    error = np.abs(found[checked] - truth)
    told = {
        "entries": len(keys),
        "kind": arguments.kind,
        "milliseconds a query": round(1e3 * float(np.median(seconds)) / len(queries), 2),
        "largest relative error": float(np.max(error / truth)),
        "largest error beside the spread": float(np.max(error) / truth.std()),
        "own memory, MiB": (after["anonymous"] - before["anonymous"]) >> 20,
    }
    print(json.dumps(told))


def between_keys(keys: np.ndarray, count: int) -> np.ndarray:
    """Queries ``[count, dimension]``: from a key, a third of the way to the next."""
    entries = np.sort(np.random.default_rng(0).permutation(len(keys) - 1)[:count])
    here, there = keys[entries].astype(np.float32), keys[entries + 1].astype(np.float32)
    return here + np.float32(0.3) * (there - here)


def open_search(kind: str, keys: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function of queries and k that gives the distances ``[n, k]``."""
    if kind == "exact":
        search = ExactSearch(keys, "l2")
        return lambda queries, k: search.search(queries, k)[0]
    flat = faiss.IndexFlatL2(keys.shape[1])
    for start in range(0, len(keys), CHUNK):
        flat.add(keys[start : start + CHUNK].astype(np.float32))
    return lambda queries, k: flat.search(queries, k)[0]


def nearest_distances(keys: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` smallest squared distances of each query, in double precision and ascending."""
    best = np.empty((len(queries), 0))
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK].astype(np.float64)
        found = np.stack([((chunk - query) ** 2).sum(1) for query in queries.astype(np.float64)])
        both = np.concatenate([best, found], 1)
        best = np.partition(both, min(k, both.shape[1]) - 1, 1)[:, :k]
    return np.sort(best, 1)


if __name__ == "__main__":
    main()
