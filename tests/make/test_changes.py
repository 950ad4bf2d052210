"""A store that grows, loses documents, and is compacted: what it gives is what a store made so from the start gives."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stores import change_json, let_age
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make import appending
from knn_lm_eval.make.appending import append_documents, worth_training
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.compacting import compact_datastore
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.pruning import prune_random
from knn_lm_eval.make.removing import documents_of_text, equal_documents, remove_documents
from knn_lm_eval.make.text import Piece
from knn_lm_eval.model.params import Params
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.faiss_index import open_index
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.packing import packed_queries
from knn_lm_eval.search.ray_retriever import merge_exact, merge_found
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.search.shard import ExactShard, Shard, of_shard
from knn_lm_eval.store.change import JOURNAL
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexFiles, IndexPart, find_parts
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.store.whole_store import verify_store
from knn_lm_eval.study.inspection import inspect_text
from knn_lm_eval.system.file_contents import known

WORDS = TRAIN_TEXT.split()
OLD = [" ".join(WORDS[start : start + 60]) for start in range(0, 900, 60)]
NEW = [EVAL_TEXT[:300], " ".join(WORDS[900:1000])]
FACTORIES = {"index": "Flat", "sq": "IVF4,SQ8", "signs": "IVF4,RaBitQfs", "pq": "IVF4,PQ2", "parts": "IVF4,SQ8"}


def pieces(documents: list[str]) -> list[Piece]:
    return [(True, document) for document in documents]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path) -> Path:
    """A store with indexes of several kinds, clusters of both, and tuned settings."""
    folder = tmp_path_factory.mktemp("changes") / "store"
    source = {"text": "old.txt", "documents": "line"}
    store = dump_datastore(lm, pieces(OLD), folder, source=source, model_args={"pretrained": str(model_folder)})
    for name, factory in FACTORIES.items():
        build_index(store, factory, name=name, parts=2 if name == "parts" else None, quality_queries=64, k=16)
    cluster_kmeans(store, num_clusters=30, iterations=3)
    cluster_greedy_merge(store)
    Params({"lmbda": 0.4, "knn_temp": 2.0, "k": 12}, {"keys_sha256": store.keys_checksum}).write(folder / "params.json")
    let_age(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def append(folder: Path, lm: CausalHFLM, documents: list[str] = NEW, **more: Any) -> Datastore:
    return append_documents(folder, lm, pieces(documents), source={"text": "new.txt", "documents": "line"}, **more)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def score(folder: Path, lm: CausalHFLM, **settings: Any) -> list[float]:
    augmented = KNNHF(
        lm.model, tokenizer=lm.tokenizer, datastore=folder, batch_size=2, **({"k": 12, "lmbda": 0.5} | settings)
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (EVAL_TEXT[:300], NEW[1], OLD[3])]
    return augmented.loglikelihood_rolling(requests, disable_tqdm=True)


USES: dict[str, dict[str, Any]] = {
    "exact": {"index": "exact"},
    **{name: {"index": name, "probe": 3} for name in FACTORIES},
    "exact distances": {"index": "sq", "recompute_dists": True},
    "RetoMaton": {"index": "exact", "retomaton": True, "clusters": "kmeans", "min_knns": 3},
    "RetoMaton by codes": {"index": "pq", "retomaton": True, "clusters": "greedy_merge", "min_knns": 5},
}


def test_append_remove_compact_is_what_was(folder: Path, lm: CausalHFLM) -> None:
    before, scores = bytes_of(folder), {name: score(folder, lm, **use) for name, use in USES.items()}
    for path in folder.glob("*.scan"):
        shutil.rmtree(path)
    for path in folder.glob("*.codes"):
        shutil.rmtree(path)
    store = append(folder, lm)
    assert len(store.document_starts) == len(OLD) + 2 and not (folder / ".appending").exists()
    with_new = {name: score(folder, lm, **use) for name, use in USES.items()}
    for name in USES:
        assert with_new[name][0] > scores[name][0] + 5, name  # a text that it knows now
    remove_documents(folder, [len(OLD), len(OLD) + 1])
    for name, use in USES.items():
        assert score(folder, lm, **use) == scores[name], name
    for path in (*folder.glob("*.scan"), *folder.glob("*.codes")):
        shutil.rmtree(path)
    store = compact_datastore(folder)
    assert store.removed is None and bytes_of(folder) == before
    assert all(verdict.fault is None for verdict in verify_store(folder))


def test_documents_from_the_middle(folder: Path, lm: CausalHFLM) -> None:
    """With the mask and compacted the scores are the same, and no entry of the others is lost."""
    append(folder, lm)
    whole = Datastore.open(folder)
    values, starts = np.array(whole.values), [*whole.document_starts.tolist(), len(whole)]
    keys = np.array(whole.keys)
    gone = [0, 3, 4, 9, len(OLD)]
    remove_documents(folder, gone[2:])
    remove_documents(folder, gone[:2])
    masked = {name: score(folder, lm, **use) for name, use in USES.items()}
    compacted = compact_datastore(folder)
    assert {name: score(folder, lm, **use) for name, use in USES.items()} == masked
    kept = np.concatenate(
        [np.arange(starts[number], starts[number + 1]) for number in range(len(starts) - 1) if number not in gone]
    )
    assert (compacted.values == values[kept]).all() and (compacted.keys == keys[kept]).all()
    lengths = np.delete(np.diff(starts), gone)
    assert (np.diff(compacted.document_starts, append=len(compacted)) == lengths).all()
    assert (
        Manifest.read(folder).appended[0]["first"] == len(OLD) - 4 and Manifest.read(folder).appended[0]["stop"] == 12
    )
    for name in FACTORIES:
        open_index(compacted, name)
    members = Clusters.open(compacted, "kmeans")
    assert len(members.members) == len(compacted)


def test_appended_is_as_dumped_at_once(folder: Path, lm: CausalHFLM, model_folder: Path, tmp_path: Path) -> None:
    at_once = dump_datastore(lm, pieces(OLD + NEW), tmp_path / "once", model_args={"pretrained": str(model_folder)})
    store = append(folder, lm)
    assert (folder / "values.npy").read_bytes() == (at_once.path / "values.npy").read_bytes()
    assert (folder / "document_starts.npy").read_bytes() == (at_once.path / "document_starts.npy").read_bytes()
    assert (folder / "keys.npy").stat().st_size == (at_once.path / "keys.npy").stat().st_size
    assert np.allclose(store.keys, at_once.keys, atol=2e-2)  # batches are others
    # What was trained is kept; a new entry is in the list, and in the cluster, where any other such would be.
    build_index(at_once, "Flat", quality_queries=0)
    assert (folder / "index.faiss").stat().st_size == (at_once.path / "index.faiss").stat().st_size
    new = np.array(store.require_keys("the test")[-40:]).astype(np.float64)
    clusters = Clusters.open(store, "kmeans")
    old = slice(0, len(store) - 40)
    own = np.array(clusters.cluster_of_entry)
    count_before = len(Datastore.open(folder)) - sum(len(lm.tok_encode(text)) for text in NEW)
    means = np.stack(
        [
            store.require_keys("the test")[:count_before][own[:count_before] == number].astype(np.float64).mean(0)
            if (own[:count_before] == number).any()
            else np.full(store.dimension, np.inf)
            for number in range(len(clusters))
        ]
    )
    distances = np.square(new[:, None] - means[None]).sum(-1)
    assert old.stop > 0 and (distances[np.arange(40), own[-40:]] <= distances.min(1) * (1 + 1e-5)).all()
    assert (Clusters.open(store, "greedy_merge").cluster_of_entry[count_before:] == -1).all()


def test_verified_files_are_not_read_again(folder: Path, lm: CausalHFLM) -> None:
    append(folder, lm)
    for name in ("keys.npy", "values.npy", "document_starts.npy"):
        found = known(folder / name)
        assert found is not None and found.sha256 == Manifest.read(folder).files[name]["sha256"]


def test_an_open_store_goes_on_as_it_was(folder: Path, lm: CausalHFLM) -> None:
    opened = Datastore.open(folder)
    keys, values = np.array(opened.keys), np.array(opened.values)
    append(folder, lm)
    remove_documents(folder, [0])
    compact_datastore(folder)
    assert (
        np.array_equal(opened.require_keys("the test"), keys)
        and (opened.values == values).all()
        and len(opened) == len(values)
    )


def test_tuned_settings_and_quality_say_what_they_are_of(
    folder: Path, lm: CausalHFLM, caplog: pytest.LogCaptureFixture
) -> None:
    count = len(Datastore.open(folder))
    append(folder, lm)
    metadata = json.loads((folder / "sq.json").read_text())
    assert metadata["measured_with"]["count"] == count and metadata["quality"]
    KNNHF(lm.model, tokenizer=lm.tokenizer, datastore=folder, batch_size=2)
    assert f"tuned when the datastore had {count:,} entries" in caplog.text
    assert not worth_training(Datastore.open(folder))
    append(folder, lm, [" ".join(WORDS[1000:])])
    assert len(worth_training(Datastore.open(folder))) == len(FACTORIES)
    assert json.loads((folder / "sq.json").read_text())["measured_with"]["count"] == count


@pytest.mark.parametrize("retomaton", [False, True])
def test_removed_text_is_not_shown(folder: Path, lm: CausalHFLM, retomaton: bool) -> None:
    settings = {"retomaton": True, "clusters": "kmeans"} if retomaton else {}

    def shown() -> set[int]:
        augmented = KNNHF(
            lm.model, tokenizer=lm.tokenizer, datastore=folder, batch_size=1, k=30, lmbda=0.5, index="exact", **settings
        )
        inspected = inspect_text(augmented, OLD[3], num_neighbours=60)
        return {neighbour.entry for token in inspected for neighbour in token.neighbours}

    starts = Datastore.open(folder).document_starts
    of_document = set(range(int(starts[3]), int(starts[4])))
    assert shown() & of_document
    remove_documents(folder, [3])
    assert not shown() & of_document


def test_what_takes_all_entries_asks_for_compaction(folder: Path, lm: CausalHFLM, tmp_path: Path) -> None:
    store = remove_documents(folder, [2])
    works: list[Callable[[], object]] = [
        lambda: build_index(store, "Flat", name="new"),
        lambda: cluster_kmeans(store, name="new"),
        lambda: cluster_greedy_merge(store, name="new"),
        lambda: prune_random(store, tmp_path / "pruned", 0.5),
    ]
    for work in works:
        with pytest.raises(UserError, match="has 1 removed document, and .*compact_datastore"):
            work()


def test_documents_by_their_text(folder: Path, lm: CausalHFLM, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join([OLD[7], "none of it", OLD[2], OLD[2][:-3]]) + "\n")
    (tmp_path / "tokens").mkdir()
    found = documents_of_text(Datastore.open(folder), tmp_path / "text.txt", lambda: lm, tmp_path / "tokens")
    assert found.documents.tolist() == [2, 7] and (found.wanted, found.missing) == (4, 2)
    store = Datastore.open(folder)
    again = equal_documents(store, store.values, store.document_starts)
    assert again.documents.tolist() == list(range(len(OLD))) and again.missing == 0


def test_wrong_numbers_and_nothing_left(folder: Path) -> None:
    before = bytes_of(folder)
    for wrong in ([len(OLD)], [-1]):
        with pytest.raises(UserError, match=f"no document.*it has {len(OLD)}"):
            remove_documents(folder, wrong)
    with pytest.raises(UserError, match="Nothing would stay"):
        remove_documents(folder, range(len(OLD)))
    remove_documents(folder, [])
    compact_datastore(folder)
    assert bytes_of(folder) == before


def test_an_index_without_lists_is_said_before_anything_changes(folder: Path, lm: CausalHFLM) -> None:
    build_index(Datastore.open(folder), "HNSW8", name="graph", quality_queries=0)
    append(folder, lm)
    assert open_index(Datastore.open(folder), "graph")[0].ntotal == len(Datastore.open(folder))
    remove_documents(folder, [1])
    before = bytes_of(folder)
    with pytest.raises(UserError, match="cannot be taken out of the index.*HNSW.*delete graph.json"):
        compact_datastore(folder)
    assert bytes_of(folder) == before


def test_another_model_is_refused(folder: Path, lm: CausalHFLM, tmp_path: Path) -> None:
    from helpers.tiny_model import make_llama

    make_llama(seed=5).save_pretrained(tmp_path / "other")
    lm.tokenizer.save_pretrained(tmp_path / "other")
    before = bytes_of(folder)
    with pytest.raises(UserError, match="away from the datastore's"):
        append(folder, CausalHFLM(str(tmp_path / "other"), device="cpu"))
    assert bytes_of(folder) == before


def test_resume_of_something_else(folder: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bytes_of(append(Path(shutil.copytree(folder, folder.with_name("other"))), lm).path)

    def fail(*_: object) -> None:
        raise UserError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(appending, "extend_index", fail)
        with pytest.raises(UserError, match="no more"):
            append(folder, lm)
    assert (folder / ".appending").is_dir() and len(Datastore.open(folder).document_starts) == len(OLD)
    with pytest.raises(UserError, match="was begun with.*max_tokens"):
        append(folder, lm, max_tokens=3, resume=True)
    append(folder, lm, resume=True)
    now = bytes_of(folder)
    assert without_times(now) == without_times(expected)
    append(folder, lm, resume=True)  # it is done
    assert bytes_of(folder) == now


def without_times(files: dict[str, bytes]) -> dict[str, Any]:
    plain: dict[str, Any] = dict(files)
    manifest = json.loads(files["manifest.json"])
    for record in manifest["appended"]:
        record.pop("created")
    manifest.pop("sha256")
    return plain | {"manifest.json": manifest}


def test_an_interrupted_change_is_finished_by_who_opens_it(
    folder: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = bytes_of(append(Path(shutil.copytree(folder, folder.with_name("other"))), lm).path)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("knn_lm_eval.store.change.replace_file", end)  # after the arrays have grown
        with pytest.raises(KeyboardInterrupt):
            append(folder, lm)
    assert (folder / JOURNAL).exists()
    if os.geteuid():  # root may write anywhere
        folder.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written to here"):
            Datastore.open(folder)
        folder.chmod(0o700)
    store = Datastore.open(folder)
    assert len(store.document_starts) == len(OLD) + 2 and not (folder / JOURNAL).exists()
    assert without_times(bytes_of(folder)) == without_times(done)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_journal_names_nothing_outside(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("mine")
    content = {"waiting": "w", "places": {}, "tails": [], "gone": [name], "manifest": {}}
    (folder / JOURNAL).write_text(json.dumps(content))
    with pytest.raises(UserError, match="not in the store"):
        Datastore.open(folder)
    assert (folder.parent / "outside").read_text() == "mine"


def test_parts_get_a_part(folder: Path, lm: CausalHFLM) -> None:
    first = [IndexFiles(folder, "parts").part(number).read_bytes() for number in range(2)]
    store = append(folder, lm)
    metadata = json.loads((folder / "parts.json").read_text())
    assert [run["stop"] for run in metadata["parts"]][-1] == len(store) and len(metadata["parts"]) == 3
    assert [IndexFiles(folder, "parts").part(number).read_bytes() for number in range(2)] == first
    half = metadata["parts"][0]["stop"]
    last = int(np.searchsorted(store.document_starts, half, side="right")) - 1
    remove_documents(folder, range(last + 1))  # all of the first part, and some of the second
    compacted = compact_datastore(folder)
    assert len(json.loads((folder / "parts.json").read_text())["parts"]) == 2
    assert open_index(compacted, "parts")[0].ntotal == len(compacted)
    assert not IndexFiles(folder, "parts").part(2).exists()


def test_shards_leave_them_out(folder: Path) -> None:
    """As the process that has the whole index, or all keys; without a cluster."""
    store = remove_documents(folder, [*range(8), 11])  # all of the first run, and more
    queries = np.array(store.require_keys("the test")[::50], dtype=np.float32)
    parts = find_parts(store, "parts")[1]
    sent = packed_queries(queries)
    found = [of_shard(Shard(folder, part, "parts", 1).search(sent, 12, 3)[0], part.first_id) for part in parts]
    expected = LocalRetriever(store, 12, 3, index="parts").find(queries)
    merged = merge_found(found, False)
    assert (merged.entries == expected[1]).all() and np.array_equal(merged.distances, expected[0])
    half = int(store.document_starts[8])
    runs = [IndexPart(folder / "keys.npy", *run) for run in ((0, half, 0), (half, len(store), half))]
    exact = [
        of_shard(ExactShard(folder, run, "exact", 1, "l2").search(sent, 12, None)[0], run.first_id) for run in runs
    ]
    assert (exact[0].entries == -1).all()
    assert (merge_exact(exact).entries == ExactRetriever(store, 12).find(queries)[1]).all()


def test_a_store_without_keys(folder: Path, lm: CausalHFLM) -> None:
    manifest = Manifest.read(folder)
    shutil.rmtree(folder / "clusters")
    for path in (*folder.glob("*.faiss"), *folder.glob("*.json"), folder / "keys.npy"):
        if path.name not in ("pq.faiss", "pq.json", "manifest.json"):
            path.unlink()
    change_json(folder / "pq.json", keys_sha256=manifest.files["values.npy"]["sha256"])
    files = {name: record for name, record in manifest.files.items() if name != "keys.npy"}
    change_json(folder / "manifest.json", keys=None, files=files, derived={})
    use = {"index": "pq", "probe": 2}
    before = score(folder, lm, **use)
    remove_documents(folder, [3])
    masked = score(folder, lm, **use)
    assert masked[2] < before[2] - 5  # that document's
    store = compact_datastore(folder)
    assert store.keys is None and score(folder, lm, **use) == masked
    with pytest.raises(UserError, match="has no keys, which appending needs"):
        append(folder, lm)


def test_links_are_not_added_to(folder: Path, lm: CausalHFLM) -> None:
    (folder / "other.npy").hardlink_to(folder / "keys.npy")
    with pytest.raises(UserError, match="are links"):
        append(folder, lm)


def test_a_retriever_has_fewer_neighbours_at_most(folder: Path) -> None:
    store = remove_documents(folder, range(1, len(OLD)))
    retriever: Retriever = ExactRetriever(store, store.kept)
    assert (retriever.find(np.array(store.require_keys("the test")[:3], dtype=np.float32))[1] < store.kept).all()
    with pytest.raises(UserError, match=f"has {store.kept} entries"):
        ExactRetriever(store, store.kept + 1)
