"""Pruned datastores: which entries stay, against slow oracles; what a store without text order is not used for."""

from __future__ import annotations

import math
import runpy
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracle import continuation_score, knn_lm_distributions, lm_outputs
from helpers.places import SCRIPTS
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Reader, Reading
from knn_lm_eval.make import merging, pruning
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.confidence import LOG_PROBS, lm_log_probs
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.pruning import largest_of_smallest, prune_confidence, prune_greedy_merge, prune_random
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.search.faiss_index import open_index, search
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import FORMAT, FORMAT_VERSION, file_record, record_derived
from knn_lm_eval.study.inspection import inspect_text
from knn_lm_eval.system import checkpoints as states
from knn_lm_eval.system.files import write_json

COUNT = 900
SCRIPT = SCRIPTS / "prune_datastore.py"


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path) -> Datastore:
    """A store of a few documents, read in overlapping windows, with an exact index. Tests copy it first."""
    folder = tmp_path_factory.mktemp("pruning") / "store"
    documents = cut_into_documents(TRAIN_TEXT[:2400].splitlines(keepends=True), "line")
    args = {"pretrained": str(model_folder)}
    store = dump_datastore(lm, documents, folder, max_length=24, stride=10, batch_size=2, model_args=args)
    build_index(store, "Flat", quality_queries=0)
    return store


@pytest.fixture
def store(tmp_path: Path, read: Datastore) -> Datastore:
    shutil.copytree(read.path, tmp_path / "store")
    return Datastore.open(tmp_path / "store")


def make_store(folder: Path, keys: np.ndarray, values: np.ndarray, **manifest: object) -> Datastore:
    """A store of given arrays; keys other than float16 lie in a raw file, as imported ones do."""
    folder.mkdir()
    if keys.dtype == np.float16:
        np.save(folder / "keys.npy", keys)
    else:
        keys.tofile(folder / "keys.raw")
        manifest["keys"] = {"file": "keys.raw", "dtype": keys.dtype.name}
    np.save(folder / "values.npy", values.astype(np.int32))
    np.save(folder / "document_starts.npy", np.zeros(1, dtype=np.int64))
    files = {file.name: file_record(file) for file in folder.iterdir()}
    sizes = {"count": len(keys), "dimension": keys.shape[1], "files": files}
    write_json(folder / "manifest.json", {"format": FORMAT, "format_version": FORMAT_VERSION, **sizes, **manifest})
    return Datastore.open(folder)


