"""Dumps of narrower keys: keys are the hidden states' projection, whoever shares the work, and so are queries."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracle import continuation_score, knn_lm_distributions
from helpers.ready import launch, script
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT, make_llama
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, UserError, retrieval_augmented
from knn_lm_eval.lm.fingerprint import take_fingerprint
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.projection import Projection
from knn_lm_eval.make import dump as dumping
from knn_lm_eval.make.dump import Dump, dump_datastore, finish_dump
from knn_lm_eval.make.key_reading import KeyReader
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import PROJECTION

KEYS = 12
FILES = ("keys.npy", "values.npy", "document_starts.npy", PROJECTION)


def dump(lm: CausalHFLM, output: Path, **changes) -> Datastore:
    pieces = cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "line")
    return dump_datastore(lm, pieces, output, **({"batch_size": 2, "keys": KEYS} | changes))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path) -> Datastore:
    store = dump(lm, tmp_path_factory.mktemp("stores") / "narrow", model_args={"pretrained": str(model_folder)})
    build_index(store, "Flat")
    return Datastore.open(store.path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM) -> Datastore:
    return dump(lm, tmp_path_factory.mktemp("stores") / "whole", keys="all")


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, whole: Datastore) -> Datastore:
    """Keys of as many numbers as the hidden states have: turned, and nothing left out."""
    return dump(lm, tmp_path_factory.mktemp("stores") / "turned", keys=whole.dimension)


def assert_same_files(store: Path, expected: Datastore) -> None:
    for name in FILES:
        assert (store / name).read_bytes() == (expected.path / name).read_bytes(), name
    manifest = Datastore.open(store).manifest
    assert manifest.files == expected.manifest.files and manifest.projection == expected.manifest.projection
    assert not list(store.glob("*.part")) and not list(store.glob("progress*"))


def test_keys_are_the_projection_of_the_hidden_states(narrow: Datastore, whole: Datastore) -> None:
    assert narrow.keys.shape == (len(whole), KEYS) and narrow.dimension == KEYS and narrow.keys.dtype == np.float16
    assert narrow.projection.shape == (whole.dimension, KEYS) and narrow.projection.dtype == np.float32
    expected = whole.keys.astype(np.float64) @ narrow.projection.astype(np.float64)
    np.testing.assert_allclose(narrow.keys, expected, atol=2e-2)
    assert np.array_equal(narrow.values, whole.values)


def test_the_manifest_says_so_and_keeps_the_models_own_key(narrow: Datastore, whole: Datastore) -> None:
    projection = narrow.manifest.projection
    assert projection is not None and projection["from"] == whole.dimension == narrow.manifest.width
    assert projection["kind"] == "pca" and 0.1 < projection["variance_kept"] < 1
    assert narrow.manifest.fingerprint == whole.manifest.fingerprint
    assert "projection" not in whole.manifest.to_json() and whole.projection is None


def test_a_fingerprint_is_the_models_own(lm: CausalHFLM, narrow: Datastore) -> None:
    model = LanguageModel(lm.model)
    projected = model.projected(Projection(narrow.projection))
    assert take_fingerprint(projected, None) == take_fingerprint(model, None)
    assert projected.encode(torch.tensor([[1, 2, 3]]))[0].shape == (1, 3, KEYS)


def score(model_folder: Path, store: Datastore, **settings: object) -> list[tuple[float, ...]]:
    lm = KNNHF(pretrained=str(model_folder), datastore=str(store.path), batch_size=3, k=50, lmbda=0.5, **settings)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (EVAL_TEXT, EVAL_TEXT[100:300])]
    pairs = [Instance("loglikelihood", {}, ("The operator module", end), 0) for end in (" also", " x")]
    return [(score,) for score in lm.loglikelihood_rolling(texts)] + lm.loglikelihood(pairs)


@pytest.mark.parametrize("settings", [{}, {"knn_sim_func": "dot", "knn_temp": 30.0}, {"retomaton": True}])
def test_keys_that_are_turned_change_nothing(
    model_folder: Path, turned: Datastore, whole: Datastore, settings: dict[str, object]
) -> None:
    before, after = score(model_folder, whole, **settings), score(model_folder, turned, **settings)
    for expected, actual in zip(before, after, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=5e-3)


@pytest.mark.parametrize("index", [None, "index"])
def test_scores_are_those_of_projected_queries(model_folder: Path, narrow: Datastore, index: str | None) -> None:
    lm = KNNHF(pretrained=str(model_folder), datastore=str(narrow.path), k=50, lmbda=0.5, knn_temp=2.0, index=index)
    mlp = lm.model.model.layers[-1].mlp
    context, continuation = lm.tok_encode("The operator module"), lm.tok_encode(" also defines")
    [actual] = lm.loglikelihood([Instance("loglikelihood", {}, ("The operator module", " also defines"), 0)])
    distributions = knn_lm_distributions(
        lm.model,
        mlp,
        (context + continuation)[-(MAX_LENGTH + 1) : -1],
        narrow.keys,
        narrow.values,
        k=50,
        lmbda=0.5,
        temperature=2.0,
        directions=narrow.projection,
    )
    expected = continuation_score(distributions, continuation)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)


def test_generation_is_that_of_projected_queries(
    model_folder: Path, lm: CausalHFLM, whole: Datastore, turned: Datastore
) -> None:
    ids = torch.tensor([lm.tok_encode("The operator module also")])
    before, after = (
        retrieval_augmented(lm.model, store.path, k=50, lmbda=0.5, knn_temp=2.0) for store in (whole, turned)
    )
    with before:
        expected = lm.model(ids).logits
    with after:
        actual = lm.model(ids).logits
        tokens = lm.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, ids.shape[1] + 5)
    np.testing.assert_allclose(actual.exp().numpy(), expected.exp().numpy(), atol=5e-3)


def test_another_model_is_told_by_its_own_key(narrow: Datastore) -> None:
    with pytest.raises(UserError, match="keys have 32 numbers and this model's 48"):
        retrieval_augmented(make_llama(hidden_size=48), narrow.path)


def test_shares_write_what_one_process_writes(lm: CausalHFLM, narrow: Datastore, tmp_path: Path) -> None:
    work = Dump(lm, tmp_path, batch_size=2, keys=KEYS)
    work.prepare(cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "line"), resume=False)
    for share in (2, 0, 1):
        Dump(lm, tmp_path, batch_size=2, keys=KEYS).write_share(share, 3)
    finish_dump(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (narrow.path / name).read_bytes(), name


@pytest.mark.parametrize(
    "owner, ends_in, call", [(Dump, "_write_projection", 1), (KeyReader, "of_chunk", 2)], ids=["projection", "keys"]
)
def test_an_interrupted_dump_is_gone_on_with(
    lm: CausalHFLM,
    narrow: Datastore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    ends_in: str,
    call: int,
) -> None:
    wanted, calls = getattr(owner, ends_in), []

    def ends(self: object, *arguments: object) -> object:
        calls.append(arguments)
        result = wanted(self, *arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, ends_in, ends)
        with pytest.raises(KeyboardInterrupt):
            dump(lm, tmp_path / "s")
    with pytest.raises(UserError, match=r"begun with keys=12, now it is keys=13"):
        dump(lm, tmp_path / "s", keys=13, resume=True)
    resumed = dump(lm, tmp_path / "s", resume=True)
    for name in FILES:
        assert (resumed.path / name).read_bytes() == (narrow.path / name).read_bytes(), name
    assert resumed.manifest.projection == narrow.manifest.projection


def test_keys_of_a_lost_projection_are_written_anew(
    lm: CausalHFLM, narrow: Datastore, whole: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Dump(lm, tmp_path, batch_size=2, keys=KEYS)
    work.prepare(cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "line"), resume=False)
    work.write_share(0, 2)
    (tmp_path / PROJECTION).unlink()
    monkeypatch.setattr(dumping, "sample_size", lambda width: 300)  # so that there will be another
    store = dump(lm, tmp_path, resume=True)
    assert not np.allclose(store.projection, narrow.projection, atol=1e-2)
    expected = whole.keys.astype(np.float64) @ store.projection.astype(np.float64)
    np.testing.assert_allclose(store.keys, expected, atol=2e-2)


@pytest.mark.parametrize("keys", [33, 100])
def test_more_numbers_than_there_are_cannot_be_kept(lm: CausalHFLM, tmp_path: Path, keys: int) -> None:
    with pytest.raises(UserError, match=f"have 32 numbers, of which --keys {keys} cannot be kept"):
        dump(lm, tmp_path / "s", keys=keys)
    assert not (tmp_path / "s").exists() or not list((tmp_path / "s").iterdir())


@pytest.mark.slow
def test_two_processes_and_the_verb(tmp_path: Path, model_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TRAIN_TEXT, encoding="utf-8")
    stores = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        words = ["--model_args", f"pretrained={model_folder}", "--text", text, "--keys", KEYS, "--output", output]
        for run in launch(script("dump_datastore", *words), processes, os.environ | {"ACCELERATE_USE_CPU": "true"}):
            assert run.wait(300) == 0, run.printed()
        stores.append(Datastore.open(output))
    assert_same_files(stores[1].path, stores[0])
    assert stores[0].projection is not None


def test_another_stores_projection_is_shared(
    lm: CausalHFLM, narrow: Datastore, whole: Datastore, tmp_path: Path
) -> None:
    shared = dump(lm, tmp_path / "shared", keys="all", projection_of=narrow.path, max_tokens=300)
    assert (shared.path / PROJECTION).read_bytes() == (narrow.path / PROJECTION).read_bytes()
    assert shared.manifest.projection == narrow.manifest.projection
    expected = whole.keys[:200].astype(np.float64) @ narrow.projection
    np.testing.assert_allclose(shared.keys[:200], expected, atol=2e-2)
    with pytest.raises(UserError, match="are no projection"):
        dump(lm, tmp_path / "none", keys="all", projection_of=whole.path)
