"""Retrievers with other settings over the same opened index: what they find, and what they leave alone."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.search import index_retriever as retriever_module
from knn_lm_eval.search.faiss_index import inverted_file, open_index, search, set_probe, vectors_compared
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore

QUERIES = np.random.default_rng(7).standard_normal((40, 16)).astype(np.float32) * 2
FACTORIES = [
    "IVF16,Flat",
    "IVF16,PQ8",
    "IVF16,SQ8",
    "IVF16,RaBitQ",
    "IVF16,RaBitQfs",
    "RR16,IVF16,RaBitQfs",
    "PCA8,IVF16,SQ8",
    "IVF16_HNSW8,Flat",
    "IVF16,PQ8x4fs,RFlat",
    "PCA8,IVF16,PQ4,Refine(SQ8)",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    store = make_store(tmp_path_factory.mktemp("retriever") / "store")
    for name, factory in {"flat": "Flat", "rabitq": "IVF16,RaBitQfs", "sq": "IVF16,SQ8"}.items():
        build_index(store, factory, name=name, quality_queries=0)
    return store


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Datastore]:
    """A datastore with an index of a factory string and so many parts."""

    @cache
    def indexed(factory: str, parts: int | None) -> Datastore:
        store = make_store(tmp_path_factory.mktemp("indexed") / "s")
        build_index(store, factory, parts=parts, quality_queries=0)
        return store

    return indexed


@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_probe_of_one_search_finds_what_a_set_one_does(indexed, factory: str, parts: int | None) -> None:
    index, _ = open_index(indexed(factory, parts))
    found = []
    for probe in (1, 3, 16, 1000):
        set_probe(index, 2)
        found.append(search(index, QUERIES, 50, probe))
        set_probe(index, probe)
        for array, expected in zip(found[-1], search(index, QUERIES, 50), strict=True):
            np.testing.assert_array_equal(array, expected)
    assert not np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("probe", [None, 3])
@pytest.mark.parametrize("factory", FACTORIES)
def test_faiss_is_given_no_more_queries_than_it_has_tables_for(
    indexed, factory: str, probe: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16,000 queries of 576 numbers at probe 64, which are 2.2 GiB, RaBitQfs in faiss 1.15 dies."""
    index, _ = open_index(indexed(factory, None))
    set_probe(index, 4)
    expected, compared = search(index, QUERIES, 50, probe), vectors_compared(index, len(QUERIES))
    calls, original = [], index.search
    monkeypatch.setattr(
        index, "search", lambda queries, *rest, **more: calls.append(len(queries)) or original(queries, *rest, **more)
    )
    width = inverted_file(index).d
    monkeypatch.setattr("knn_lm_eval.search.faiss_index.MOST_TABLE_BYTES", 4 * width * (probe or 4) * 7 + 1)
    distances, _ = search(index, QUERIES, 50, probe)
    np.testing.assert_allclose(distances, expected[0], rtol=1e-4)  # a transform of fewer queries rounds otherwise
    assert max(calls) == 7 and sum(calls) == len(QUERIES)
    assert vectors_compared(index, len(QUERIES)) == compared
    assert search(index, QUERIES[:0], 50, probe)[0].shape == (0, 50)


@pytest.mark.parametrize(
    "changes", [{"probe": 5}, {"probe": 1, "k": 7}, {"recompute_dists": True}, {"k": 300, "recompute_dists": True}]
)
def test_another_with_settings_is_as_one_opened_with_them(store: Datastore, changes: dict, monkeypatch) -> None:
    own = LocalRetriever(store, k=20, probe=3, index="rabitq")
    expected = LocalRetriever(store, **{"k": 20, "probe": 3, "index": "rabitq", **changes})
    before, settings = own.find(QUERIES), own.settings
    monkeypatch.setattr(retriever_module, "open_index", None)  # would fail if the index were opened again
    other = own.with_settings(**changes)
    assert other.settings == expected.settings != own.settings
    assert other.statistics.searches == 0
    for array, wanted in zip(other.find(QUERIES), expected.find(QUERIES), strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert other.statistics.entries_compared == expected.statistics.entries_compared
    assert own.settings == settings and own.statistics.searches == len(QUERIES)
    for array, wanted in zip(own.find(QUERIES), before, strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_settings_cannot_be_changed_from_outside(store: Datastore) -> None:
    retriever = LocalRetriever(store, k=20, index="rabitq")
    for name in ("k", "probe", "sim_func", "recompute_dists", "settings"):
        with pytest.raises(AttributeError):
            setattr(retriever, name, getattr(retriever, name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        retriever.settings.k = 3


def test_other_settings_are_checked_as_the_first_ones(store: Datastore) -> None:
    retriever = LocalRetriever(store, k=20, index="rabitq")
    with pytest.raises(UserError, match="k=3001 does not fit the datastore .* which has 3000 entries"):
        retriever.with_settings(k=3001)
    with pytest.raises(UserError, match="probe=0 must be at least 1"):
        retriever.with_settings(probe=0)
    exact = LocalRetriever(store, k=20, index="rabitq", sim_func="dot", recompute_dists=True)
    with pytest.raises(UserError, match="knn_sim_func=dot does not fit the index 'rabitq'"):
        exact.with_settings(recompute_dists=False)
    assert retriever.with_settings(probe=10**6).probe == 16
    assert LocalRetriever(store, k=20, index="flat").with_settings(probe=4).probe is None


def test_a_store_without_keys_has_no_exact_distances(store: Datastore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    without_keys = dataclasses.replace(Datastore.open(tmp_path / "store"), keys=None)
    retriever = LocalRetriever(without_keys, k=20, index="rabitq")
    with pytest.raises(UserError, match="has no keys, which recompute_dists=True needs"):
        retriever.with_settings(recompute_dists=True)


def test_an_automaton_without_codes_searches_with_another_retriever(store: Datastore) -> None:
    own = LocalRetriever(store, k=20, index="sq")
    _, searching = open_automaton(own, AutomatonSettings(k=20), None)
    assert searching.recompute_dists and not own.recompute_dists
    own = LocalRetriever(store, k=20, index="rabitq")
    assert open_automaton(own, AutomatonSettings(k=20), None)[1] is own


def test_a_search_has_its_probe_where_faiss_takes_tensors_as_well(store: Datastore) -> None:
    """The import of faiss.contrib.torch_utils, which the published code needs, cannot be undone: in a process apart."""
    source = """
import sys
import numpy as np
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.store.datastore import Datastore
retriever = LocalRetriever(Datastore.open(sys.argv[1]), 20, index="sq").with_settings(probe=2)
queries = np.random.default_rng(3).standard_normal((9, 16)).astype(np.float32)
before = retriever.find(queries)
import faiss.contrib.torch_utils
for array, expected in zip(retriever.find(queries), before):
    np.testing.assert_array_equal(array, expected)
"""
    subprocess.run([sys.executable, "-c", source, str(store.path)], check=True)
