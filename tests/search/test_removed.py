"""Entries that do not count are never found, and what is found is what a store without them has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.faiss_index import make_index, search, set_probe
from knn_lm_eval.store.removed import KeptKeys, Removed

COUNT, DIMENSION = 1200, 16


def removed_of(mask: np.ndarray) -> Removed:
    """Each entry a document, and those of a mask removed."""
    return Removed.of_documents(np.flatnonzero(mask), np.arange(len(mask)), len(mask))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.booleans(), min_size=1, max_size=70), st.data())
def test_runs_are_the_mask(mask: list[bool], data: st.DataObject) -> None:
    away = np.array(mask)
    removed, kept = removed_of(away), np.flatnonzero(~away)
    entries = np.arange(len(away))
    assert len(removed) == away.sum() and removed.kept == len(kept)
    assert (removed.are_removed(entries) == away).all() and not removed.are_removed(np.array([-1])).any()
    assert (removed.kept_entries(np.arange(len(kept))) == kept).all()
    assert (removed.ranks(kept) == np.arange(len(kept))).all() and removed.ranks(np.array([-1])) == -1
    assert (np.unpackbits(removed.kept_bits, bitorder="little")[: len(away)] == ~away).all()
    assert [entry for run in removed.kept_runs() for entry in range(*run)] == kept.tolist()
    start = data.draw(st.integers(0, len(away)))
    stop = data.draw(st.integers(start, len(away)))
    some = removed.within(start, stop)
    assert some.count == stop - start and (some.are_removed(np.arange(stop - start)) == away[start:stop]).all()
    keys = np.random.default_rng(0).standard_normal((len(away), 3)).astype(np.float16)
    there = KeptKeys(keys, removed)
    first = data.draw(st.integers(0, len(kept)))
    last, step = data.draw(st.integers(first, len(kept))), data.draw(st.integers(1, 4))
    assert there.shape == (len(kept), 3) and (there[first:last:step] == keys[kept][first:last:step]).all()
    run = there.run(first, last)
    assert len(run) == last - first and (run[0:2] == keys[kept][first:last][0:2]).all()


@pytest.mark.parametrize("document_starts", [[0, 4, 4, 9], [0, 3, 6, 12]])
def test_entries_of_documents(document_starts: list[int]) -> None:
    starts, count = np.array(document_starts), 12
    for chosen in range(16):
        documents = np.flatnonzero([chosen >> bit & 1 for bit in range(4)])
        away = np.zeros(count, dtype=bool)
        for document in documents:
            away[starts[document] : [*starts[1:], count][document]] = True
        assert (Removed.of_documents(documents, starts, count).are_removed(np.arange(count)) == away).all()


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.standard_normal((COUNT, DIMENSION)) + 5).astype(np.float16)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return (np.random.default_rng(4).standard_normal((40, DIMENSION)) + 5).astype(np.float32)


@pytest.fixture(scope="module", params=[0.0, 0.01, 0.5, 0.99])
def away(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(5).random(COUNT) < request.param


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu", "cpu"], ["meta tensors"]])
def test_exact_search_is_that_of_the_others_alone(
    sim_func: str, devices: list[str], away: np.ndarray, keys: np.ndarray, queries: np.ndarray
) -> None:
    if devices == ["meta tensors"]:
        devices = ["cpu"]
        keys = np.ascontiguousarray(keys.astype(np.float32))
    kept, removed = np.flatnonzero(~away), removed_of(away)
    k = min(20, len(kept))
    masked, alone = ExactSearch(keys, sim_func, devices, removed), ExactSearch(keys[kept], sim_func, devices)
    for _ in range(3):  # the second keeps keys in memory
        distances, entries = masked.search(queries, k)
        expected = alone.search(queries, k)
        assert distances.tobytes() == expected[0].tobytes() and (entries == kept[expected[1]]).all()
    assert np.allclose(masked.distances(queries, entries), distances, rtol=1e-4, atol=1e-3)


# Flat, IVF of all sorts, graphs, re-ranking, transforms, fast scans.
FACTORIES = [
    *(
        "Flat",
        "IVF8,Flat",
        "IVF8,SQ8",
        "IVF8,PQ4x4",
        "IVF8_HNSW,PQ4x4",
        "OPQ4,IVF8,PQ4x4",
        "PQ4x4",
        "SQ8",
        "HNSW16",
        "NSG16",
    ),
    *("IVF8,RaBitQ", "IVF8,RaBitQ4", "RR16,IVF8,RaBitQ", "IVF8,PQ4x4fs", "PQ8x4fs", "IVF8,RaBitQfs", "IVF8,RaBitQfs2"),
    *("HNSW16", "NSG16", "IVF8,PQ4x4fs,RFlat", "IVF8,PQ4x4,RFlat", "PCA8,IVF8,SQ4", "IDMap,Flat", "IVF8,SQfp16"),
]
CANNOT = {"PQ4x4", "PQ8x4fs", "NSG16"}


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_no_index_finds_what_does_not_count(factory: str, sim_func: str, keys: np.ndarray, queries: np.ndarray) -> None:
    away = np.random.default_rng(6).random(COUNT) < 0.3
    removed, vectors = removed_of(away), keys.astype(np.float32)
    index = make_index(factory, DIMENSION, sim_func)
    index.train(vectors)
    if factory.startswith("IDMap"):
        index.add_with_ids(vectors, np.arange(COUNT))
    else:
        index.add(vectors)
    for asked in (queries, queries[:3]):
        try:
            distances, entries = search(index, asked, 10, 8, removed)
        except UserError as error:
            print("CANNOT", factory, sim_func, error)
            assert factory in CANNOT and "compact_datastore" in str(error)
            return
        assert not removed.are_removed(entries).any()
        if factory.startswith("HNSW"):  # goes another way through the graph
            continue
        # With all lists, what is found is all that is found, less what does not count.
        set_probe(index, 8)
        every = search(index, asked, COUNT, 8)
        for row in range(len(asked)):
            counts = ~removed.are_removed(every[1][row]) & (every[1][row] >= 0)
            expected = every[0][row][counts][:10]
            if "RFlat" not in factory:
                assert np.allclose(distances[row], expected, rtol=1e-4, atol=1e-4), factory
        assert (entries >= 0).all()
