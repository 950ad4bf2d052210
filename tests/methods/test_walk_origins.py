"""Where a walk's candidates came from, against plain loops over sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk
from knn_lm_eval.methods.walk_origins import CLUSTER, POINTER, SEARCH, walk_origins

K = 4


class Entries:
    """Random entries near each other, so that walks go on for some steps."""

    def __init__(self, seed: int, clustered: bool) -> None:
        rng = np.random.default_rng(seed)
        self.keys = rng.integers(-3, 4, (40, 2)).astype(np.float32)
        self.values = rng.integers(0, 3, 40).astype(np.int32)
        self.starts = np.unique(np.append(0, rng.integers(0, 40, 2)))
        self.cluster_of = rng.integers(-1, 5, 40).astype(np.int32)
        of_clusters = [np.flatnonzero(self.cluster_of == cluster) for cluster in range(5)]
        csr = self.cluster_of, np.cumsum([0, *map(len, of_clusters)]), np.concatenate(of_clusters).astype(np.int32)
        self.clusters = csr if clustered else None

    def distances(self, query: np.ndarray, entries: np.ndarray) -> np.ndarray:
        return ((self.keys[entries] - query) ** 2).sum(-1)

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [np.argsort(self.distances(query, np.arange(40)), kind="stable")[:K] for query in queries]
        distances = [self.distances(query, entries) for query, entries in zip(queries, found, strict=True)]
        return np.stack(distances), np.stack(found)

    def pointer_distances(self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
        distances = np.zeros(entries.shape, dtype=np.float32)
        for row, count in enumerate(counts):
            distances[row, :count] = self.distances(queries[row], entries[row, :count])
        return distances


def slow_origins(store: Entries, walk: Walk, how: AutomatonSettings) -> list[tuple[int, list[int]]]:
    """The survivors' number and the candidates' origins at each step, a candidate at a time."""
    survivors, steps = walk.survivors.tolist(), []
    for (distances, entries), target in zip(walk.neighbours, walk.targets.tolist(), strict=True):
        pointers = [entry + 1 for entry in survivors][: how.max_knns]
        members: set[int] = set()
        if store.clusters is not None and len(pointers) < how.max_knns:
            # In merged walks max_knns is never reached here (see the test), so the order of clusters does not matter.
            of_pointers = {int(store.cluster_of[entry]) for entry in pointers} - {-1}
            members = {entry for entry in range(40) if store.cluster_of[entry] in of_pointers}
        origins = [POINTER if e in pointers else CLUSTER if e in members else SEARCH for e in entries.tolist()]
        steps.append((len(survivors), origins))
        order = np.argsort(distances, kind="stable")
        survivors = [
            int(entries[i])
            for i in order
            if store.values[entries[i]] == target and entries[i] + 1 < 40 and entries[i] + 1 not in store.starts
        ]
    return steps


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clustered=st.booleans(),
    min_knns=st.sampled_from([0, 1, 3, np.inf]),
    duplicates=st.sampled_from(["keep", "merge"]),
)
def test_origins_are_those_of_plain_loops(seed: int, clustered: bool, min_knns: float, duplicates: str) -> None:
    store = Entries(seed, clustered)
    how = AutomatonSettings(K, 1.0, min_knns, max_knns=200, duplicates=duplicates)  # type: ignore[arg-type]
    automaton = Automaton(store.values, store.starts, store.clusters, store.search, store.pointer_distances, how)
    rng = np.random.default_rng(seed)
    at = (rng.integers(0, 40) + np.arange(12)) % 40
    walk = Walk(store.keys[at] + rng.integers(-1, 2, (12, 2)).astype(np.float32), store.values[at])
    walk.survivors = np.flatnonzero(np.isin(np.arange(1, 40), store.starts, invert=True))[:2]  # of a window before
    automaton.walk([walk], keep_neighbours=True)
    found = [(step.survivors, step.of_candidates.tolist()) for step in walk_origins(automaton, walk)]
    assert found == slow_origins(store, walk, how)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_pointers_are_followed_than_a_step_may(most: int) -> None:
    store = Entries(1, clustered=False)
    how = AutomatonSettings(K, 1.0, 0, max_knns=most)
    automaton = Automaton(store.values, store.starts, None, store.search, store.pointer_distances, how)
    pointers, members = automaton.followed(np.array([5, 9, 20, 30]))
    assert pointers.tolist() == [6, 10, 21, 31][:most] and not len(members)
