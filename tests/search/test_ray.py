"""Retrieval and index building on a real Ray cluster of two nodes: the same numbers, whatever dies on the way."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ray_here import two_nodes
from helpers.stores import make_store
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search import ray_retriever, ray_seats
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.ray_retriever import RayExactRetriever, RayRetriever
from knn_lm_eval.search.ray_shards import Shards
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.search.shard import Shard
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import file_record
from knn_lm_eval.system.ray_cluster import connect

ray = pytest.importorskip("ray", reason="needs Ray")
pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all
QUERIES = np.random.default_rng(3).standard_normal((64, 16)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with one CPU each, which this process has joined."""
    connect(two_nodes.address)
    yield two_nodes.address
    ray.shutdown()


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """A store with weights and indexes in two parts."""
    store = make_store(tmp_path_factory.mktemp("ray") / "store")
    np.save(store.path / "weights.npy", np.arange(1, len(store) + 1, dtype=np.int32))
    files = store.manifest.files | {"weights.npy": file_record(store.path / "weights.npy")}
    replace(store.manifest, files=files).write(store.path)
    store = Datastore.open(store.path)
    for name, factory in {"rabitq": "IVF16,RaBitQfs", "pq": "IVF16,PQ8"}.items():
        build_index(store, factory, name=name, parts=2, quality_queries=0)
    build_index(store, "Flat", sim_func="dot", name="dot", parts=2, quality_queries=0)
    build_index(store, "IVF16,RaBitQfs", name="whole", quality_queries=0)
    return store


@pytest.fixture(scope="module")
def opened(address: str, in_parts: Datastore) -> Callable[[str], tuple[Retriever, RayRetriever]]:
    """By index: the local retriever and that over Ray, whose shards take seconds to start."""

    @functools.cache
    def open_both(index: str) -> tuple[Retriever, RayRetriever]:
        settings = {"k": 5, "probe": 4, "index": index}
        return LocalRetriever(in_parts, **settings), RayRetriever(in_parts, address=address, **settings)

    return open_both


@pytest.fixture(scope="module")
def opened_exact(address: str, in_parts: Datastore) -> Callable[[str], tuple[ExactRetriever, RayExactRetriever]]:
    """The same without an index, by what near means."""

    @functools.cache
    def open_both(sim_func: str) -> tuple[ExactRetriever, RayExactRetriever]:
        return ExactRetriever(in_parts, 5, sim_func), RayExactRetriever(in_parts, 5, sim_func, address)

    return open_both


@pytest.fixture(scope="module")
def kept_shards() -> Callable[..., Shards]:
    """What opens shards, once for all who ask for the same."""
    kept: dict[str, Shards] = {}

    def open_shards(*asked: Any, **more: Any) -> Shards:
        name = repr((asked, more))
        if name not in kept:
            kept[name] = Shards(*asked, **more)
        return kept[name]

    return open_shards


