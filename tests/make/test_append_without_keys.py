"""A store without keys that grows and shrinks: its index is that of a store with keys to which the same was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.dumped_indexes import before_it_is_removed, same_index_from_keys
from helpers.stores import change_json
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make import appending, index_dump
from knn_lm_eval.make.appending import append_documents, worth_training
from knn_lm_eval.make.compacting import compact_datastore
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.text import Piece
from knn_lm_eval.search import training
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import index_names
from knn_lm_eval.store.whole_store import verify_store

WORDS = TRAIN_TEXT.split()
OLD = [" ".join(WORDS[start : start + 60]) for start in range(0, 900, 60)]
NEW = [EVAL_TEXT[:300], *(" ".join(WORDS[start : start + 150]) for start in range(900, 1500, 150))]
WINDOWS: dict[str, Any] = {"max_length": 48, "stride": 36, "batch_size": 2}
SOURCE = {"text": "new.txt", "documents": "line"}
PLANS: list[dict[str, Any]] = [
    {"factory": "IVF8,SQ8"},
    {"factory": "IVF4,Flat", "sim_func": "dot"},
    {"factory": "RR32,IVF8,RaBitQfs", "parts": 3},
    {"factory": "OPQ4_16,IVF4,PQ4x4fs"},
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, of several runs of keys."""
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 200)
    monkeypatch.setattr(index_dump, "SEGMENT_ENTRIES", 400)
    monkeypatch.setattr(training, "LEAST_SAMPLE", 300)


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path) -> Datastore:
    arguments: dict[str, Any] = {"model_args": {"pretrained": str(model_folder)}, "source": {"documents": "line"}}
    return dump_datastore(lm, pieces(OLD), tmp_path_factory.mktemp("stores") / "keyed", **WINDOWS, **arguments)


@pytest.fixture
def dumped(tmp_path: Path, lm: CausalHFLM, model_folder: Path) -> Callable[..., Path]:
    """Dump the same text without keys."""

    def dump(**plan: Any) -> Path:
        index = IndexPlan(**{"factory": "IVF8,SQ8", "quality_queries": 100, "k": 20} | plan)
        arguments: dict[str, Any] = {"model_args": {"pretrained": str(model_folder)}, "source": {"documents": "line"}}
        return dump_datastore(
            lm, pieces(OLD), tmp_path / "keyless", **WINDOWS, **arguments, keys="none", index=index
        ).path

    return dump


def pieces(documents: list[str]) -> list[Piece]:
    return [(True, document) for document in documents]


def append(folder: Path, lm: CausalHFLM, documents: list[str] = NEW, **more: Any) -> Datastore:
    return append_documents(folder, lm, pieces(documents), source=SOURCE, **more)


