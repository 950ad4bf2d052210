"""RetoMaton written from the paper in plain loops: slow and obvious."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore


class SlowStore(Protocol):
    """What the slow walk needs of a store; ``cluster_of_entry`` only where there are ``clusters``."""

    keys: np.ndarray
    values: np.ndarray
    document_starts: np.ndarray
    clusters: Any
    cluster_of_entry: np.ndarray

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and entries of the ``k`` nearest, nearest first; entry -1 where there are fewer."""
        ...


class StoreForOracle:
    """A datastore for the slow walk, by exact distances."""

    def __init__(self, store: Datastore, clusters: Clusters | None) -> None:
        self.keys, self.values = store.keys.astype(np.float32), np.asarray(store.values)
        self.document_starts = np.asarray(store.document_starts)
        self.clusters = clusters
        if clusters:
            self.cluster_of_entry = np.asarray(clusters.cluster_of_entry)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances = ((queries[:, None].astype(np.float64) - self.keys[None]) ** 2).sum(-1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, order, 1), order


def slow_walk(
    store: SlowStore,
    queries: np.ndarray,
    targets: list[int],
    how: AutomatonSettings,
    left_out: Callable[[int, int], bool] = lambda step, entry: False,
) -> tuple[list[dict[int, float]], int]:
    """Algorithm 1 of Alon et al. 2022, one step and one candidate at a time: p_kNN of each step, and searches.

    ``left_out`` says which entries do not count at a step.
    """
    survivors: list[int] = []
    p_knn: list[dict[int, float]] = []
    searches = 0
    for step, (query, target) in enumerate(zip(queries, targets, strict=True)):
        survivors = [entry for entry in survivors if not left_out(step, entry + 1)]
        pointers = [entry + 1 for entry in survivors][: how.max_knns]
        if store.clusters is not None and 0 < len(pointers) < how.max_knns:
            pointed_to = Counter(int(store.cluster_of_entry[entry]) for entry in pointers)
            for cluster in sorted(pointed_to, key=lambda c: (-pointed_to[c], c)):
                for entry in np.flatnonzero(store.cluster_of_entry == cluster).tolist() if cluster != -1 else []:
                    if how.duplicates == "keep" or entry not in pointers:
                        pointers.append(entry)
            pointers = [entry for entry in pointers[: how.max_knns] if not left_out(step, entry)]
        candidates = []
        if len(survivors) < how.min_knns:
            searches += 1
            found = [int(e) for e in store.search(query[None], how.k)[1][0] if e >= 0]
            candidates += [entry for entry in found if not left_out(step, entry)]
        for entry in pointers:
            if how.duplicates == "keep" or entry not in candidates:
                candidates.append(entry)
        distance = {e: float(((store.keys[e].astype(float) - query) ** 2).sum()) for e in candidates}
        total = sum(math.exp(-distance[entry] / how.knn_temp) for entry in candidates)
        p_knn.append({})
        for entry in candidates:
            value = int(store.values[entry])
            p_knn[-1][value] = p_knn[-1].get(value, 0.0) + math.exp(-distance[entry] / how.knn_temp) / total
        survivors = [
            entry
            for entry in sorted(candidates, key=lambda e: distance[e])
            if store.values[entry] == target
            and entry + 1 < len(store.values)
            and entry + 1 not in store.document_starts
        ]
    return p_knn, searches