@pytest.fixture
def with_kept_shards(kept_shards: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is opened here asks the shards that others asked before."""
    monkeypatch.setattr(ray_retriever, "Shards", kept_shards)


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory, store: Datastore) -> Datastore:
    """The tiny LM's store with clusters and an index in two parts."""
    folder = tmp_path_factory.mktemp("ray_text") / "store"
    shutil.copytree(store.path, folder, ignore=shutil.ignore_patterns("*.faiss", "index.json", "*.codes", "*kmeans*"))
    store = Datastore.open(folder)
    build_index(store, "IVF16,RaBitQfs", parts=2)
    cluster_kmeans(store, num_clusters=200, sample=2000)
    return store


def kill_during_a_search(retriever: RayRetriever, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> None:
    """Have the shard die while its queries are on their way: it is stopped from now on, or it might answer before."""
    seats = retriever.shards.seats
    ask = seats.ask
    pid = ray.get(seats.of_shards[number][0].actor.is_there.remote()).pid
    os.kill(pid, signal.SIGSTOP)

    def kill_and_ask(calls: dict) -> dict:
        monkeypatch.setattr(seats, "ask", ask)
        os.kill(pid, signal.SIGKILL)
        return ask(calls)

    monkeypatch.setattr(seats, "ask", kill_and_ask)


def test_parts_built_by_ray_equal_those_built_here(address: str, in_parts: Datastore) -> None:
    metadata = build_index(in_parts, "IVF16,RaBitQfs", name="by_ray", parts=2, ray=address, quality_queries=100)
    here = json.loads((in_parts.path / "rabitq.json").read_text())
    assert metadata["parts"] == here["parts"] and metadata["bytes"] == here["bytes"]
    assert metadata["quality"][-1]["recall"] > 0.5
    for number in range(2):
        files = [in_parts.path / f"{name}.{number:03d}.faiss" for name in ("by_ray", "rabitq")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_wrong_with_the_store_is_said_by_the_task(address: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    keys = np.load(store.path / "keys.npy", mmap_mode="r+")
    keys[2900, 5] = np.nan
    keys.flush()
    with pytest.raises(UserError, match="On a Ray node: .* hold NaN or infinity"):
        build_index(Datastore.open(store.path, verify="never"), "Flat", parts=2, ray=address)


def test_shards_lie_on_both_nodes(opened: Callable) -> None:
    _, retriever = opened("rabitq")
    actors = ray._private.state.actors()
    seats = [seat for seats in retriever.shards.seats.of_shards for seat in seats]
    nodes = {actors[seat.actor._actor_id.hex()]["Address"]["NodeID"] for seat in seats}
    assert len(nodes) == 2


@pytest.mark.parametrize("index", ["rabitq", "pq", "dot", "whole"])
@pytest.mark.parametrize("recompute_dists", [False, True])
@pytest.mark.parametrize("k", [50, 2000])  # the latter more than a part has
def test_neighbours_are_those_of_the_local_retriever(
    opened: Callable, index: str, recompute_dists: bool, k: int
) -> None:
    pair = opened(index)
    local, remote = (retriever.with_settings(k=k, recompute_dists=recompute_dists) for retriever in pair)
    assert remote.settings == local.settings and remote.probe == pair[1].probe
    for queries in (QUERIES, QUERIES[:1]):
        expected, found = local.search(torch.from_numpy(queries)), remote.search(torch.from_numpy(queries))
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert remote.statistics.searches == local.statistics.searches == 65
    assert remote.statistics.entries_compared == local.statistics.entries_compared


def test_another_probe_uses_the_same_shards(opened: Callable) -> None:
    local, remote = (retriever.with_settings(probe=1) for retriever in opened("rabitq"))
    assert local.probe == remote.probe == 1 and remote.shards is opened("rabitq")[1].shards
    for mine, theirs in zip(remote.find(QUERIES), local.find(QUERIES), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert remote.statistics.searches == 64


@pytest.mark.parametrize("index", ["rabitq", "pq", "dot"])
def test_distances_and_values_of_given_entries_come_from_their_shards(
    opened: Callable, in_parts: Datastore, index: str
) -> None:
    local, remote = opened(index)
    remote = remote.with_settings(probe=4)  # knows no values yet
    codes = CodeDistances.open(in_parts, remote.cpu_index, index)
    assert (codes is None) == (index == "dot")
    rng = np.random.default_rng(5)
    entries, counts = rng.integers(0, len(in_parts), (64, 70)), rng.integers(0, 71, 64)
    counts[0] = 0
    there = np.arange(70) < counts[:, None]
    assert not remote.values.any()
    found = remote.distances_to(codes)(QUERIES, entries, counts)
    np.testing.assert_array_equal(found[there], local.distances_to(codes)(QUERIES, entries, counts)[there])
    asked = np.unique(entries[there])
    np.testing.assert_array_equal(remote.values[asked], in_parts.values[asked])
    assert not np.delete(remote.values, asked).any()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"retomaton": True, "min_knns": 3, "clusters": "kmeans"},
        {"retomaton": True, "min_knns": 3, "recompute_dists": True},
    ],
)
@pytest.mark.usefixtures("with_kept_shards")
def test_an_evaluation_gives_the_same_numbers_though_a_shard_dies(
    address: str, text_store: Datastore, model_folder: Path, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"pretrained": str(model_folder), "datastore": text_store.path, "k": 30, "batch_size": 1, **settings}
    local, remote = KNNHF(**common), KNNHF(**common, retriever="ray", address=address)
    kill_during_a_search(remote.retriever, monkeypatch)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (EVAL_TEXT, EVAL_TEXT[100:250])]
    pairs = [Instance("loglikelihood", {}, (EVAL_TEXT[:40], EVAL_TEXT[40:90]), 0)]
    assert remote.loglikelihood_rolling(texts) == local.loglikelihood_rolling(texts)
    assert remote.loglikelihood(pairs) == local.loglikelihood(pairs)
    info = remote.get_model_info()["knn"]
    assert info["restarts"] == 1 and info["retriever"] == "ray" and info["address"] == address
    assert info["searches"] == local.get_model_info()["knn"]["searches"]


def test_a_shard_that_is_lost_for_good_ends_the_run(
    address: str, in_parts: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_seats, "RESTARTS", 0)
    retriever = RayRetriever(in_parts, k=5, index="whole", address=address)
    kill_during_a_search(retriever, monkeypatch)
    with pytest.raises(UserError, match=r"The shard with whole\.faiss \(Ray at .*, last on the node .*\) is lost"):
        retriever.find(QUERIES)


def test_a_shard_that_does_not_start_again_in_time_ends_the_run(
    address: str, in_parts: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = RayRetriever(in_parts, k=5, index="whole", address=address)
    expected = retriever.find(QUERIES)
    kill_during_a_search(retriever, monkeypatch)
    monkeypatch.setattr(ray_seats, "START_SECONDS", 0.001)  # importing faiss takes longer
    with pytest.raises(UserError, match=r"whole\.faiss .*: it has not started on any node within 0\.001 seconds"):
        retriever.find(QUERIES)
    monkeypatch.setattr(ray_seats, "START_SECONDS", 60.0)
    np.testing.assert_array_equal(retriever.find(QUERIES)[0], expected[0])
    assert retriever.statistics.restarts == 1


def test_with_replicas_a_run_goes_on_where_one_dies(
    address: str, in_parts: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = RayRetriever(in_parts, k=5, index="rabitq", address=address, replicas=2)
    seats = retriever.shards.seats.of_shards
    assert [len({seat.node.id for seat in of_shard}) for of_shard in seats] == [2, 2]
    expected = LocalRetriever(in_parts, k=5, index="rabitq").find(QUERIES)
    monkeypatch.setattr(ray_seats, "SILENT_SECONDS", 4.0)
    monkeypatch.setattr(ray_seats, "AVOID_SECONDS", 2.0)  # the one other node has the other replica
    stopped = ray.get(seats[0][1].actor.is_there.remote()).pid  # the first question to this shard goes there
    os.kill(stopped, signal.SIGSTOP)
    try:
        for _ in range(3):
            for mine, theirs in zip(retriever.find(QUERIES), expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)
    finally:
        os.kill(stopped, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while retriever.statistics.restarts == 0 and time.monotonic() < deadline:
        retriever.find(QUERIES)
    assert retriever.statistics.restarts == 1


def test_more_replicas_than_nodes_are_refused(address: str, in_parts: Datastore) -> None:
    with pytest.raises(UserError, match=r"replicas=3 takes as many nodes with a CPU, and the Ray cluster .* has 2"):
        RayRetriever(in_parts, k=5, index="rabitq", address=address, replicas=3)
    with pytest.raises(UserError, match="replicas=2 is for Ray"):
        KNNHF("none", datastore=in_parts.path, k=5, replicas=2)


def test_a_node_that_does_not_see_the_folder_says_so(in_parts: Datastore, tmp_path: Path) -> None:
    (part,) = LocalRetriever(in_parts, k=5, index="whole").parts
    with pytest.raises(UserError, match="The Ray node .* does not see the folder .*; put the datastore on a file sys"):
        Shard(tmp_path / "not_mounted", part, "whole", 1).lists()


def test_settings_that_ray_cannot_serve_are_refused(text_store: Datastore) -> None:
    with pytest.raises(UserError, match="retriever='spark' is unknown; use local or ray"):
        KNNHF("none", datastore=text_store.path, k=5, retriever="spark")
    with pytest.raises(UserError, match="knn_gpu=True is for the local retriever"):
        KNNHF("none", datastore=text_store.path, k=5, retriever="ray", knn_gpu=True)
    with pytest.raises(UserError, match="say in how many, with --parts"):
        build_index(text_store, "Flat", name="more", ray="auto")


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("k", [50, 2000])  # the latter more than a node has
def test_nodes_compare_all_keys_without_an_index(
    opened_exact: Callable, in_parts: Datastore, sim_func: str, k: int
) -> None:
    local, remote = (retriever.with_settings(k=k) for retriever in opened_exact(sim_func))
    expected, found = local.search(torch.from_numpy(QUERIES)), remote.search(torch.from_numpy(QUERIES))
    torch.testing.assert_close(found.distances, expected.distances, rtol=1e-6, atol=1e-6)
    # Each run's keys are centred by themselves, so equally near ones may change places by the last bit.
    same = found.entries == expected.entries
    assert same.float().mean() > 0.999 and torch.equal(found.values[same], expected.values[same])
    assert torch.equal(found.counts[same], expected.counts[same])
    assert remote.statistics.entries_compared == 64 * len(in_parts) and len(remote.shards.seats.of_shards) == 2
    entries, counts = np.arange(64 * 5).reshape(64, 5) * 9, np.arange(64) % 6
    there = np.arange(5) < counts[:, None]
    distances = [retriever.with_distances()[1](QUERIES, entries, counts)[there] for retriever in (remote, local)]
    np.testing.assert_allclose(*distances, rtol=1e-6)


@pytest.mark.usefixtures("with_kept_shards")
def test_an_evaluation_without_an_index_gives_the_same_over_ray(
    address: str, text_store: Datastore, model_folder: Path
) -> None:
    common = {"pretrained": str(model_folder), "datastore": text_store.path, "k": 30, "index": "exact"}
    texts = [Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)]
    for settings in ({}, {"retomaton": True, "min_knns": 3}):
        local, remote = (
            KNNHF(**common, **settings, **place) for place in ({}, {"retriever": "ray", "address": address})
        )
        assert remote.loglikelihood_rolling(texts)[0] == pytest.approx(local.loglikelihood_rolling(texts)[0], rel=1e-6)


def test_several_stores_have_shards_each(address: str, halves: list[Datastore], model_folder: Path) -> None:
    common = {"pretrained": str(model_folder), "datastore": [part.path for part in halves], "k": 30}
    texts = [Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)]
    for settings in ({"index": "exact"}, {"datastore_weights": "2+1"}):
        local, remote = (
            KNNHF(**common, **settings, **place) for place in ({}, {"retriever": "ray", "address": address})
        )
        assert remote.loglikelihood_rolling(texts)[0] == pytest.approx(local.loglikelihood_rolling(texts)[0], rel=1e-6)
        said = remote.get_model_info()["knn"]
        assert said["bytes_sent"] > 0 and [one["name"] for one in said["datastore"]["stores"]] == ["law", "wiki"]
