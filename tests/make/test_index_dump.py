"""A dump straight into an index: as if keys had been kept and the index built from them, and no key remains."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make import dump, index_dump, key_reading
from knn_lm_eval.make.dump import Dump, dump_datastore, finish_dump, train_index_of
from knn_lm_eval.make.dump_progress import entries_done
from knn_lm_eval.make.index_dump import IndexDump
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.key_reading import KeyReader, entries_in
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.make.windows import BATCHES_PER_CHUNK, Window
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.search import index_build, indexing, quality, training
from knn_lm_eval.search.index_build import IndexBuild
from knn_lm_eval.search.index_memory import Allowance
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.passing_keys import NearestOfRuns
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import finite_keys
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.system.memory import parse_bytes

WINDOWS: dict[str, Any] = {"max_length": 48, "stride": 36, "batch_size": 2}
PLAN: dict[str, Any] = {"factory": "IVF8,SQ8", "quality_queries": 200, "k": 40}
OWN_FILES = {"values.npy", "document_starts.npy", "manifest.json"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, of several runs of keys, and a sample that is a part of the text."""
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 200)
    monkeypatch.setattr(index_dump, "SEGMENT_ENTRIES", 600)
    monkeypatch.setattr(training, "LEAST_SAMPLE", 300)


def pieces() -> list[tuple[bool, str]]:
    """Documents of many lengths."""
    words, lines, begin = TRAIN_TEXT[:7000].split(), [], 0
    while begin < len(words):
        length = 1 + (7 * len(lines)) % 90
        lines.append(" ".join(words[begin : begin + length]) + "\n")
        begin += length
    return list(cut_into_documents(lines, "line"))


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM) -> Datastore:
    return dump_datastore(lm, pieces(), tmp_path_factory.mktemp("stores") / "keyed", **WINDOWS)


@pytest.fixture
def keyless(tmp_path: Path, lm: CausalHFLM) -> Callable[..., Datastore]:
    """Dump without keys."""

    def dump(**plan: Any) -> Datastore:
        index = IndexPlan(**PLAN | plan)
        return dump_datastore(lm, pieces(), tmp_path / "keyless", **WINDOWS, keys="none", index=index)

    return dump


def same_index_from_keys(store: Datastore, sample: IndexDump, folder: Path, plan: dict[str, Any]) -> Datastore:
    """What ``build_index`` makes of kept keys, trained and measured with the entries that a dump had for it."""
    shutil.copytree(store.path, folder)
    copied = Datastore.open(folder)
    train, held_out = (sample.sample.drawn.entries[rows] for rows in sample._rows)

    def draw(of: Datastore, count: int, k: int, knn_temp: float, seed: int) -> quality.HeldOutQueries:
        keys = finite_keys(of.require_keys("a test")[held_out])
        return quality.HeldOutQueries(of, held_out, keys, min(k, len(of) - 1), knn_temp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "draw_entries", lambda *_: train)
        patch.setattr(quality.HeldOutQueries, "draw", draw)
        build_index(copied, **plan)
    return copied


def before_it_is_removed(monkeypatch: pytest.MonkeyPatch) -> list[IndexDump]:
    """What a dump knows when it is done, with the sample in memory."""
    found = []
    remove = IndexDump.remove

    def keep(self: IndexDump) -> None:
        assert self.sample.drawn and len(self._rows[0])
        found.append(self)
        remove(self)

    monkeypatch.setattr(IndexDump, "remove", keep)
    return found


def comparable(metadata: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name != "microseconds"} for row in metadata["quality"]]
    left_out = ("seconds", "keys_sha256", "train_sample", "sha256", "quality", "probe")
    return {name: value for name, value in metadata.items() if name not in left_out} | {"quality": rows}


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"factory": "IVF16_HNSW8,Flat", "sim_func": "dot"},
        {"factory": "RR32,IVF8,RaBitQfs", "parts": 3},
        {"factory": "auto", "name": "other"},
        {"factory": "IVF4,PQ4x4fs", "parts": 7, "quality_queries": 0},
    ],
    ids=lambda plan: plan.get("factory", "plain"),
)
def test_the_index_is_the_one_that_is_built_from_kept_keys(
    tmp_path: Path, with_keys: Datastore, keyless, monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any]
) -> None:
    done = before_it_is_removed(monkeypatch)
    store = keyless(**plan)
    assert store.keys is None and store.manifest.keys is None
    expected = same_index_from_keys(with_keys, done[0], tmp_path / "expected", PLAN | plan)
    name = plan.get("name", "index")
    made = {path.name for path in expected.path.glob(f"{name}*")}
    assert {path.name for path in store.path.iterdir()} == OWN_FILES | made
    assert len(made) == 1 + plan.get("parts", 1)
    for file in made - {f"{name}.json"} | {"values.npy", "document_starts.npy"}:
        assert (store.path / file).read_bytes() == (expected.path / file).read_bytes(), file
    ours, theirs = (json.loads((of.path / f"{name}.json").read_text()) for of in (store, expected))
    if plan.get("quality_queries", 1):
        assert comparable(ours) == comparable(theirs)
    else:
        assert "quality" not in ours
    assert set(store.manifest.derived) == made