@pytest.fixture
def grouped(tmp_path: Path) -> Datastore:
    """Random keys in 30 groups, whose values depend on the group, with an exact index."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 30, COUNT)
    keys = 2 * rng.standard_normal((30, 8))[group] + rng.standard_normal((COUNT, 8))
    store = make_store(tmp_path / "grouped", keys.astype(np.float16), group // rng.integers(1, 4, COUNT))
    build_index(store, "Flat", quality_queries=0)
    return store


def no_lm() -> CausalHFLM:
    raise AssertionError("the LM was loaded")


def assert_is_part(pruned: Datastore, store: Datastore, entries: np.ndarray) -> None:
    assert len(entries) and len(pruned) == len(entries)
    assert pruned.keys is not None and store.keys is not None and pruned.keys.dtype == store.keys.dtype
    assert (pruned.keys == store.keys[entries]).all() and (pruned.values == store.values[entries]).all()


# ------------------------------------------------------------------------------------------ the LM's confidence


def read_slowly(store: Datastore, model: torch.nn.Module, prefix: int, max_length: int, stride: int) -> list[float]:
    """log p of each entry, one unpadded window at a time."""
    log_probs: list[float] = []
    ends = [*store.document_starts[1:].tolist(), len(store)]
    for begin, end in zip(store.document_starts.tolist(), ends, strict=True):
        text = store.values[begin:end].tolist()
        stop = 0
        while stop < len(text):
            start, stop = stop, min(len(text), stop + (stride if stop else max_length))
            tokens = [prefix, *text[: stop - 1]][-max_length:]
            p = lm_outputs(model, model.model.layers[-1].mlp, tokens)[0][start - stop :]
            log_probs += [math.log(row[token]) for row, token in zip(p, text[start:stop], strict=True)]
    return log_probs


def test_the_confidence_is_that_of_the_windows_that_made_the_keys(store: Datastore, lm: CausalHFLM) -> None:
    assert len(store.document_starts) > 1 and len(store) > 3 * 24
    expected = read_slowly(store, lm.model, lm.prefix_token_id, 24, 10)
    log_probs = lm_log_probs(store, lambda: lm)
    assert log_probs.dtype == np.float32
    assert np.allclose(log_probs, expected, atol=2e-4)
    assert LOG_PROBS in Datastore.open(store.path).manifest.derived
    assert (lm_log_probs(store, no_lm) == log_probs).all()  # it is read once


def test_an_interrupted_reading_is_gone_on_with(store: Datastore, lm: CausalHFLM, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(store.path, tmp_path / "other")
    read, calls, stop_at = Reader.read, [], 10**9

    def interrupted(reader: Reader, passages: list) -> Reading:
        calls.append(len(passages))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return read(reader, passages)

    monkeypatch.setattr(Reader, "read", interrupted)
    whole = lm_log_probs(Datastore.open(tmp_path / "other"), lambda: lm)
    batches = len(calls)
    calls.clear()
    stop_at = batches - 1
    with pytest.raises(KeyboardInterrupt):
        lm_log_probs(store, lambda: lm)
    assert (lm_log_probs(store, lambda: lm) == whole).all()
    assert batches < len(calls) < 2 * batches - 2  # not all was read again
    assert (store.path / LOG_PROBS).read_bytes() == (tmp_path / "other" / LOG_PROBS).read_bytes()
    assert not list(store.path.glob("*progress*")) and not list(store.path.glob("*.part"))


def test_another_lm_cannot_say_how_sure_the_stores_was(store: Datastore, tmp_path: Path, tokenizer) -> None:
    make_llama(seed=5).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="keys are .* away from the datastore's"):
        lm_log_probs(store, lambda: CausalHFLM(str(tmp_path / "model"), device="cpu"))


def test_confidence_keeps_what_the_lm_predicts_worst(store: Datastore, lm: CausalHFLM, tmp_path: Path) -> None:
    half = prune_confidence(store, tmp_path / "half", lambda: lm, keep=0.5)
    log_probs = np.array(lm_log_probs(store, no_lm))
    worst = sorted(range(len(store)), key=lambda entry: (log_probs[entry], entry))[: round(0.5 * len(store))]
    assert_is_part(half, store, np.sort(worst))
    unsure = prune_confidence(store, tmp_path / "unsure", no_lm, max_p=0.1)
    assert_is_part(unsure, store, np.flatnonzero(np.exp(log_probs.astype(np.float64)) <= 0.1))
    assert 0 < len(unsure) < len(store)


def test_of_equal_confidence_the_first_stay(store: Datastore, lm: CausalHFLM, tmp_path: Path) -> None:
    lm_log_probs(store, lambda: lm)
    np.save(store.path / LOG_PROBS, np.zeros(len(store), dtype=np.float32))
    record_derived(store.path, [LOG_PROBS])
    third = prune_confidence(store, tmp_path / "third", no_lm, keep=1 / 3)
    assert_is_part(third, store, np.arange(round(len(store) / 3)))


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([-np.inf, -3.5, -3.25, -1e-30, -0.0, 0.0, 2.0]) | st.floats(width=32, allow_nan=False),
        min_size=1,
    ),
    st.data(),
)
def test_the_smallest_numbers_are_found_without_sorting(numbers: list[float], data: st.DataObject) -> None:
    array, wanted = np.array(numbers, dtype=np.float32), data.draw(st.integers(1, len(numbers)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "READ_CHUNK", 3)
        largest, last = largest_of_smallest(array, wanted)
    order = np.argsort(array, kind="stable")[:wanted]
    assert (largest, last) == (array[order[-1]], order[-1])
    kept = (array < largest) | ((array == largest) & (np.arange(len(array)) <= last))
    assert np.flatnonzero(kept).tolist() == sorted(order)


def test_confidence_needs_a_store_that_says_how_it_was_read(grouped: Datastore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say in which windows"):
        prune_confidence(grouped, tmp_path / "no", no_lm, keep=0.5)
    small = prune_random(grouped, tmp_path / "small", 0.5)
    with pytest.raises(UserError, match="in no text order.*the LM's confidence needs it"):
        prune_confidence(small, tmp_path / "no", no_lm, keep=0.5)
    for keep, max_p in ((None, None), (0.5, 0.5), (0.0, None), (1.0, None), (None, 1.0)):
        with pytest.raises(UserError, match="keep|max_p"):
            prune_confidence(grouped, tmp_path / "no", no_lm, keep=keep, max_p=max_p)
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------------- random


def test_a_random_store_is_about_its_share_and_inside_a_larger_one(
    grouped: Datastore, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 64)
    small = prune_random(grouped, tmp_path / "small", 0.3, seed=4)
    large = prune_random(grouped, tmp_path / "large", 0.6, seed=4)
    positions = pruning.positions_of_entries(np.arange(COUNT), 4)
    for pruned, keep in ((small, 0.3), (large, 0.6)):
        assert_is_part(pruned, grouped, np.flatnonzero(positions < keep))
        assert len(pruned) == pytest.approx(keep * COUNT, rel=0.15)
        assert (pruned.document_starts == [0]).all() and pruned.weights is None
    other = prune_random(grouped, tmp_path / "other", 0.3, seed=5)
    assert not np.array_equal(other.keys, small.keys)


def test_the_manifest_says_what_a_store_was_pruned_from(store: Datastore, tmp_path: Path) -> None:
    once = prune_random(store, tmp_path / "once", 0.5, seed=1)
    twice = prune_random(once, tmp_path / "twice", 0.5, seed=2)
    assert once.manifest.fingerprint == store.manifest.fingerprint
    assert once.manifest.model == store.manifest.model and once.manifest.text_order is False
    assert Datastore.open(store.path).manifest.derived and "derived" not in once.manifest.to_json()
    said = twice.manifest.pruned_from
    assert said is not None
    assert (said["method"], said["keep"], said["seed"], said["count"]) == ("random", 0.5, 2, len(once))
    assert said["files"] == once.manifest.files and said["path"] == str(tmp_path / "once")
    assert said["pruned_from"]["files"] == store.manifest.files
    assert {path.name for path in twice.path.iterdir()} == {"manifest.json", *twice.manifest.files}


def test_keys_of_an_imported_store_keep_their_dtype(tmp_path: Path) -> None:
    keys = np.random.default_rng(2).standard_normal((200, 6)).astype(np.float32)
    store = make_store(tmp_path / "raw", keys, np.arange(200))
    pruned = prune_random(store, tmp_path / "pruned", 0.5)
    assert_is_part(pruned, store, np.sort(pruned.values))
    build_index(pruned, "Flat", quality_queries=0)


# ------------------------------------------------------------------------------------------------ greedy merging


def merge_slowly(values: list[int], neighbours: list[list[int]], weight: list[int]) -> list[int]:
    """The weight of each entry after He et al.'s merging, 0 where another absorbed it."""
    weight, touched = list(weight), [False] * len(values)
    for entry in range(len(values)):
        if weight[entry] == 0:
            continue
        for other in neighbours[entry]:
            if other not in (-1, entry) and not touched[other] and values[other] == values[entry]:
                weight[entry] += weight[other]
                weight[other] = 0
                touched[entry] = touched[other] = True
    return weight


