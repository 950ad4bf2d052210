"""Retrieval from a store without an index: which search is chosen, what it finds, and what it says it costs."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pretended_gpu import GPU, pretended_gpu
from helpers.stores import make_store
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance
from lm_eval.utils import simple_parse_args_string

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.model import search_cost
from knn_lm_eval.search import exact_retriever
from knn_lm_eval.search.exact_retriever import ExactRetriever, find_devices
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import searched_index

TEXTS = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (EVAL_TEXT, EVAL_TEXT[100:250])]


@pytest.fixture
def without_index(clustered: Datastore, tmp_path: Path) -> Datastore:
    """A copy whose manifest, too, knows of no index."""
    shutil.copytree(
        clustered.path, tmp_path / "store", ignore=shutil.ignore_patterns("*.faiss", "index.json", "*.codes")
    )
    manifest = Datastore.open(tmp_path / "store").manifest
    for name in [name for name in manifest.derived if name.startswith("index.")]:
        del manifest.derived[name]
    manifest.write(tmp_path / "store")
    return Datastore.open(tmp_path / "store")


def open_lm(model_folder: Path, store: Datastore, **settings) -> KNNHF:
    return KNNHF(pretrained=str(model_folder), datastore=store.path, k=40, batch_size=2, params=False, **settings)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_neighbours_are_those_of_a_flat_index(tmp_path: Path, sim_func: str) -> None:
    store = make_store(tmp_path / "s")
    exact = ExactRetriever(store, 30, sim_func)
    assert exact.factory == "exact" and exact.kind_of_distances == "exact" and exact.first_of_more_are_fewer
    queries = np.random.default_rng(3).standard_normal((50, 16)).astype(np.float32)
    found = exact.search(torch.from_numpy(queries))
    build_index(store, "Flat", sim_func=sim_func, quality_queries=0)
    expected = LocalRetriever(Datastore.open(store.path), 30).search(torch.from_numpy(queries))
    torch.testing.assert_close(found.distances, expected.distances, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.entries, expected.entries) and torch.equal(found.values, expected.values)
    assert exact.statistics.searches == 50 and exact.statistics.entries_compared == 50 * len(store)


def test_few_keys_stay_in_memory_and_are_counted(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    retriever, queries = ExactRetriever(store, 30), np.ones((2, 16), np.float32)
    held = []
    for _ in range(3):
        held.append(retriever.bytes_held)
        retriever.find(queries)
    assert held == [0, 0, 4 * len(store) * (16 + 1)]  # and half a squared length


def test_settings_of_one_retriever_leave_the_other_alone(tmp_path: Path) -> None:
    retriever = ExactRetriever(make_store(tmp_path / "s"), 30)
    fewer = retriever.with_settings(k=7, probe=3)
    queries = np.ones((2, 16), np.float32)
    assert (
        fewer.probe is None and fewer.find(queries)[1].shape == (2, 7) and retriever.find(queries)[1].shape == (2, 30)
    )
    np.testing.assert_array_equal(fewer.find(queries)[1], retriever.find(queries)[1][:, :7])
    with pytest.raises(UserError, match="k=4000 does not fit"):
        retriever.with_settings(k=4000)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lmbda": 0.5, "knn_temp": 3, "knn_sim_func": "dot"},
        {"retomaton": True, "min_knns": 3},
        {"retomaton": True, "clusters": "kmeans"},
    ],
)
def test_a_store_without_an_index_is_evaluated_exactly(
    clustered: Datastore, without_index: Datastore, model_folder: Path, settings: dict
) -> None:
    with_index = {"recompute_dists": True} if settings.get("knn_sim_func") else {}
    if with_index:  # the Flat index ranks by l2
        build_index(without_index, "Flat", sim_func="dot", name="dot", quality_queries=0)
        by_index = open_lm(model_folder, without_index, index="dot", **settings)
        exact = open_lm(model_folder, without_index, index="exact", **settings)
    else:
        by_index, exact = (open_lm(model_folder, of, **settings) for of in (clustered, without_index))
    assert isinstance(exact.retriever, ExactRetriever)
    for mine, other in zip(exact.loglikelihood_rolling(TEXTS), by_index.loglikelihood_rolling(TEXTS), strict=True):
        assert float(mine) == pytest.approx(float(other), rel=1e-5)
    told = exact.get_model_info()["knn"]
    assert told["index"] == told["index_factory"] == "exact" and told["index_bytes"] == 0
    assert told["distances"] == "exact" and told["memory"]["keys_on_disk"] == without_index.keys.nbytes


def test_which_index_is_searched(store: Datastore, without_index: Datastore) -> None:
    def chosen(of: Datastore, name: str | None) -> str | None:
        return searched_index(of.path, of.manifest.derived, name)

    assert chosen(store, None) == "index" and chosen(store, "exact") is None and chosen(store, "other") == "other"
    assert chosen(without_index, None) is None and chosen(without_index, "index") == "index"
    # Where an index is meant, its loss or another's name is no reason to go without.
    build_index(without_index, "IVF16,PQ4", name="pq", quality_queries=0)
    assert chosen(Datastore.open(without_index.path), None) == "index"
    (without_index.path / "pq.json").unlink()
    (without_index.path / "pq.faiss").rename(without_index.path / "index.faiss")
    assert chosen(without_index, None) == "index"


def test_a_lost_index_is_not_passed_over(store: Datastore, tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(store.path, tmp_path / "s", ignore=shutil.ignore_patterns("index.faiss", "index.json"))
    with pytest.raises(UserError, match="no index called 'index': build one .* or compare all keys with index=exact"):
        open_lm(model_folder, Datastore.open(tmp_path / "s"))


def test_no_index_can_be_called_exact_but_an_old_one_that_is_still_opens(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with pytest.raises(UserError, match="'Exact' cannot name an index: it stands for search without one"):
        build_index(store, "Flat", name="Exact")
    build_index(store, "Flat", name="old", quality_queries=0)
    for ending in ("faiss", "json"):
        (store.path / f"old.{ending}").rename(store.path / f"exact.{ending}")
    assert searched_index(store.path, {}, "exact") == "exact"


def test_a_store_without_keys_and_index_is_refused(without_index: Datastore) -> None:
    with pytest.raises(UserError, match="has no keys, which exact search, as where a store has no index, needs"):
        ExactRetriever(dataclasses.replace(without_index, keys=None), 5)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta:x", "cpu+gpu", "cpu+"])
def test_an_unknown_device_is_named(without_index: Datastore, model_folder: Path, device: str) -> None:
    with pytest.raises(
        UserError, match=rf"knn_device={re.escape(device)} cannot be used here \([^\n]*\); give [^\n]*\.$"
    ):
        open_lm(model_folder, without_index, knn_device=device)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_several_devices_find_what_one_finds(tmp_path: Path, sim_func: str) -> None:
    store = make_store(tmp_path / "s")
    queries = np.random.default_rng(3).standard_normal((50, 16)).astype(np.float32)
    expected = ExactRetriever(store, 30, sim_func, "cpu").find(queries)
    several = ExactRetriever(store, 30, sim_func, "cpu+cpu+cpu")
    assert len(several.devices) == 3 and several.searched_on == "cpu+cpu+cpu" and not several.on_gpus
    for found, of_one in zip(several.find(queries), expected, strict=True):
        np.testing.assert_array_equal(found, of_one)
    with pretended_gpu() as gpu:
        mixed = ExactRetriever(store, 30, sim_func, simple_parse_args_string("k=3,knn_device=cpu+cuda")["knn_device"])
        assert mixed.on_gpus
        distances, entries = mixed.find(queries)
        assert gpu.ran["aten::mm"] > 0
    np.testing.assert_array_equal(entries, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-6)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_given_entries_have_the_distances_that_a_search_found(tmp_path: Path, sim_func: str) -> None:
    """On a pretended GPU, which has the keys after the search; slots beyond a row's count are not looked at."""
    store = make_store(tmp_path / "s")
    queries = np.random.default_rng(3).standard_normal((9, 16)).astype(np.float32)
    counts = np.arange(9)
    with pretended_gpu():
        retriever, distances_to = ExactRetriever(store, 30, sim_func, "cuda").with_distances()
        found, entries = retriever.find(queries)
        is_filled = np.arange(30) < counts[:, None]
        given = distances_to(queries, np.where(is_filled, entries, 10**9), counts)
    np.testing.assert_allclose(given[is_filled], found[is_filled], rtol=1e-6)


