"""Each kind of file that lies in a store: one flipped bit is a sentence, never a number, and fetching mends it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers.stores import change_json, flip_bit, let_age, make_store

from knn_lm_eval.cli import main as cli
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.methods.automaton import AutomatonSettings, Walk
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.search import trial
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.verification import BEFORE, NO_CHECKSUM, NOW
from knn_lm_eval.store.whole_store import verify_store
from knn_lm_eval.system import file_contents
from knn_lm_eval.system.files import CACHE_VARIABLE

COUNT = 400


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an index, one in parts, their codes, and clusters."""
    store = make_store(tmp_path_factory.mktemp("whole") / "store", count=COUNT)
    build_index(store, "IVF4,PQ4x8", quality_queries=0)
    build_index(store, "IVF4,SQ8", name="parts", parts=2, quality_queries=0)
    cluster_kmeans(store, "c", num_clusters=5)
    evaluate(store.path)
    return store.path


@pytest.fixture
def store(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    shutil.copytree(pristine, tmp_path / "store")
    let_age(tmp_path / "store")
    return tmp_path / "store"


def evaluate(path: Path, verify: str = "auto") -> np.ndarray:
    """What an evaluation computes with all files of the store."""
    store = Datastore.open(path, verify)
    queries = np.random.default_rng(0).standard_normal((6, store.dimension)).astype(np.float32)
    retriever = LocalRetriever(store, k=20, probe=4, recompute_dists=False)
    walk = Walk(queries, np.arange(6, dtype=np.int64))
    settings = AutomatonSettings(k=20, min_knns=1, max_knns=50)
    automaton, _ = open_automaton(retriever, settings, Clusters.open(store, "c"))
    automaton.walk([walk])
    parts = LocalRetriever(store, k=20, probe=4, index="parts", recompute_dists=True).find(queries)
    return np.concatenate([walk.log_p_knn, *(part.ravel() for part in parts), *map(np.ravel, retriever.find(queries))])


def verify_verb(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["knn-lm-eval"])
    try:
        return cli.main(["verify_datastore", str(folder), *more])
    except SystemExit as end:
        return int(str(end.code))


def test_one_flipped_bit_of_any_file_gives_a_sentence_or_changes_nothing(store: Path, pristine: Path) -> None:
    expected, rng, refused = evaluate(store), np.random.default_rng(0), 0
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock")
    assert len(files) == 18
    for path in files:
        for bit in rng.integers(0, 8 * path.stat().st_size, 6).tolist():
            flip_bit(path, bit)
            try:
                np.testing.assert_array_equal(evaluate(store), expected)
                assert path.suffix == ".json"
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and str(store) in str(error)
            flip_bit(path, bit)
            if not path.exists():  # codes of another index are laid out anew
                break
    assert refused > 80
    np.testing.assert_array_equal(evaluate(store), expected)


def test_a_second_evaluation_reads_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = evaluate(store), []
    original = file_contents.examine
    for module in ("store.verification", "store.manifest", "system.file_contents", "search.laid_out"):
        monkeypatch.setattr(f"knn_lm_eval.{module}.examine", lambda *given: read.append(given[0]) or original(*given))
    np.testing.assert_array_equal(evaluate(store), expected)
    assert read == []
    np.testing.assert_array_equal(evaluate(store, "always"), expected)
    assert len(read) == len(set(read)) == 16  # each file once; the manifest and codes.json have checksums of their own


@pytest.mark.parametrize(
    "name",
    [
        "keys.npy",
        "values.npy",
        "document_starts.npy",
        "index.faiss",
        "index.json",
        "parts.000.faiss",
        "parts.001.faiss",
        "parts.json",
        "clusters/c/members.npy",
        "clusters/c/clusters.json",
        "index.codes/lists.npy",
        "index.codes/codes.json",
        "manifest.json",
    ],
)
def test_the_verb_names_what_is_wrong(store: Path, name: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_verb(store, monkeypatch) == 0
    assert "files are as they should be" in capsys.readouterr().out
    size = (store / name).stat().st_size
    data = (store / name).read_bytes()
    at = data.index(b"sha256") + 10 if name.endswith("json") else size - 5
    (store / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert verify_verb(store, monkeypatch) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and f"{name} is damaged" in out
    (store / name).write_bytes(data)
    assert verify_verb(store, monkeypatch, "--verify", "auto") == 0


def test_the_verb_finds_what_is_missing_cut_or_fits_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "keys.npy").write_bytes(b"")
    (store / "values.npy").unlink()
    faults = {verdict.name: verdict.fault for verdict in verify_store(store) if verdict.fault}
    assert set(faults) == {"keys.npy", "values.npy"}
    with pytest.raises(UserError, match="no such folder"):
        verify_store(store / "nothing")


def test_files_that_no_manifest_records_are_opened_and_said(store: Path) -> None:
    change_json(store / "manifest.json", derived={})
    how = {verdict.name: verdict.how for verdict in verify_store(store)}
    assert how["index.faiss"] == how["clusters/c/members.npy"] == NO_CHECKSUM and how["keys.npy"] == NOW
    members = np.load(store / "clusters/c/members.npy")
    members[3] = COUNT
    np.save(store / "clusters/c/members.npy", members)
    (fault,) = [verdict.fault for verdict in verify_store(store) if verdict.fault]
    assert "members.npy is damaged: it has numbers from 0 to 400" in fault


# An index without a checksum


def unrecorded(store: Path) -> Path:
    change_json(store / "manifest.json", derived={})
    return store


def test_an_index_without_a_checksum_is_read_by_a_child_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, original, tried = evaluate(store), trial.subprocess.run, []
    unrecorded(store)
    monkeypatch.setattr(trial.subprocess, "run", lambda *a, **k: tried.append(a) or original(*a, **k))
    np.testing.assert_array_equal(evaluate(store), expected)
    assert len(tried) == 3  # index.faiss and the two parts
    np.testing.assert_array_equal(evaluate(store), expected)
    assert len(tried) == 3


def test_a_child_that_dies_gives_one_sentence(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unrecorded(store)
    monkeypatch.setattr(trial, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(UserError, match=r"index.faiss is damaged or hostile: .* ended with SIGSEGV"):
        LocalRetriever(Datastore.open(store), k=3)


def test_an_index_that_faiss_cannot_read_gives_one_sentence(store: Path) -> None:
    unrecorded(store)
    (store / "index.faiss").write_bytes(bytes((store / "index.faiss").stat().st_size))
    with pytest.raises(UserError, match=r"index.faiss is damaged: faiss cannot read it"):
        LocalRetriever(Datastore.open(store), k=3)


@pytest.mark.parametrize("number", [COUNT, -1, 2**40])
def test_an_index_that_names_entries_that_do_not_exist_is_refused(store: Path, number: int) -> None:
    unrecorded(store)
    index = faiss.read_index(str(store / "index.faiss"))
    size = next(size for size in map(index.invlists.list_size, range(4)) if size)
    of_list = next(number for number in range(4) if index.invlists.list_size(number) == size)
    faiss.rev_swig_ptr(index.invlists.get_ids(of_list), size)[0] = number
    faiss.write_index(index, str(store / "index.faiss"))
    with pytest.raises(UserError, match=r"index.faiss is damaged: it names entry"):
        LocalRetriever(Datastore.open(store), k=3)


def test_results_say_what_was_verified(store: Path) -> None:
    from knn_lm_eval.model.accounting import describe_store

    change_json(store / "manifest.json", model={"pretrained": "m", "args": {}, "vocabulary": None})
    evaluate(store)
    retriever = LocalRetriever(Datastore.open(store), k=3)
    said = json.loads(json.dumps(describe_store(retriever)["datastore"]))
    assert said["verify"] == "auto" and said["verified"]["index.faiss"] == said["verified"]["keys.npy"] == BEFORE