def nearest(store: Datastore, k: int) -> list[list[int]]:
    return search(open_index(store)[0], np.asarray(store.keys, dtype=np.float32), k + 1)[1].tolist()


@pytest.mark.parametrize("k", [1, 5, 40])
def test_greedy_merge_keeps_who_absorbed_others_with_their_weight(
    grouped: Datastore, tmp_path: Path, monkeypatch, k: int
) -> None:
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 256)
    merged = prune_greedy_merge(grouped, tmp_path / "merged", neighbours=k)
    weights = np.array(merge_slowly(grouped.values.tolist(), nearest(grouped, k), [1] * COUNT))
    assert_is_part(merged, grouped, np.flatnonzero(weights))
    assert merged.weights is not None and (merged.weights == weights[weights > 0]).all()
    assert merged.weights.sum() == COUNT and 1 < merged.weights.max() <= k + 1
    clusters = cluster_greedy_merge(grouped, k=k)
    assert len(clusters) == len(merged)  # the same merging
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped", "merged"]


def test_merging_a_merged_store_adds_up_the_weights(grouped: Datastore, tmp_path: Path) -> None:
    once = prune_greedy_merge(grouped, tmp_path / "once", neighbours=2)
    build_index(once, "Flat", quality_queries=0)
    twice = prune_greedy_merge(once, tmp_path / "twice", neighbours=2)
    weights = np.array(merge_slowly(once.values.tolist(), nearest(once, 2), once.weights.tolist()))
    assert twice.weights is not None and (twice.weights == weights[weights > 0]).all()
    assert twice.weights.sum() == COUNT and len(twice) < len(once)
    part = prune_random(once, tmp_path / "part", 0.5)
    chosen = pruning.positions_of_entries(np.arange(len(once)), 0) < 0.5
    assert part.weights is not None and (part.weights == once.weights[chosen]).all()


