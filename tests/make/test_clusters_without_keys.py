"""Clusters of a store without keys are those of a store whose keys are what the index's codes stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stores import change_json
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make import clustering
from knn_lm_eval.make.appending import append_documents
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.compacting import compact_datastore
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.text import Piece
from knn_lm_eval.search import decoded_keys, two_levels
from knn_lm_eval.search.decoded_keys import DecodedKeys
from knn_lm_eval.search.faiss_index import open_index
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.clusters import ARRAYS, Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import file_record
from knn_lm_eval.store.whole_store import verify_store
from knn_lm_eval.system import checkpoints

WORDS = TRAIN_TEXT.split()
OLD: list[Piece] = [(True, " ".join(WORDS[start : start + 60])) for start in range(0, 900, 60)]
NEW: list[Piece] = [(True, EVAL_TEXT[:300]), (True, " ".join(WORDS[900:1000]))]
PLANS: dict[str, dict[str, Any]] = {
    "PQ": {"factory": "IVF4,PQ4x8"},
    "signs": {"factory": "RR32,IVF4,RaBitQfs", "parts": 2},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many ranges of codes and chunks of keys."""
    monkeypatch.setattr(decoded_keys, "LEAST_AT_ONCE", 3000)
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 300)


@pytest.fixture(scope="module", params=PLANS)
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path
) -> Path:
    plan = IndexPlan(**PLANS[request.param], quality_queries=0)
    arguments: dict[str, Any] = {"model_args": {"pretrained": str(model_folder)}, "source": {"documents": "line"}}
    folder = tmp_path_factory.mktemp("keyless") / "store"
    return dump_datastore(lm, OLD, folder, keys="none", index=plan, **arguments).path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def with_decoded_keys(folder: Path, to: Path) -> Datastore:
    """The same store with keys: those that its index's codes stand for."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("clusters"))
    keys = DecodedKeys(open_index(Datastore.open(folder))[0])
    keys.lay_out(to.parent / "codes.npy.part", 0)
    np.save(to / "keys.npy", keys[:])
    manifest = json.loads((to / "manifest.json").read_text())
    record = file_record(to / "keys.npy")
    change_json(
        to / "manifest.json",
        keys={"file": "keys.npy", "dtype": "float32"},
        files=manifest["files"] | {"keys.npy": record},
        derived={},
    )
    change_json(to / "index.json", keys_sha256=record["sha256"])
    return Datastore.open(to)


def same_arrays(one: Clusters, other: Clusters) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


@pytest.mark.parametrize("most_compared", [2**14, 5])
def test_kmeans_is_that_of_decoded_keys(
    folder: Path, tmp_path: Path, most_compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "MOST_COMPARED", most_compared)
    monkeypatch.setattr(two_levels, "ADD_CHUNK", 500)
    keyed = with_decoded_keys(folder, tmp_path / "keyed")
    clusters, expected = (
        cluster_kmeans(store, num_clusters=30, sample=600, iterations=3) for store in (Datastore.open(folder), keyed)
    )
    assert same_arrays(clusters, expected) and len(clusters) == 30
    said = clusters.metadata["codes_of"]
    assert said["index"] == "index" and "codes_of" not in expected.metadata and set(said["files"]) > {"index.json"}
    assert not list((folder / "clusters").rglob("*.part"))
    assert all(verdict.fault is None for verdict in verify_store(folder))


def test_greedy_merging_is_that_of_decoded_keys(folder: Path, tmp_path: Path) -> None:
    keyed = with_decoded_keys(folder, tmp_path / "keyed")
    clusters, expected = (cluster_greedy_merge(store, probe=2) for store in (Datastore.open(folder), keyed))
    assert same_arrays(clusters, expected) and len(clusters) < len(keyed)


def test_codes_in_the_place_of_keys_that_are_there(folder: Path, tmp_path: Path) -> None:
    keyed = with_decoded_keys(folder, tmp_path / "keyed")
    by_codes = cluster_kmeans(keyed, "codes", num_clusters=20, iterations=2, index="index")
    assert same_arrays(by_codes, cluster_kmeans(keyed, "own", num_clusters=20, iterations=2))
    with pytest.raises(UserError, match="no index called 'other'"):
        cluster_kmeans(keyed, "other", num_clusters=20, index="other")


def test_interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    expected = cluster_kmeans(Datastore.open(other), num_clusters=30, iterations=3)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    own, left = DecodedKeys.__getitem__, [0]

    def end(self: DecodedKeys, rows: Any) -> np.ndarray:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return own(self, rows)

    store = Datastore.open(folder)
    for reads in (0, 9, 1):
        left[0] = reads
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(DecodedKeys, "__getitem__", end)
            cluster_kmeans(store, num_clusters=30, iterations=3, resume=True)
    clusters = cluster_kmeans(store, num_clusters=30, iterations=3, resume=True)
    assert same_arrays(clusters, expected)
    for name in ARRAYS:
        assert (clusters.path / f"{name}.npy").read_bytes() == (expected.path / f"{name}.npy").read_bytes()


def test_appended_entries_are_in_the_nearest_clusters(folder: Path, lm: CausalHFLM) -> None:
    before = cluster_kmeans(Datastore.open(folder), num_clusters=20, iterations=3)
    cluster_greedy_merge(Datastore.open(folder))
    old, own = len(before.cluster_of_entry), np.array(before.cluster_of_entry)
    files = {path: path.read_bytes() for path in (folder / "clusters").rglob("*") if path.is_file()}
    scored = score(folder, lm)
    store = append_documents(folder, lm, NEW, source={"text": "new.txt", "documents": "line"})
    clusters = Clusters.open(store, "kmeans")
    assert np.array_equal(clusters.cluster_of_entry[:old], own) and len(store) > old
    keys = DecodedKeys(open_index(store)[0])
    keys.lay_out(folder.parent / "codes.npy.part", 0)
    decoded = keys[:].astype(np.float64)
    filled = np.unique(own)
    means = np.stack([decoded[:old][own == number].mean(0) for number in filled])
    apart = np.square(decoded[old:, None] - means[None]).sum(-1)  # [new, clusters]
    found = np.searchsorted(filled, clusters.cluster_of_entry[old:])
    assert (apart[np.arange(len(found)), found] <= apart.min(1) * (1 + 1e-5)).all()
    assert (Clusters.open(store, "greedy_merge").cluster_of_entry[old:] == -1).all()
    assert score(folder, lm)[0] > scored[0] + 5
    remove_documents(folder, [len(OLD), len(OLD) + 1])
    assert score(folder, lm) == scored
    compact_datastore(folder)
    for path, content in files.items():
        assert path.read_bytes() == content or path.suffix == ".lock", path


def score(folder: Path, lm: CausalHFLM) -> list[float]:
    augmented = KNNHF(
        lm.model,
        tokenizer=lm.tokenizer,
        datastore=folder,
        batch_size=2,
        k=12,
        lmbda=0.5,
        probe=3,
        retomaton=True,
        clusters="kmeans",
        min_knns=3,
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (EVAL_TEXT[:300], OLD[3][1])]
    return augmented.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.fixture
def dumped(tmp_path: Path, lm: CausalHFLM) -> Callable[..., Datastore]:
    def dump(**plan: Any) -> Datastore:
        return dump_datastore(
            lm, OLD, tmp_path / "dumped", keys="none", index=IndexPlan(**plan, quality_queries=0), max_tokens=300
        )

    return dump


@pytest.mark.parametrize(
    "plan", [{"factory": "IVF4,SQ8"}, {"factory": "IVF4,PQ4x4fs"}, {"factory": "IVF4,RaBitQ", "sim_func": "dot"}]
)
@pytest.mark.parametrize("way", [cluster_kmeans, cluster_greedy_merge])
def test_what_retomaton_cannot_walk_on_is_not_clustered(
    plan: dict[str, Any], way: Callable[..., Clusters], dumped: Callable[..., Datastore]
) -> None:
    store = dumped(**plan)
    with pytest.raises(UserError, match="has no keys, and RetoMaton.*no distances by the codes.*--factory auto"):
        way(store)
    assert not (store.path / "clusters").exists()