def test_all_gpus_compare_or_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pretended_gpu():
        assert find_devices(None) == [GPU]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        assert [device.index for device in find_devices(None)] == [0, 1, 2]
        monkeypatch.setenv("LOCAL_RANK", "4")
        assert [device.index for device in find_devices(None)] == [1]
        monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_devices(None) == [torch.device("cpu")]


def test_what_exact_search_costs_is_said_where_it_is_more_than_the_lm(
    without_index: Datastore, model_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for microseconds, is_said in ((1e9, True), (1e-9, False)):
        caplog.clear()
        monkeypatch.setattr(ExactRetriever, "microseconds", lambda self, queries, value=microseconds: value)
        with caplog.at_level(logging.WARNING):
            open_lm(model_folder, without_index)
        assert ("Exact search among" in caplog.text) == is_said
        assert ("knn-lm-eval build_index --datastore" in caplog.text) == is_said
    caplog.clear()
    monkeypatch.setattr(search_cost, "_lm_microseconds", lambda *arguments: pytest.fail("nothing is searched"))
    open_lm(model_folder, without_index, lmbda=0)


def test_the_cost_of_all_keys_is_thought_on_from_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = ExactRetriever(make_store(tmp_path / "s", count=4000, dimension=16), 10)
    clock = iter(np.cumsum([0, 0, 0.3, 0, 0.5]).tolist()[1:])  # 0.3 s for 1,000 keys, 0.5 s for 2,000
    monkeypatch.setattr(exact_retriever, "SAMPLE_BYTES", 2000 * 16 * 2)
    monkeypatch.setattr(exact_retriever.time, "perf_counter", lambda: next(clock))
    # 0.1 s + 0.2 s for each 1,000, of which there are 4: 0.9 s for 8 queries.
    assert retriever.microseconds(8) == pytest.approx(1e6 * 0.9 / 8)