def log_likelihood(model_folder: Path, store: Datastore, **arguments: Any) -> list[float]:
    lm = KNNHF(
        pretrained=str(model_folder),
        datastore=str(store.path),
        device="cpu",
        max_length=24,
        k=20,
        lmbda=0.5,
        **arguments,
    )
    requests = [Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    "arguments", [{}, {"retomaton": True, "min_knns": 5, "max_knns": 60}], ids=["knn", "retomaton"]
)
def test_evaluations_say_the_same_with_it(
    tmp_path: Path, with_keys: Datastore, keyless, monkeypatch, model_folder: Path, arguments: dict[str, Any]
) -> None:
    done = before_it_is_removed(monkeypatch)
    plan = PLAN | {"factory": "IVF8,PQ8"}
    store = keyless(**plan)
    expected = same_index_from_keys(with_keys, done[0], tmp_path / "expected", plan)
    given = {**arguments, "index": "index", "probe": 4}
    assert log_likelihood(model_folder, store, **given) == log_likelihood(model_folder, expected, **given)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM) -> Path:
    """What one process makes, in one segment."""
    folder = tmp_path_factory.mktemp("stores") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_stream, "ADD_CHUNK", 200)
        patch.setattr(training, "LEAST_SAMPLE", 300)
        dump_datastore(lm, pieces(), folder, **WINDOWS, keys="none", index=IndexPlan(**PLAN))
    return folder


