"""RetoMaton's fast walk against the paper in plain loops, on random stores."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from helpers.slow_automaton import slow_walk
from hypothesis import given, settings
from hypothesis import strategies as st

import knn_lm_eval.methods.automaton as automaton_module
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk

INFINITY = float("inf")


class Store:
    """Small integer keys, so that ties and exact arithmetic abound."""

    def __init__(self, seed: int, count: int, num_values: int, clusters: int, documents: int) -> None:
        rng = np.random.default_rng(seed)
        self.keys = rng.integers(-3, 4, (count, 3)).astype(np.float32)
        self.values = rng.integers(0, num_values, count).astype(np.int32)
        self.document_starts = np.unique(np.append(0, rng.integers(0, count, documents - 1)))
        self.clusters = None
        if clusters:
            # One cluster number more than are used (an empty cluster), and some entries in none.
            self.cluster_of_entry = rng.integers(-1, clusters, count).astype(np.int32)
            members = [np.flatnonzero(self.cluster_of_entry == c) for c in range(clusters + 1)]
            starts = np.cumsum([0, *map(len, members)])
            self.clusters = self.cluster_of_entry, starts, np.concatenate(members).astype(np.int32)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances = ((queries[:, None] - self.keys[None]) ** 2).sum(-1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        missing = k - order.shape[1]  # a search for more than there is leaves slots empty
        entries = np.pad(order, ((0, 0), (0, missing)), constant_values=-1)
        found = np.take_along_axis(distances, order, 1)
        return np.pad(found, ((0, 0), (0, missing)), constant_values=np.inf), entries

    def pointer_distances(self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
        distances = np.full(entries.shape, np.nan, dtype=np.float32)
        for i, count in enumerate(counts):
            distances[i, :count] = ((self.keys[entries[i, :count]] - queries[i]) ** 2).sum(-1)
        return distances


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 60),
    num_values=st.integers(1, 4),
    clusters=st.integers(0, 8),
    documents=st.integers(1, 5),
    k=st.integers(1, 12),
    min_knns=st.sampled_from([0, 1, 2, 5, INFINITY]),
    max_knns=st.integers(1, 20),
    duplicates=st.sampled_from(["keep", "merge"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    prepared_rows=st.sampled_from([1, 5, 256]),
)
def test_lockstep_walks_equal_the_slow_walk(
    seed, count, num_values, clusters, documents, k, min_knns, max_knns, duplicates, lengths, prepared_rows
) -> None:
    store = Store(seed, count, num_values, clusters, documents)
    how = AutomatonSettings(k, 2.0, min_knns, max_knns, duplicates)
    rng = np.random.default_rng(seed)
    walks = []
    for length in lengths:
        # Near a stretch of the store's own text, so that pointers are followed for some steps.
        text = (rng.integers(0, count) + np.arange(length)) % count
        noise = rng.integers(-1, 2, (length, 3))
        targets = np.where(rng.random(length) < 0.8, store.values[text], rng.integers(0, num_values, length))
        walks.append(Walk((store.keys[text] + noise).astype(np.float32), targets))

    def prepare(queries: np.ndarray) -> np.ndarray:
        assert len(queries) <= max(prepared_rows, len(lengths))
        return np.roll(queries, 1, axis=1)

    automaton = Automaton(
        store.values,
        store.document_starts,
        store.clusters,
        lambda queries: store.search(queries, k),
        lambda queries, *entries: store.pointer_distances(np.roll(queries, -1, axis=1), *entries),
        how,
        prepare=prepare,
    ).with_settings(how)
    with mock.patch.object(automaton_module, "PREPARED_ROWS", prepared_rows):
        automaton.walk(walks)
    total_searches = 0
    for walk in walks:
        expected, searches = slow_walk(store, walk.queries, walk.targets.tolist(), how)
        # Without a candidate there is no p_kNN.
        p = [step.get(int(y), 0.0) if step else np.nan for step, y in zip(expected, walk.targets, strict=True)]
        assert np.exp(walk.log_p_knn).tolist() == pytest.approx(p, rel=1e-5, nan_ok=True)
        assert walk.searches == searches
        total_searches += searches
    assert automaton.statistics.searches == total_searches
    assert automaton.statistics.steps == sum(lengths)


@pytest.mark.parametrize("min_knns", [1, 3, INFINITY])
@pytest.mark.parametrize("duplicates", ["keep", "merge"])
def test_a_walk_in_two_parts_equals_one_walk(min_knns: float, duplicates: str) -> None:
    store = Store(5, 200, 3, 10, 2)
    how = AutomatonSettings(8, 2.0, min_knns, 16, duplicates)
    queries, targets = store.keys[20:60], store.values[20:60]

    def walk(*walks: Walk) -> Automaton:
        automaton = Automaton(
            store.values,
            store.document_starts,
            store.clusters,
            lambda q: store.search(q, 8),
            store.pointer_distances,
            how,
        )
        automaton.walk(walks)
        return automaton

    whole = Walk(queries, targets)
    walk(whole)
    first = Walk(queries[:17], targets[:17])
    walk(first)
    second = Walk(queries[17:], targets[17:], first.survivors_at_end)
    walk(second)
    assert [*first.log_p_knn, *second.log_p_knn] == pytest.approx(whole.log_p_knn.tolist())
    assert first.searches + second.searches == whole.searches


def test_kept_neighbours_give_the_same_probability() -> None:
    store = Store(5, 200, 3, 10, 2)
    walk = Walk(store.keys[20:60], store.values[20:60])
    Automaton(
        store.values,
        store.document_starts,
        store.clusters,
        lambda q: store.search(q, 8),
        store.pointer_distances,
        AutomatonSettings(8, 2.0, 1, 16),
    ).walk([walk], keep_neighbours=True)
    for log_p, target, (distances, entries) in zip(walk.log_p_knn, walk.targets, walk.neighbours, strict=True):
        weights = np.exp(-distances.astype(np.float64) / 2.0)
        mass = weights[store.values[entries] == target].sum()
        assert log_p == pytest.approx(math.log(mass / weights.sum()) if mass else -INFINITY)
