"""The nearest of several searches, and distances to given entries of several stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.stores import make_store, without_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.joined_retriever import JoinedRetriever
from knn_lm_eval.search.merged_runs import nearest_of_runs
from knn_lm_eval.search.retriever import StoreRetriever
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.joined import JoinedStore

# Few different numbers, so that there are ties, also between 0 and -0; infinity is an empty slot.
DISTANCES = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0, np.inf])


@settings(deadline=None)  # what is compiled takes its time
@given(st.lists(st.lists(DISTANCES, min_size=1, max_size=5), min_size=1, max_size=4), st.booleans(), st.data())
def test_merging_is_sorting_by_distance_then_store_then_slot(
    runs: list[list[float]], ascending: bool, data: st.DataObject
) -> None:
    runs = [sorted(run) if ascending else run for run in runs]
    k = data.draw(st.integers(1, sum(map(len, runs))))
    candidates = [(distance, slot) for slot, distance in enumerate(d for run in runs for d in run)]
    expected = [slot for _, slot in sorted(candidates)[:k]]
    arrays = [np.array([run, run[::-1]], dtype=np.float32) for run in runs]
    assert nearest_of_runs(arrays, k)[0].tolist() == expected


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Datastore]:
    """Three stores: one with codes, one with an exact index, one small and without an index."""
    folder = tmp_path_factory.mktemp("joined")
    made = [make_store(folder / name, count, 16, seed) for seed, (name, count) in enumerate(SIZES.items())]
    build_index(made[0], "IVF16,PQ8x8")
    build_index(made[1], "Flat")
    return [Datastore.open(store.path) for store in made]


SIZES = {"codes": 3000, "flat": 1500, "small": 7}


def join(stores: list[Datastore], retrievers: list[StoreRetriever], k: int = 20) -> JoinedRetriever:
    names = tuple(store.path.name for store in stores)
    return JoinedRetriever(JoinedStore(tuple(stores), names), retrievers, k, [1.0] * len(stores), 1.0)


@pytest.fixture(scope="module")
def mixed(stores: list[Datastore]) -> JoinedRetriever:
    parts: list[StoreRetriever] = [LocalRetriever(stores[0], 20), LocalRetriever(stores[1], 20)]
    return join(stores, [*parts, ExactRetriever(stores[2], 7)])


def test_distances_to_given_entries_are_each_stores_own(mixed: JoinedRetriever, stores: list[Datastore]) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((5, 16)).astype(np.float32)
    other, distances = mixed.with_distances()
    entries = rng.integers(0, len(mixed.datastore), (5, 12))
    entries[0, :3] = 3000, 4499, 4506  # where stores begin and end
    counts = np.array([12, 5, 0, 1, 12])
    found = distances(queries, entries, counts)
    prepared = distances.of_transformed(distances.transformed(queries), entries, counts)  # type: ignore[attr-defined]
    of_stores = [part.with_distances()[1] for part in other.of_stores]
    for row, count in enumerate(counts):
        for slot in range(count):
            place = mixed.datastore.place(int(entries[row, slot]))
            number = stores.index(place.store)
            one = of_stores[number](queries[row : row + 1], np.array([[place.entry]]), np.array([1]))
            assert found[row, slot] == prepared[row, slot] == pytest.approx(float(one[0, 0]), rel=1e-6)


def test_settings_of_all_stores_are_asked_for_at_once(mixed: JoinedRetriever) -> None:
    other = mixed.with_settings(k=5, probe=3)
    assert (other.k, [part.k for part in other.of_stores]) == (5, [5, 5, 5])
    assert [part.probe for part in other.of_stores] == [3, None, None] and other.probe == 3 and other.has_lists
    assert mixed.k == 20 and [part.k for part in mixed.of_stores] == [20, 20, 7]
    assert mixed.with_settings(k=4000).of_stores[1].k == 1500
    with pytest.raises(UserError, match="k=4508 does not fit the datastore"):
        mixed.with_settings(k=4508)
    assert (mixed.kind_of_distances, other.statistics.searches) == ("approximate and exact", 0)


def test_with_exact_distances_all_are_compared_alike(mixed: JoinedRetriever, stores: list[Datastore]) -> None:
    queries = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    exact = mixed.with_settings(recompute_dists=True)
    distances, entries = exact.find(queries)
    assert (np.diff(distances, axis=1) >= 0).all() and exact.kind_of_distances == "exact"
    keys = np.concatenate([store.require_keys("a test") for store in stores])
    np.testing.assert_array_equal(distances, exact_distances(keys, queries, entries, "l2"))
    assert exact.statistics.searches == 9 and sum(exact.statistics.neighbours_of_stores) == 9 * 20
    assert sum(exact.statistics.weight_of_stores) == pytest.approx(9)
    assert not exact.first_of_more_are_fewer


def test_indexes_that_rank_differently_are_not_joined(stores: list[Datastore], tmp_path: Path) -> None:
    dot = make_store(tmp_path / "dot", 500, 16, 9)
    build_index(dot, "Flat", sim_func="dot")
    with pytest.raises(UserError, match="rank differently"):
        join([stores[1], dot], [LocalRetriever(stores[1], 5), LocalRetriever(Datastore.open(dot.path), 5)])


def test_one_store_twice_is_not_joined(stores: list[Datastore], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hold the same entries"):
        JoinedStore((stores[0], stores[0]), ("a", "b"))
    wide = make_store(tmp_path / "wide", 100, 8)
    with pytest.raises(UserError, match="numbers per key 16, the other 8"):
        JoinedStore((stores[0], wide), ("a", "wide"))


def test_stores_without_keys_are_searched_by_their_indexes(stores: list[Datastore], tmp_path: Path) -> None:
    keyless = without_keys(stores[0], tmp_path / "keyless")
    queries = np.random.default_rng(2).standard_normal((4, 16)).astype(np.float32)
    found = join([keyless, stores[1]], [LocalRetriever(keyless, 20), LocalRetriever(stores[1], 20)]).find(queries)
    with_keys = join(stores[:2], [LocalRetriever(stores[0], 20), LocalRetriever(stores[1], 20)]).find(queries)
    for one, other in zip(found, with_keys, strict=True):
        np.testing.assert_array_equal(one, other)
