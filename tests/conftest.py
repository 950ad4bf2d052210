"""A tiny random LM with a tokenizer of its own, and a datastore made with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side; threads would only get in each other's way

from helpers.hub_server import Hub, hub_server
from helpers.ray_here import two_nodes
from helpers.real_model import FirstRun, make_first_run
from helpers.stores import part_of
from helpers.tiny_model import TRAIN_TEXT, make_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.files import CACHE_VARIABLE


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for this run alone: what was verified here is nobody else's business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, which this process takes for the Hugging Face hub."""
    with hub_server(tmp_path / "hub") as hub:
        hub.patch(monkeypatch)
        yield hub


@pytest.fixture
def ray_address() -> str:
    """Of a cluster of two nodes with one CPU each, for the tests of the xdist group ``ray``: one for all."""
    pytest.importorskip("ray", reason="needs Ray")
    return two_nodes.address


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Ends that cluster behind the last of them, for it takes time while it is there."""
    group = None if nextitem is None else nextitem.get_closest_marker("xdist_group")
    if group is None or group.args != ("ray",):
        two_nodes.end()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TRAIN_TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text(TRAIN_TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def lm(model_folder: Path) -> CausalHFLM:
    return CausalHFLM(str(model_folder), device="cpu", batch_size=3)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    """With the real model; for tests that are marked with NEEDS_REAL_MODEL."""
    return make_first_run(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path) -> Datastore:
    """A finished datastore with an exact index. Tests that change a store copy its folder first."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    store = dump_datastore(
        lm,
        cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "line"),
        folder,
        model_args={"pretrained": str(model_folder)},
    )
    build_index(store, "Flat")
    return store


@pytest.fixture(scope="session")
def clustered(store: Datastore) -> Datastore:
    """The same, with k-means clusters."""
    cluster_kmeans(store, num_clusters=200, sample=2000)
    return store


@pytest.fixture(scope="session")
def whole(store: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """The same without an index."""
    return part_of(store, tmp_path_factory.mktemp("several") / "whole", 0, len(store.document_starts))


@pytest.fixture(scope="session")
def halves(store: Datastore, whole: Datastore) -> list[Datastore]:
    """The same documents in two stores, ``law`` and ``wiki``, each with an exact index and clusters."""
    folder, documents = whole.path.parent, len(store.document_starts)
    middle = documents // 3
    parts = [part_of(store, folder / "law", 0, middle), part_of(store, folder / "wiki", middle, documents)]
    for part in parts:
        build_index(part, "Flat")
        cluster_kmeans(part, num_clusters=60, sample=1000)
    return [Datastore.open(part.path) for part in parts]