def files_of(folder: Path) -> dict[str, Any]:
    """All files but locks; of JSON what does not say when it was made."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            found[path.relative_to(folder).as_posix()] = timeless(path) if path.suffix == ".json" else path.read_bytes()
    return found


def timeless(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    for record in [content, *content.get("appended", [])]:
        for name in ("created", "sha256"):
            record.pop(name, None)
    return content


def score(folder: Path, lm: CausalHFLM, **settings: Any) -> list[float]:
    arguments = {"k": 12, "lmbda": 0.5, "probe": 3} | settings
    augmented = KNNHF(lm.model, tokenizer=lm.tokenizer, datastore=folder, batch_size=2, **arguments)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (EVAL_TEXT[:300], NEW[1], OLD[3])]
    return augmented.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["factory"])
def test_the_index_is_that_of_a_store_with_keys(
    plan: dict[str, Any],
    dumped: Callable[..., Path],
    with_keys: Datastore,
    lm: CausalHFLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        dump = before_it_is_removed(patch)
        keyless = dumped(**plan)
    plan = {"quality_queries": 100, "k": 20} | plan
    keyed = same_index_from_keys(with_keys, dump[0], tmp_path / "keyed", plan).path
    texts = [*NEW, *OLD, *NEW]  # more than a segment
    stores = [append(folder, lm, texts) for folder in (keyless, keyed)]
    assert len(stores[0]) - len(with_keys) > 2 * index_dump.SEGMENT_ENTRIES and stores[0].keys is None
    names = sorted(path.name for path in keyed.glob("*.faiss"))
    assert names == sorted(path.name for path in keyless.glob("*.faiss")) and len(names) == 1 + plan.get("parts", 0)
    for name in (*names, "values.npy", "document_starts.npy"):
        assert (keyless / name).read_bytes() == (keyed / name).read_bytes(), name
    said = [json.loads((folder / "index.json").read_text()) for folder in (keyless, keyed)]
    for name in ("count", "bytes", "bytes_held", "parts", "probe", "quality_queries"):
        assert said[0].get(name) == said[1].get(name), name
    assert said[0]["measured_with"]["count"] == len(with_keys)
    assert all(verdict.fault is None for verdict in verify_store(keyless))
    assert not (keyless / "keys.npy").exists() and not (keyless / ".appending").exists()
    assert score(keyless, lm) == score(keyed, lm)
    assert [sentence[-20:] for sentence in worth_training(stores[0])] == ["dump all text again."]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["factory"])
def test_append_remove_compact_is_what_was(plan: dict[str, Any], dumped: Callable[..., Path], lm: CausalHFLM) -> None:
    folder = dumped(**plan)
    before, scores = files_of(folder), score(folder, lm)
    append(folder, lm)
    assert score(folder, lm)[0] > scores[0] + 5
    remove_documents(folder, range(len(OLD), len(OLD) + len(NEW)))
    assert score(folder, lm) == scores
    compact_datastore(folder)
    for made in (*folder.glob("*.scan"), *folder.glob("*.codes")):
        shutil.rmtree(made)
    assert files_of(folder) == before


def test_what_was_interrupted_goes_on(
    dumped: Callable[..., Path], lm: CausalHFLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dumped()
    expected = files_of(append(Path(shutil.copytree(folder, tmp_path / "undisturbed")), lm, NEW + OLD).path)
    before, own = files_of(folder), index_dump.write_segment
    written: list[Path] = []

    def end_at_second(trained: Path, keys: Any, output: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(output)
        own(trained, keys, output)

    with monkeypatch.context() as patch:
        patch.setattr(index_dump, "write_segment", end_at_second)
        with pytest.raises(KeyboardInterrupt):
            append(folder, lm, NEW + OLD)
    assert written and {name: files_of(folder)[name] for name in before} == before

    def fail(*_: object) -> None:
        raise UserError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(appending, "join_index", fail)
        with pytest.raises(UserError, match="no more"):
            append(folder, lm, NEW + OLD, resume=True)
    assert {name: files_of(folder)[name] for name in before} == before
    with monkeypatch.context() as patch:  # all was read
        patch.setattr(appending, "dump_datastore", fail)
        append(folder, lm, NEW + OLD, resume=True)
    assert files_of(folder) == expected
    append(folder, lm, NEW + OLD, resume=True)  # it is done
    assert files_of(folder) == expected


def test_keys_are_on_the_disk_a_segment_at_a_time(
    dumped: Callable[..., Path], lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = dumped(), list[int]()
    own = index_dump.write_segment

    def look(trained: Path, keys: Any, output: Path) -> None:
        spools = list((folder / ".appending").rglob("keys.*.npy"))
        seen.append(sum(path.stat().st_size for path in spools) // (2 * keys.shape[1]))
        own(trained, keys, output)

    monkeypatch.setattr(index_dump, "write_segment", look)
    append(folder, lm, NEW + OLD + NEW)
    assert len(seen) > 3 and max(seen) < 3 * index_dump.SEGMENT_ENTRIES


def test_what_cannot_grow_is_said_before_the_text_is_read(
    dumped: Callable[..., Path], lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dumped(parts=2)
    monkeypatch.setattr("knn_lm_eval.search.changed_index.MOST_PARTS", 2)
    with pytest.raises(UserError, match="has 2 parts, the most there can be"):
        append(folder, lm)
    change_json(folder / "index.json", part_ids="absolute")
    monkeypatch.undo()
    monkeypatch.setattr(Datastore, "open", lambda path: _unverified(path))
    with pytest.raises(UserError, match="number entries as the store does.*without keys.*dump all text again"):
        append(folder, lm)
    for path in folder.glob("index.*"):
        path.unlink()
    assert not index_names(_unverified(folder))
    with pytest.raises(UserError, match="has no keys, and 0 indexes"):
        append(folder, lm)
    assert not (folder / ".appending").exists()


_open = Datastore.open


def _unverified(path: str | Path) -> Datastore:
    return _open(path, verify="never")
