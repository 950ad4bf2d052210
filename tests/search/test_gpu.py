"""Search, building, scoring and generation on GPUs give what CPUs give. Skipped where no GPU is visible."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.search import index_build, training
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.faiss_index import (
    GPU_MAX_K,
    _clone_to,
    faiss_gpus,
    join_parts,
    open_index,
    search,
    set_probe,
    to_gpus,
)
from knn_lm_eval.search.gpu_choice import obstacle_on_gpus
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.timing import StageTimer

needs_faiss_gpu = pytest.mark.skipif(not faiss_gpus(), reason="needs faiss-gpu and a GPU")
needs_two_gpus = pytest.mark.skipif(faiss_gpus() < 2, reason="needs faiss-gpu and two GPUs")
needs_torch_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch with CUDA and a GPU")


@pytest.fixture
def own_store(store: Datastore, tmp_path: Path) -> Datastore:
    """A copy without an index."""
    shutil.copytree(store.path, tmp_path / "store", ignore=shutil.ignore_patterns("index.*"))
    return Datastore.open(tmp_path / "store")


def queries_of(store: Datastore) -> np.ndarray:
    return store.keys[:200].astype(np.float32) + np.float32(0.01)


def assert_alike(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """The same neighbours at the same distances, but for what float16 rounds."""
    scale = np.abs(expected[0]).max()
    assert np.abs(np.sort(found[0]) - np.sort(expected[0])).max() < 0.02 * scale
    common = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found[1], expected[1], strict=True)]
    assert np.mean(common) > 0.9


@pytest.mark.parametrize(
    "factory", ["IVF16,Flat", "IVF16,RaBitQ", "IVF16,RaBitQfs", "IVF16_HNSW8,Flat", "PCA16,IVF16,SQ8"]
)
def test_building_as_on_gpus_gives_the_same_index(
    own_store: Datastore, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    """Everything but the GPU itself, in whose place a copy on the CPU stands."""
    build_index(own_store, factory, name="cpu", quality_queries=0)
    for module in (training, index_build):
        monkeypatch.setattr(module, "faiss_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", faiss.clone_index, raising=False)
    build_index(own_store, factory, name="gpu", quality_queries=0)
    cpu, gpu = open_index(own_store, "cpu")[0], open_index(own_store, "gpu")[0]
    for index in (cpu, gpu):
        set_probe(index, 4)
    expected, found = search(cpu, queries_of(own_store), 20), search(gpu, queries_of(own_store), 20)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)


@needs_faiss_gpu
@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8", "PCA16,IVF16,Flat"])
def test_search_on_gpus_agrees_with_the_cpu(own_store: Datastore, factory: str, sim_func: str) -> None:
    build_index(own_store, factory, sim_func=sim_func, quality_queries=0)
    cpu, gpu = (LocalRetriever(own_store, k=100, probe=8, gpu=on_gpu) for on_gpu in (False, True))
    assert gpu.on_gpus and not cpu.on_gpus
    assert_alike(gpu.find(queries_of(own_store)), cpu.find(queries_of(own_store)))


@needs_faiss_gpu
@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IVF16,SQ4", "IVF16,PQ8x4", "IVF16,PQ8x4fs", "IVF16_HNSW8,Flat"])
def test_what_is_said_to_go_on_gpus_does(own_store: Datastore, factory: str) -> None:
    build_index(own_store, factory, quality_queries=0)
    obstacle = obstacle_on_gpus(factory, own_store.dimension, "l2")
    assert LocalRetriever(own_store, k=10, gpu=True).on_gpus == (obstacle is None)


@needs_torch_gpu
@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_exact_search_on_a_gpu_is_that_of_the_cpu(own_store: Datastore, sim_func: str) -> None:
    cpu, gpu = (
        ExactRetriever(own_store, 100, sim_func, device).find(queries_of(own_store)) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu[0], cpu[0], rtol=1e-5, atol=1e-4)
    assert np.mean(gpu[1] == cpu[1]) > 0.99  # but for ties


@needs_torch_gpu
def test_keys_go_to_the_gpu_by_themselves(own_store: Datastore, model_folder: Path) -> None:
    lm = KNNHF(str(model_folder), datastore=own_store.path, k=20, lmbda=0.5, knn_gpu=True, index="exact")
    assert lm.get_model_info()["knn"]["searched_on"].startswith("gpu exact (")


@needs_faiss_gpu
def test_parts_of_an_index_search_on_gpus(own_store: Datastore) -> None:
    keys = own_store.keys.astype(np.float32)
    parts = []
    for begin in range(0, len(keys), 2000):
        parts.append(faiss.IndexFlatL2(keys.shape[1]))
        parts[-1].add(keys[begin : begin + 2000])
    index = join_parts(parts, relative_ids=True)
    expected = search(index, queries_of(own_store), 50)
    on_gpus = to_gpus(index, 50)
    assert on_gpus is not index
    assert_alike(search(on_gpus, queries_of(own_store), 50), expected)


@needs_two_gpus
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_shards_of_an_index_search_on_gpus(own_store: Datastore, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    build_index(own_store, factory, quality_queries=0)
    cpu = open_index(own_store)[0]
    set_probe(cpu, 8)
    clone = faiss.index_cpu_to_gpus_list

    def has_no_room_for_copies(index, options, gpus):
        if not options.shard:
            raise RuntimeError("Error: out of memory")
        return clone(index, options, gpus)

    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", has_no_room_for_copies)
    sharded = _clone_to(list(range(faiss_gpus())), cpu)
    assert_alike(search(sharded, queries_of(own_store), 50), search(cpu, queries_of(own_store), 50))


@needs_two_gpus
def test_each_process_of_a_launch_takes_its_own_gpu(own_store: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(own_store, "Flat", quality_queries=0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    on_gpu = to_gpus(open_index(own_store)[0], 10)
    assert isinstance(faiss.downcast_index(on_gpu), faiss.GpuIndexFlat) and on_gpu.getDevice() == 1


@needs_faiss_gpu
def test_types_without_a_gpu_version_stay_on_the_cpu(own_store: Datastore, caplog: pytest.LogCaptureFixture) -> None:
    build_index(own_store, "IVF16,RaBitQfs", quality_queries=0)
    retriever = LocalRetriever(own_store, k=10, gpu=True)
    assert not retriever.on_gpus and "cannot put IndexIVFRaBitQFastScan on GPUs" in caplog.text


@needs_faiss_gpu
def test_more_neighbours_than_gpus_find_are_refused(own_store: Datastore) -> None:
    build_index(own_store, "Flat", quality_queries=0)
    with pytest.raises(UserError, match=f"k={GPU_MAX_K + 1} is more than faiss finds on GPUs"):
        LocalRetriever(own_store, k=GPU_MAX_K + 1, gpu=True)
    LocalRetriever(own_store, k=GPU_MAX_K, gpu=True).find(queries_of(own_store)[:3])


@needs_faiss_gpu
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,RaBitQ", "IVF16,RaBitQfs"])
def test_an_index_trained_and_filled_with_gpus_is_as_good(own_store: Datastore, factory: str) -> None:
    with_gpus = build_index(own_store, factory, name="gpu", k=50)
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, index_build):
            patch.setattr(module, "faiss_gpus", lambda: 0)
        without = build_index(own_store, factory, name="cpu", k=50)
    assert with_gpus["quality"][-1]["recall"] > without["quality"][-1]["recall"] - 0.03


@needs_faiss_gpu
def test_kmeans_clusters_on_gpus_hold_each_entry_once(own_store: Datastore) -> None:
    cluster_kmeans(own_store, num_clusters=50, sample=2000)
    clusters = Clusters.open(own_store)
    assert sorted(clusters.members.tolist()) == list(range(len(own_store)))


@needs_torch_gpu
def test_reading_ahead_on_a_gpu_changes_no_score(store: Datastore, model_folder: Path) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cuda")
    assert lm.scorer.reader.reads_ahead
    texts = [EVAL_TEXT, TRAIN_TEXT[300:900], EVAL_TEXT[100:350]]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    ahead = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    lm.scorer.reader.reads_ahead = False
    assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(ahead, rel=1e-6)
    cpu = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cpu")
    assert cpu.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(ahead, rel=1e-3)
    assert all(lm.scorer.seconds[stage] > 0 for stage in ("forward", "head", "mixture"))


@needs_torch_gpu
def test_a_stage_on_a_gpu_is_timed_to_its_end() -> None:
    timer = StageTimer(("launched", "waiting"), torch.device("cuda"))
    matrix = torch.ones(4096, 4096, device="cuda")
    with timer("launched"):
        for _ in range(50):
            matrix = (matrix @ matrix).clamp(max=1)
    with timer("waiting"):
        float(matrix.sum())
    seconds = timer.seconds
    assert seconds["launched"] > 10 * seconds["waiting"] > 0


@needs_torch_gpu
@pytest.mark.parametrize("settings", [{}, {"retomaton": True, "min_knns": 2}])
def test_generation_on_a_gpu_is_that_of_the_cpu(store: Datastore, model_folder: Path, settings: dict) -> None:
    texts = []
    for device in ("cpu", "cuda"):
        lm = KNNHF(str(model_folder), datastore=store.path, k=20, lmbda=0.5, device=device, **settings)
        asked = (EVAL_TEXT[:100], {"max_gen_toks": 12, "until": []})
        texts.append(lm.generate_until([Instance("generate_until", {}, asked, 0)], disable_tqdm=True))
        assert lm.mixed_forward.work.seconds["forward"] > 0
    assert texts[0] == texts[1]


@needs_torch_gpu
def test_a_dump_on_a_gpu_is_that_of_the_cpu(tmp_path: Path, store: Datastore, model_folder: Path) -> None:
    lm = CausalHFLM(str(model_folder), device="cuda")
    pieces = cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "line")
    dumped = dump_datastore(lm, pieces, tmp_path / "gpu")
    np.testing.assert_array_equal(dumped.values, store.values)
    np.testing.assert_allclose(dumped.keys, store.keys, rtol=1e-2, atol=1e-2)