def assert_same(folder: Path, expected: Path) -> None:
    assert {path.name for path in folder.iterdir()} == OWN_FILES | {"index.faiss", "index.json"}
    for file in ("values.npy", "document_starts.npy", "index.faiss"):
        assert (folder / file).read_bytes() == (expected / file).read_bytes(), file
    ours, theirs = (json.loads((of / "index.json").read_text()) for of in (folder, expected))
    assert comparable(ours) == comparable(theirs)
    Datastore.open(folder, verify="always")


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (dump, "write_values", 0),
        (KeyReader, "of_batch", 2),
        (index_dump, "train_index", 0),
        (IndexBuild, "begin", 0),
        (KeyReader, "of_chunk", 0),
        (KeyReader, "of_chunk", 8),
        (NearestOfRuns, "take", 2),
        (index_dump, "write_segment", 3),
        (index_build, "join_segments", 0),
        (index_dump, "compare_with_exact", 0),
        (IndexBuild, "put_in_place", 0),
        (index_build, "write_sealed_json", 0),
        (Manifest, "write", 0),
        (IndexDump, "remove", 0),
    ],
)
def test_an_interrupted_one_goes_on_to_the_same_bytes(
    tmp_path: Path, lm: CausalHFLM, alone: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    called: list[str] = []
    original = getattr(owner, name)

    def counted(*arguments: Any, **more: Any) -> Any:
        called.append(name)
        if len(called) > calls:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    def make(resume: bool) -> Datastore:
        given: dict[str, Any] = {"keys": "none", "index": IndexPlan(**PLAN), "resume": resume, **WINDOWS}
        return dump_datastore(lm, pieces(), tmp_path / "store", **given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, counted)
        make(resume=False)
    if (tmp_path / "store" / "manifest.json").exists():  # never without its index
        assert (tmp_path / "store" / "index.json").exists()
    with pytest.raises(UserError, match="add --resume|already holds a finished"):
        make(resume=False)
    read: list[int] = []
    of_batch = KeyReader.of_batch
    monkeypatch.setattr(KeyReader, "of_batch", lambda self, batch: read.append(len(batch)) or of_batch(self, batch))
    make(resume=True)
    if name in ("join_segments", "compare_with_exact", "put_in_place", "write", "remove"):
        assert not read  # the LM has done its part
    assert_same(tmp_path / "store", alone)


def batches_read(monkeypatch: pytest.MonkeyPatch) -> list[list[Window]]:
    """What the LM reads from now on."""
    read: list[list[Window]] = []
    keys_of_windows = key_reading.keys_of_windows

    def note(model: LanguageModel, prefix: int, values: np.ndarray, batch: list[Window]) -> Iterator[torch.Tensor]:
        read.append(batch)
        return keys_of_windows(model, prefix, values, batch)

    monkeypatch.setattr(key_reading, "keys_of_windows", note)
    return read


def test_the_lm_reads_each_token_once(keyless, monkeypatch: pytest.MonkeyPatch) -> None:
    read = batches_read(monkeypatch)
    store = keyless()
    starts = [window.start for batch in read for window in batch]
    assert len(starts) == len(set(starts)) and sum(map(entries_in, read)) == len(store)


def test_a_sample_that_is_gone_is_read_again(
    tmp_path: Path, lm: CausalHFLM, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"

    def begun() -> Dump:
        return Dump(lm, folder, **WINDOWS, keys="none", index=IndexPlan(**PLAN))

    begun().prepare(pieces(), resume=False)
    begun().read_sample(0, 1)
    train_index_of(folder)
    (folder / index_dump.WORK / "sample.npy.part").unlink()
    dump_datastore(lm, [], folder, **WINDOWS, keys="none", index=IndexPlan(**PLAN), resume=True)
    assert_same(folder, alone)


@pytest.mark.parametrize("shares", [2, 5])
def test_several_processes_make_the_same(
    tmp_path: Path, lm: CausalHFLM, alone: Path, monkeypatch: pytest.MonkeyPatch, shares: int
) -> None:
    folder = tmp_path / "store"
    read = batches_read(monkeypatch)

    def begun() -> Dump:
        return Dump(lm, folder, **WINDOWS, keys="none", index=IndexPlan(**PLAN))

    begun().prepare(pieces(), resume=False, shares=shares)
    for share in reversed(range(shares)):
        begun().read_sample(share, shares)
    train_index_of(folder)
    if shares > 2:  # killed after one of them, and gone on with by fewer
        begun().write_share(1, shares)
        shares = 2
        begun().prepare([], resume=True, shares=shares)
        begun().read_sample(0, shares)
        train_index_of(folder)
    for share in reversed(range(shares)):
        begun().write_share(share, shares)
        begun().write_share(share, shares)  # once more, as Ray does where a task died when it was done
    count = len(np.load(folder / "values.npy"))
    assert entries_done(folder) == count
    # Nothing is read twice but what lies across the ends of shares.
    longest = (BATCHES_PER_CHUNK * WINDOWS["batch_size"] + 1) * WINDOWS["max_length"]
    assert count <= sum(map(entries_in, read)) <= count + (shares - 1) * longest
    finish_dump(folder)
    assert_same(folder, alone)


def test_what_the_disk_has_no_room_for_is_said_before_the_lm_reads(
    tmp_path: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(KeyReader, "of_batch", None)
    sentence = r"the index of [\d,]+ tokens while it is made \(.* GiB\), keys of a sample \(.*\) and keys on their way"
    with pytest.raises(UserError, match=sentence):
        dump_datastore(lm, pieces(), tmp_path, **WINDOWS, keys="none", index=IndexPlan(**PLAN))


@pytest.mark.parametrize(
    ("plan", "sample", "what"),
    [
        ({"quality_queries": 0}, 1000, "Training IVF8,SQ8 on 1,000 keys of 32 numbers"),
        ({"quality_queries": 0, "factory": "IVF4,SQ8"}, 300, "Adding keys to IVF4,SQ8, 200 at a time,"),
        ({}, 300, "Measuring the index with 200 queries"),
    ],
)
def test_memory_that_is_too_little_is_said_before_the_lm_reads(
    tmp_path: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], sample: int, what: str
) -> None:
    monkeypatch.setattr(training, "LEAST_SAMPLE", sample)
    given: dict[str, Any] = {"keys": "none", "index": IndexPlan(**PLAN | plan), **WINDOWS}
    with monkeypatch.context() as patch:
        patch.setattr(KeyReader, "of_batch", None)
        with pytest.raises(UserError, match=f"^{what} takes about 1MiB of memory, and 0MiB may be taken: ") as error:
            dump_datastore(lm, pieces(), tmp_path, **given, memory=2**20)
    enough = re.search("give --memory ([0-9.]+[MG]iB) or more, or another --factory[.]$", str(error.value))
    assert enough is not None
    memory = parse_bytes(enough[1]) + 2**25  # what this test itself takes meanwhile
    assert len(dump_datastore(lm, pieces(), tmp_path, **given, resume=True, memory=memory))


def test_the_index_does_not_depend_on_the_memory(
    tmp_path: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less, segments have fewer entries, but for those that are begun, which it is too little for."""
    found: list[int] = []
    plan, remove = IndexPlan(factory="IVF4,SQ8", quality_queries=0), IndexDump.remove
    monkeypatch.setattr(IndexDump, "remove", lambda self: found.append(len(self.segments)) or remove(self))

    def dump_within(free: int, folder: str, resume: bool = False) -> None:
        monkeypatch.setattr(Allowance, "of", lambda memory: Allowance(free, 0))
        dump_datastore(lm, pieces(), tmp_path / folder, **WINDOWS, keys="none", index=plan, resume=resume)

    little = 165_000
    dump_within(2**30, "much")
    dump_within(little, "little")
    assert found[0] * 3 - 2 <= found[1] <= found[0] * 3
    assert (tmp_path / "much" / "index.faiss").read_bytes() == (tmp_path / "little" / "index.faiss").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(KeyReader, "of_batch", None)
        dump_within(2**30, "begun")
    with pytest.raises(UserError, match="Adding keys to IVF4,SQ8, 600 at a time, takes about"):
        dump_within(little, "begun", resume=True)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"factory": "IVF8,Nonsense"}, "faiss knows no index 'IVF8,Nonsense'"),
        ({"factory": "Flat"}, "Flat cannot be joined"),
        ({"factory": "IVF8,PQ5"}, "faiss cannot make an index 'IVF8,PQ5' for keys of 32 numbers"),
        ({"factory": "IVF100000,SQ8"}, "more lists than the store has entries"),
        ({"parts": 10**6}, "parts=1000000 must be between 1 and"),
        ({"sim_func": "cosine"}, "sim_func='cosine' is unknown"),
        ({"name": "keys"}, "'keys' cannot name an index"),
    ],
)
def test_a_mistake_in_the_index_is_said_before_the_lm_reads(
    tmp_path: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(KeyReader, "of_batch", None)
    with pytest.raises(UserError, match=sentence):
        dump_datastore(lm, pieces(), tmp_path, **WINDOWS, keys="none", index=IndexPlan(**plan))
    assert not (tmp_path / "manifest.json").exists()


def test_other_settings_do_not_resume(tmp_path: Path, lm: CausalHFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(KeyReader, "of_batch", None)
        dump_datastore(lm, pieces(), tmp_path, **WINDOWS, keys="none", index=IndexPlan(**PLAN))
    for keys, index in (("none", IndexPlan(**PLAN | {"factory": "IVF4,SQ8"})), ("all", None)):
        with pytest.raises(UserError, match="was begun with .*give the same settings, or delete the folder"):
            dump_datastore(lm, pieces(), tmp_path, **WINDOWS, keys=keys, index=index, resume=True)


def test_an_index_is_for_dumps_without_keys(tmp_path: Path, lm: CausalHFLM) -> None:
    with pytest.raises(UserError, match="An index is made where keys=none"):
        dump_datastore(lm, pieces(), tmp_path, **WINDOWS, index=IndexPlan())
    with pytest.raises(UserError, match="which memory is for; with keys, use build_index"):
        dump_datastore(lm, pieces(), tmp_path, **WINDOWS, memory=2**30)


def test_a_text_of_one_token_and_one_of_few(tmp_path: Path, lm: CausalHFLM) -> None:
    for number, text in enumerate(["a", "Some words."]):
        store = dump_datastore(
            lm, [(True, text)], tmp_path / str(number), **WINDOWS, keys="none", index=IndexPlan(factory="IVF1,SQ8")
        )
        assert len(store) == len(lm.tok_encode(text)) and "index.faiss" in store.manifest.derived