def test_an_interrupted_merging_is_gone_on_with(grouped: Datastore, tmp_path: Path, monkeypatch) -> None:
    whole = prune_greedy_merge(grouped, tmp_path / "whole", neighbours=5)
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 200)
    monkeypatch.setattr(states, "CHECKPOINT_SECONDS", 0.0)
    calls = []

    def interrupted(*args: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return search(*args)

    monkeypatch.setattr(merging, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_greedy_merge(grouped, tmp_path / "merged", neighbours=5)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="begun with .* now it is"):
        prune_greedy_merge(grouped, tmp_path / "merged", neighbours=6, resume=True)
    merged = prune_greedy_merge(grouped, tmp_path / "merged", neighbours=5, resume=True)
    assert len(calls) == 4 + 2  # three of five chunks were done
    assert (merged.keys == whole.keys).all() and (merged.weights == whole.weights).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped", "merged", "whole"]


# -------------------------------------------------------------------------------------------- use of what is left


@pytest.mark.parametrize("method", ["confidence", "greedy_merge"])
def test_a_pruned_store_scores_as_its_entries_do(
    store: Datastore, lm: CausalHFLM, model_folder: Path, tmp_path: Path, method: str
) -> None:
    if method == "confidence":
        pruned = prune_confidence(store, tmp_path / "pruned", lambda: lm, keep=0.4)
        weights = np.ones(len(pruned), dtype=int)
    else:
        pruned = prune_greedy_merge(store, tmp_path / "pruned", neighbours=20)
        weights = np.array(pruned.weights)
        assert weights.max() > 1
    build_index(pruned, "Flat", quality_queries=4)
    knn = KNNHF(str(model_folder), datastore=pruned.path, k=len(pruned), lmbda=0.5, knn_temp=7.0, batch_size=1)
    tokens = knn.tok_encode(EVAL_TEXT)[:40]
    distributions = knn_lm_distributions(
        knn.model,
        knn.model.model.layers[-1].mlp,
        tokens[:-1],
        np.repeat(pruned.keys, weights, axis=0),
        np.repeat(pruned.values, weights),
        k=weights.sum(),
        lmbda=0.5,
        temperature=7.0,
    )
    text = [knn.tokenizer.decode(part) for part in (tokens[:10], tokens[10:])]
    assert knn.tok_encode(text[0]) + knn.tok_encode(text[1]) == tokens
    request = Instance("loglikelihood", {}, (text[0], text[1]), 0)
    expected, _ = continuation_score(distributions, tokens[10:])
    assert knn.loglikelihood([request])[0][0] == pytest.approx(expected, rel=1e-4)


def test_a_pruned_store_is_not_taken_for_text(store: Datastore, model_folder: Path, tmp_path: Path) -> None:
    pruned = prune_random(store, tmp_path / "pruned", 0.5)
    build_index(pruned, "Flat", quality_queries=0)
    with pytest.raises(UserError, match="merged or left out, and RetoMaton needs it; use the store that it was made"):
        KNNHF("no-such-model", datastore=pruned.path, k=5, retomaton=True)
    for cluster in (cluster_kmeans, cluster_greedy_merge):
        with pytest.raises(UserError, match="in no text order"):
            cluster(pruned)
    for path, shown in ((store.path, True), (pruned.path, False)):
        knn = KNNHF(str(model_folder), datastore=path, k=5)
        neighbours = [n for token in inspect_text(knn, EVAL_TEXT[:40]) for n in token.neighbours]
        assert neighbours and any(n.context for n in neighbours) is shown


# ------------------------------------------------------------------------------------------------------- mistakes


def test_a_folder_that_is_taken_stays_as_it_is(grouped: Datastore, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    for output in (tmp_path / "taken", grouped.path):
        with pytest.raises(UserError, match="exists already; choose another --output"):
            prune_random(grouped, output, 0.5)
    assert len(Datastore.open(grouped.path)) == COUNT and (tmp_path / "taken" / "mine").exists()


def test_failed_and_killed_prunings_leave_no_store_and_can_be_repeated(
    grouped: Datastore, tmp_path: Path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 10**9, 500))
        with pytest.raises(UserError, match="Not enough disk space .* entries take"):
            prune_random(grouped, tmp_path / "pruned", 0.5)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(pruning, "file_record", full)
        with pytest.raises(UserError, match="Cannot write to .*No space left"):
            prune_random(grouped, tmp_path / "pruned", 0.5)
    with pytest.raises(UserError, match="Nothing would stay"):
        prune_random(grouped, tmp_path / "pruned", 1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["grouped"]
    (tmp_path / ".pruned.lock").touch()
    (tmp_path / ".pruned.unfinished").mkdir()  # what kill -9 leaves
    (tmp_path / ".pruned.unfinished" / "values.npy").write_text("half")
    prune_random(grouped, tmp_path / "pruned", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped", "pruned"]


def test_a_store_without_keys_is_refused(grouped: Datastore, tmp_path: Path) -> None:
    files = {name: record for name, record in grouped.manifest.files.items() if name != "keys.npy"}
    replace(grouped.manifest, keys=None, files=files).write(grouped.path)
    with pytest.raises(UserError, match="has no keys, which pruning needs"):
        prune_random(Datastore.open(grouped.path), tmp_path / "pruned", 0.5)


def test_the_script_prunes_by_each_method(store: Datastore, tmp_path: Path, monkeypatch, capsys) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["prune_datastore", *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    start = ("--datastore", store.path, "--output")
    out = run(*start, tmp_path / "confident", "--method", "confidence", "--keep", "0.5", "--device", "cpu")
    assert f"{round(len(store) / 2):,} of {len(store):,} entries (50" in out
    out = run(*start, tmp_path / "merged", "--method", "greedy_merge", "--neighbours", 20)
    assert "of weight" in out and len(Datastore.open(tmp_path / "merged")) < len(store)
    run(*start, tmp_path / "random", "--method", "random", "--keep", "0.5", "--seed", 3)
    assert Datastore.open(tmp_path / "random").manifest.pruned_from["seed"] == 3
    for arguments, message in (
        (("--method", "random", "--max_p", "0.5"), "--max_p does not go with the method random"),
        (("--method", "random"), "needs --keep"),
        (("--method", "confidence"), "either keep or max_p"),
    ):
        with pytest.raises(UserError, match=message):
            run(*start, tmp_path / "no", *arguments)
