"""What lies on disk while something is unfinished: files and names of version 0.1.0, which later ones go on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_model import TRAIN_TEXT

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Reader
from knn_lm_eval.make import merging
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.confidence import lm_log_probs
from knn_lm_eval.make.dump import Dump
from knn_lm_eval.make.key_reading import KeyReader
from knn_lm_eval.make.pruning import prune_greedy_merge
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.search import indexing
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system import checkpoints
from knn_lm_eval.system.files import write_json


@pytest.fixture
def own_store(store: Datastore, tmp_path: Path, monkeypatch) -> Datastore:
    """A store of one's own; whatever is done with it is saved after each chunk of 500 keys."""
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 500)
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 500)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(indexing, "CHECKPOINT_SECONDS", -1)
    shutil.copytree(store.path, tmp_path / "store", ignore=shutil.ignore_patterns("clusters", "lm_log_probs*"))
    return Datastore.open(tmp_path / "store")


@pytest.fixture
def stop(monkeypatch) -> Callable[..., None]:
    """Run something until a function is called once too often."""

    def run(owner: Any, name: str, calls: int, work: Callable[[], object]) -> None:
        called, original = [], getattr(owner, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            called.append(name)
            if len(called) > calls:
                raise KeyboardInterrupt
            return original(*arguments, **more)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, counted)
            work()

    return run


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_of_a_dump(lm: CausalHFLM, tmp_path: Path, stop) -> None:
    dump = Dump(lm, tmp_path, batch_size=1, max_length=16, stride=12)
    dump.prepare(cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "line"), resume=False)
    stop(KeyReader, "of_chunk", 3, lambda: dump.write_share(1, 2))
    names = {"progress.json", "progress.1.json", "keys.npy.part", "values.npy", "document_starts.npy"}
    assert {path.name for path in tmp_path.iterdir()} == names
    progress = read(tmp_path / "progress.json")
    assert list(progress) == ["settings", "key_module", "fingerprint", "runs_done"] and progress["runs_done"] == []
    assert list(progress["settings"]) == ["key_type", "windows", "max_tokens", "source", "model"]
    ((begin, end),) = read(tmp_path / "progress.1.json")["runs_done"]
    assert read(tmp_path / "progress.1.json") == {"runs_done": [[begin, end]]} and begin < end
    Dump(lm, tmp_path, batch_size=1, max_length=16, stride=12).prepare([], resume=True)
    assert read(tmp_path / "progress.json") == progress | {"runs_done": [[begin, end]]}
    assert not (tmp_path / "progress.1.json").exists()


def test_of_a_clustering(own_store: Datastore, stop) -> None:
    stop(key_stream, "finite_keys", 3, lambda: cluster_kmeans(own_store, num_clusters=9, sample=400, iterations=2))
    folder = own_store.path / "clusters" / "kmeans"
    names = {"progress.json", "centroids.npz.part", "entries.npz.part", "entries.npy.part"}
    assert {path.name for path in folder.iterdir()} == names
    settings = {"method": "kmeans", "num_clusters": 9, "sample": 400, "iterations": 2, "seed": 1}
    assert read(folder / "progress.json") == {"settings": settings | {"keys_sha256": own_store.keys_checksum}}
    with np.load(folder / "centroids.npz.part") as state:
        assert state["centroids"].shape == (9, 32) and state["iterations"] == 2
    with np.load(folder / "entries.npz.part") as state:
        assert state["done"] == 1000
    numbers = np.load(folder / "entries.npy.part")
    assert (numbers[:1000] >= 0).all() and (numbers[1000:] < 0).all()


def test_of_a_merging(own_store: Datastore, tmp_path: Path, stop) -> None:
    stop(merging, "search", 2, lambda: prune_greedy_merge(own_store, tmp_path / "small", neighbours=4))
    folder = tmp_path / ".small.merging"
    assert {path.name for path in folder.iterdir()} == {"progress.json", "entries.npz.part", "entries.npy.part"}
    how = {"method": "greedy_merge", "neighbours": 4, "index": "index", "factory": "Flat", "probe": None}
    assert read(folder / "progress.json") == {"settings": how | {"keys_sha256": own_store.keys_checksum}}


