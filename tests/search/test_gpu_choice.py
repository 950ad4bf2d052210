"""Where knn_gpu=True searches, for every combination of what can be at hand; needs no GPU."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.pretended_gpu import GPU, pretended_gpu

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.model.opening import open_augmentation
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.search import gpu_choice
from knn_lm_eval.search.choosing import Budget, estimated_bytes
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.gpu_choice import (
    CPU,
    IN_MEMORY,
    INDEX,
    STREAMED,
    WORKING_BYTES,
    Gpus,
    IndexAtHand,
    choose_gpu_factory,
    choose_place,
    obstacle_on_gpus,
)
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index

SMALL, LARGE, MEMORY = 2**30, 2**37, 2**34
FREE: list[tuple[int, ...]] = [(), (SMALL,), (MEMORY,), (MEMORY,) * 7, (MEMORY,) * 10, (MEMORY, SMALL)]
FAISS = [0, 1, 2]
KEYS, KS = [None, SMALL, LARGE], [1024, 2048, 2049]
INDEXES = [None, *(IndexAtHand(size, obstacle) for size in (SMALL, LARGE) for obstacle in (None, "no such type"))]


@pytest.mark.parametrize(("free", "faiss_count"), list(itertools.product(FREE, FAISS)))
def test_the_first_place_that_can_be_is_taken(free: tuple[int, ...], faiss_count: int) -> None:
    for keys, index, k in itertools.product(KEYS, INDEXES, KS):
        can = {
            IN_MEMORY: bool(free)
            and keys is not None
            and all(of_one >= keys / len(free) + WORKING_BYTES for of_one in free),
            INDEX: bool(
                index
                and faiss_count
                and index.obstacle is None
                and k <= 2048
                and (not free or min(free) * faiss_count >= index.bytes + WORKING_BYTES)
            ),
            STREAMED: bool(free) and keys is not None,
            CPU: True,
        }
        choice = choose_place(Gpus(free, faiss_count), keys, index, k)
        assert choice.place == next(place for place, possible in can.items() if possible)
        assert choice.reason and "\n" not in choice.reason


def test_reasons_name_what_stood_in_the_way() -> None:
    index = IndexAtHand(SMALL, "faiss has no IndexIVFRaBitQ on GPUs")
    assert choose_place(Gpus((), 0), LARGE, None, 10).reason == (
        "PyTorch has no GPU to compare keys on; there is no index to search"
    )
    assert choose_place(Gpus((MEMORY, SMALL), 1), LARGE, None, 10).reason.startswith(
        "the keys, 131,072 MiB, do not fit in 2 GPUs with 1,024 MiB free on each; "
    )
    assert choose_place(Gpus((MEMORY,), 1), LARGE, index, 10).reason == (
        "the keys, 131,072 MiB, do not fit in the GPU's 16,384 MiB that are free; faiss has no IndexIVFRaBitQ on GPUs"
    )
    able = IndexAtHand(SMALL, None)
    assert "faiss sees no GPU (faiss-gpu needed)" in choose_place(Gpus((MEMORY,), 0), None, able, 10).reason
    assert "k=2049 is more than faiss finds on GPUs, 2048" in choose_place(Gpus((MEMORY,), 1), None, able, 2049).reason


@pytest.mark.parametrize(
    ("factory", "obstacle"),
    [
        ("Flat", None),
        ("IVF16,Flat", None),
        ("PCA32,IVF16,Flat", None),
        ("OPQ64,IVF16,PQ64", None),
        ("IVF16,PQ96", None),
        ("IVF16,SQ8", None),
        ("IVF16,SQ4", None),
        ("IVF16,SQfp16", None),
        ("RR192,IVF16,RaBitQ", "no IndexIVFRaBitQ on GPUs"),
        ("RR192,IVF16,RaBitQfs", "no IndexIVFRaBitQFastScan on GPUs"),
        ("IVF16,PQ64x4fs", "no IndexIVFPQFastScan on GPUs"),
        ("IVF16,PQ64x4", "have 8 bits, and not 4"),
        ("IVF16,PQ6", "no product quantizer of 6 bytes"),
        ("IVF16,PQ192", "no product quantizer of 192 bytes"),
        ("IVF16,SQ6", "of 4, 8 and 16 bits"),
        ("IVF16_HNSW32,Flat", "no lists found by IndexHNSWFlat"),
        ("HNSW32", "no IndexHNSWFlat on GPUs"),
        ("IVF16,PQ64,RFlat", "no IndexRefineFlat on GPUs"),
        ("PQ64", "no IndexPQ on GPUs"),
    ],
)
@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_which_indexes_faiss_has_on_gpus(factory: str, obstacle: str | None, sim_func: str) -> None:
    found = obstacle_on_gpus(factory, 192, sim_func)
    assert found is None if obstacle is None else found is not None and obstacle in found


def test_what_faiss_does_not_know_it_may_try() -> None:
    assert obstacle_on_gpus("somebody's own", 192, "l2") is None


def opened(store: Datastore, **settings: object) -> ExactRetriever | LocalRetriever:
    given = {"datastore": store.path, "k": 20, "lmbda": 0.5, "knn_temp": 4.0, "knn_gpu": True} | settings
    return open_augmentation(RetrievalSettings(**given)).retriever  # type: ignore[arg-type, return-value]


def test_without_a_gpu_the_cpu_searches_and_says_so(store: Datastore, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "knn_lm_eval"):
        patch.setattr(gpu_choice.torch.cuda, "is_available", lambda: False)
        patch.setattr(gpu_choice, "faiss_gpus", lambda: 0)
        with_index, without = opened(store), opened(store, index="exact")
    assert isinstance(with_index, LocalRetriever) and isinstance(without, ExactRetriever)
    assert without.searched_on.startswith("cpu (") and not with_index.on_gpus
    assert with_index.searched_on == "cpu (PyTorch has no GPU to compare keys on; faiss sees no GPU (faiss-gpu needed))"
    assert (
        "knn_gpu=True searches on: cpu (PyTorch has no GPU to compare keys on; there is no index to search)"
        in caplog.text
    )


def test_keys_go_to_a_gpu_unless_an_index_is_named(store: Datastore, model_folder: Path) -> None:
    with pretended_gpu():
        exact = opened(store)
        assert isinstance(exact, ExactRetriever) and exact.devices == [GPU] and exact.on_gpus
        assert exact.searched_on.startswith("gpu exact (the keys, ")
        named = opened(store, index="index")
        assert isinstance(named, LocalRetriever) and named.searched_on.startswith("cpu (there are no keys")
        lm = KNNHF(str(model_folder), datastore=store.path, k=20, lmbda=0.5, knn_gpu=True, device="cuda")
        assert lm.get_model_info()["knn"]["searched_on"] == exact.searched_on


def test_the_gpus_that_are_used_count() -> None:
    with pretended_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_choice.torch.cuda, "device_count", lambda: 3)
        patch.setattr(gpu_choice.torch.cuda, "mem_get_info", lambda device: (10 + torch.device(device).index, 99))
        assert gpu_choice.visible_gpus().free == (10, 11, 12)
        patch.setenv("LOCAL_RANK", "4")
        assert gpu_choice.visible_gpus().free == (11,)
        assert gpu_choice.visible_gpus("cpu+cuda:0").free == (10,)
    assert gpu_choice.visible_gpus("cpu").free == ()


def test_keys_that_do_not_fit_are_streamed(store: Datastore) -> None:
    with pretended_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_choice, "visible_gpus", None)
        patch.setattr("knn_lm_eval.model.opening.visible_gpus", lambda knn_device: Gpus((2**20,), 0))
        streamed = opened(store)
    assert isinstance(streamed, ExactRetriever) and streamed.searched_on.startswith("gpu exact streamed (the keys, ")
    assert "faiss sees no GPU" in streamed.searched_on


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("dimension", [16, 24, 100, 576, 768, 1024, 4096, 8192])
@pytest.mark.parametrize("count", [5000, 10**6, 117 * 10**6])
def test_an_index_for_a_gpu_fits_there_and_takes_what_there_is(count: int, dimension: int, sim_func: str) -> None:
    chosen, sizes = [], []
    for gib in (200, 80, 24, 16, 8, 6):
        try:
            factory = choose_gpu_factory(count, dimension, sim_func, gib * 2**30)
        except UserError as error:
            assert "bytes per entry" in str(error)
            break
        assert obstacle_on_gpus(factory, dimension, sim_func) is None
        size = count * estimated_bytes(factory, count, dimension, sim_func)
        assert size + WORKING_BYTES <= gib * 2**30
        chosen.append(factory)
        sizes.append(size)
    assert chosen and sizes == sorted(sizes, reverse=True)
    if dimension <= 768:
        assert chosen[0].endswith("SQ8")


def test_what_is_chosen_for_some_gpus() -> None:
    wikitext = 117 * 10**6, 1024, "l2"
    assert choose_gpu_factory(*wikitext, 200 * 2**30) == "IVF32768,SQ8"
    assert choose_gpu_factory(*wikitext, 80 * 2**30) == "IVF32768,SQ4"
    assert choose_gpu_factory(*wikitext, 16 * 2**30) == "OPQ64,IVF32768,PQ64"
    assert choose_gpu_factory(*wikitext, 80 * 2**30, Budget(bytes_per_entry=45)) == "OPQ32,IVF32768,PQ32"
    with pytest.raises(UserError, match="the smallest, OPQ16,IVF32768,PQ16, takes 27"):
        choose_gpu_factory(*wikitext, 3 * 2**30)


def test_without_a_gpu_its_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choice.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu_memory"):
        choose_gpu_factory(10**6, 64, "l2", None)
    with pretended_gpu():
        assert choose_gpu_factory(10**6, 64, "l2", None) == "IVF4096,SQ8"


def test_an_index_for_a_gpu_is_built(store: Datastore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store", ignore=shutil.ignore_patterns("index.*"))
    own = Datastore.open(tmp_path / "store")
    metadata = build_index(own, hardware="gpu", gpu_memory=2**33, quality_queries=64, k=20)
    assert metadata["factory"] == "IVF256,SQ8"
    assert LocalRetriever(own, k=20).find(own.keys[:5].astype("float32"))[1][:, 0].tolist() == [0, 1, 2, 3, 4]
    for arguments, words in [
        ({"factory": "IVF16,RaBitQ", "hardware": "gpu"}, "IVF16,RaBitQ is no index for a GPU: faiss has no"),
        ({"gpu_memory": 2**33}, "add --for gpu"),
        ({"hardware": "tpu"}, "use cpu or gpu"),
    ]:
        with pytest.raises(UserError, match=words):
            build_index(own, name="other", **arguments)  # type: ignore[arg-type]