@pytest.mark.parametrize("parts", [None, 3])
def test_of_an_index(own_store: Datastore, stop, parts: int | None) -> None:
    chunks = -(-len(own_store) // 500)  # which the training reads
    work = {"factory": "IVF4,SQ8", "name": "other", "parts": parts, "quality_queries": 0}
    if parts is None:
        stop(key_stream, "finite_keys", chunks + 2, lambda: build_index(own_store, **work))
    else:
        stop(indexing, "_write_segment", 2, lambda: build_index(own_store, **work))
    names = {"other.faiss.part", "other.faiss.part.json"}
    names |= {"other.000.faiss.part", "other.001.faiss.part"} if parts else set()
    assert {path.name for path in own_store.path.glob("other*")} == names
    state = read(own_store.path / "other.faiss.part.json")
    assert list(state) == ["settings", "seconds", "segment"] and list(state["seconds"]) == ["train"]
    settings = {"factory": "IVF4,SQ8", "sim_func": "l2", "seed": 1, "train_sample": None}
    settings |= {"keys_sha256": own_store.keys_checksum} | ({"parts": 3} if parts else {})
    assert state["settings"] == settings
    build_index(own_store, resume=True, **work)
    assert not list(own_store.path.glob("other*part*"))


def test_of_an_index_of_an_earlier_version_there_is_nothing_to_go_on_with(own_store: Datastore, stop, caplog) -> None:
    work = {"factory": "IVF4,SQ8", "name": "other", "quality_queries": 0}
    stop(indexing, "_write_segment", 0, lambda: build_index(own_store, **work))
    notes = own_store.path / "other.faiss.part.json"
    write_json(notes, {name: value for name, value in read(notes).items() if name != "segment"})
    build_index(own_store, resume=True, **work)
    assert "other.faiss.part is of an earlier version: it is begun anew" in caplog.text
    assert {path.name for path in own_store.path.glob("other*")} == {"other.faiss", "other.json"}


def test_a_damaged_unfinished_index_is_named(own_store: Datastore, stop) -> None:
    work = {"factory": "IVF4,SQ8", "name": "other", "quality_queries": 0}
    stop(indexing, "_write_segment", 0, lambda: build_index(own_store, **work))
    trained = own_store.path / "other.faiss.part"
    trained.write_bytes(trained.read_bytes()[:100])
    with pytest.raises(UserError, match="other.faiss.part is damaged .*; build the index anew, without --resume"):
        build_index(own_store, resume=True, **work)
    build_index(own_store, **work)


def test_begun_anew_nothing_of_the_unfinished_index_is_left(own_store: Datastore, stop) -> None:
    work = {"factory": "IVF4,SQ8", "name": "other", "quality_queries": 0}
    stop(indexing, "_write_segment", 2, lambda: build_index(own_store, parts=3, **work))
    (own_store.path / "other.001.faiss.part.tmp").touch()
    (own_store.path / "other.b.faiss.part.tmp").touch()  # of an index called other.b
    build_index(own_store, **work)
    left = {"other.faiss", "other.json", "other.b.faiss.part.tmp"}
    assert {path.name for path in own_store.path.glob("other*")} == left


def test_of_the_confidence(own_store: Datastore, lm: CausalHFLM, stop) -> None:
    stop(Reader, "read", 9, lambda: lm_log_probs(own_store, lambda: lm))
    progress = read(own_store.path / "lm_log_probs.progress.json")
    assert list(progress) == ["keys_sha256", "entries_done"] and progress["keys_sha256"] == own_store.keys_checksum
    done = progress["entries_done"]
    assert 0 < done < len(own_store)
    assert (own_store.path / "lm_log_probs.npy.part").stat().st_size == 128 + 4 * done
    # Of other keys: begun anew, without a word.
    (own_store.path / "lm_log_probs.progress.json").write_text(json.dumps(progress | {"keys_sha256": "0"}))
    calls: list[int] = []
    original = Reader.read
    stop(Reader, "read", 1, lambda: lm_log_probs(own_store, lambda: calls.append(0) or lm))
    assert calls and Reader.read is original
    assert np.isfinite(lm_log_probs(own_store, lambda: lm)).all()
    assert not (own_store.path / "lm_log_probs.progress.json").exists()
    # Of a run that was killed at its last step.
    (own_store.path / "lm_log_probs.progress.json").write_text(json.dumps(progress | {"entries_done": len(own_store)}))
    lm_log_probs(own_store, lambda: pytest.fail("it is all there"))
    assert not (own_store.path / "lm_log_probs.progress.json").exists()
