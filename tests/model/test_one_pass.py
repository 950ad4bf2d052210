"""search_all: one search for all texts changes no score, whatever finds the neighbours and mixes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import Passage
from knn_lm_eval.methods.adaptive import LM_FEATURES, Buckets, Gate
from knn_lm_eval.model import one_pass
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.one_pass import OnePassScorer
from knn_lm_eval.model.scoring import KNNScorer
from knn_lm_eval.search import key_blocks
from knn_lm_eval.store.datastore import Datastore

TEXTS = [EVAL_TEXT, TRAIN_TEXT[300:700], EVAL_TEXT[100:350]]
BUCKETS = Buckets((20.0, 40.0), (0.6, 0.3, 0.05)).plain()
GATE = Gate(
    LM_FEATURES,
    mean=(-1.0,) * len(LM_FEATURES),
    std=(1.5,) * len(LM_FEATURES),
    hidden=((0.5, -0.8),),
    hidden_bias=(0.1,),
    output=(1.2,),
    bias=-0.5,
    threshold=0.1717,  # about half of the weights are below
)


def rolling(lm: KNNHF) -> list[Any]:
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(TEXTS)]
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    return [(float(score), score.num_searches) for score in found]


def choices(lm: KNNHF) -> list[Any]:
    pairs = [(EVAL_TEXT[:60], EVAL_TEXT[60:80]), (EVAL_TEXT[:60], " is"), (EVAL_TEXT[:60], " an"), ("", "the")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("lmbda", [0.25, BUCKETS, GATE.plain()], ids=["number", "buckets", "gate"])
@pytest.mark.parametrize("index", ["index", "exact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_the_same(
    store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch, lmbda: Any, index: str, dtype: str
) -> None:
    usual = {"pretrained": str(model_folder), "datastore": store.path, "k": 20, "lmbda": lmbda, "knn_temp": 10.0}
    usual |= {"batch_size": 2, "device": "cpu", "index": index, "dtype": dtype}
    lm, at_once = KNNHF(**usual), KNNHF(**usual, search_all=True)
    assert isinstance(lm.scorer, KNNScorer) and isinstance(at_once.scorer, OnePassScorer)
    searches: list[int] = []
    search = at_once.retriever.search
    monkeypatch.setattr(at_once.retriever, "search", lambda queries: searches.append(len(queries)) or search(queries))
    expected, found = rolling(lm), rolling(at_once)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-6)
    assert [made for _, made in found] == [made for _, made in expected]
    assert len(searches) == 1
    assert sum(searches) == lm.retriever.statistics.searches > 20  # with a gate, of those positions alone that want it
    np.testing.assert_allclose(*[[score for score, _ in choices(one)] for one in (lm, at_once)], rtol=1e-6)
    assert [greedy for _, greedy in choices(lm)] == [greedy for _, greedy in choices(at_once)]
    assert lm.scorer.counts.keys() == at_once.scorer.counts.keys()


def test_a_gate_saves_searches_here(store: Datastore, model_folder: Path) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=5, lmbda=GATE.plain(), device="cpu", search_all=True)
    rolling(lm)
    assert 0 < lm.scorer.counts["rows_skipped"] < lm.scorer.counts["rows"]
    never = replace(GATE, threshold=1.0).plain()
    lm = KNNHF(str(model_folder), datastore=store.path, k=5, lmbda=never, device="cpu", search_all=True)
    alone = KNNHF(str(model_folder), datastore=store.path, k=5, lmbda=0, device="cpu")
    np.testing.assert_allclose([s for s, _ in rolling(lm)], [s for s, _ in rolling(alone)], rtol=1e-5)
    assert lm.retriever.statistics.searches == 0


def test_searches_are_as_many_as_memory_asks_for(store: Datastore, model_folder: Path) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cpu", search_all=True)
    expected = rolling(lm)
    searches: list[int] = []
    search = lm.retriever.search
    lm.retriever.search = lambda queries: searches.append(len(queries)) or search(queries)  # type: ignore[method-assign]
    assert isinstance(lm.scorer, OnePassScorer)
    lm.scorer.search_bytes = 100_000
    assert [score for score, _ in rolling(lm)] == pytest.approx([score for score, _ in expected], rel=1e-6)
    assert len(searches) > 3 and max(searches) * 20 * one_pass.SEARCHED_BYTES <= 100_000


def test_nothing_is_left_behind(
    store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KNN_LM_EVAL_CACHE", str(tmp_path / "cache"))
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, device="cpu", search_all=True, verify="never")

    def interrupted(queries: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.retriever, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rolling(lm)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="Not enough disk space"):
        rolling(lm)


def test_it_comes_by_itself_where_keys_do_not_fit(
    store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"pretrained": str(model_folder), "datastore": store.path, "k": 20, "device": "cpu"}
    assert isinstance(KNNHF(**settings, index="exact").scorer, KNNScorer)
    monkeypatch.setattr(key_blocks, "available_bytes", lambda: store.require_keys("a test").nbytes)
    assert isinstance(KNNHF(**settings, index="exact").scorer, OnePassScorer)
    assert isinstance(KNNHF(**settings, index="exact", search_all=False).scorer, KNNScorer)
    assert isinstance(KNNHF(**settings).scorer, KNNScorer)  # an index's own business


def test_it_is_not_for_retomaton(store: Datastore, model_folder: Path) -> None:
    with pytest.raises(UserError, match="search_all=True is not for RetoMaton"):
        KNNHF(str(model_folder), datastore=store.path, k=20, device="cpu", search_all=True, retomaton=True)


def test_a_gpus_batch_size_is_found_without_a_search(store: Datastore, model_folder: Path) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, device="cpu", search_all=True)
    lm.scorer.try_out([[Passage([1, 2, 3], [[4, 5]])] * 2], False)
    assert lm.retriever.statistics.searches == 0


GROUPS = Path("/sys/fs/cgroup/memory")
LIMIT, ROWS, DIMENSION = 2**29, 600_000, 576  # keys of 691 MB
CHILD = """
import sys, json
import numpy as np
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.system.memory import available_bytes, resident_bytes

keys = np.load(sys.argv[1], mmap_mode="r")
queries = np.load(sys.argv[2])
search = ExactSearch(keys, "l2")
found = search.search(queries, 16)
print(json.dumps({
    "streams": search.streams,
    "available": available_bytes(),
    "peak": resident_bytes()["peak_resident"],
    "distances": found[0].tolist(),
    "entries": found[1].tolist(),
}))
"""


@pytest.mark.skipif(not os.access(GROUPS, os.W_OK), reason="needs memory control groups that can be written to")
def test_a_store_larger_than_a_memory_limit(tmp_path: Path) -> None:
    """All of a process that may have less memory than the keys take; pages of mapped files count as well."""
    rng = np.random.default_rng(0)
    keys = np.lib.format.open_memmap(tmp_path / "keys.npy", "w+", np.float16, (ROWS, DIMENSION))
    block = rng.standard_normal((20_000, DIMENSION)).astype(np.float16)
    for start in range(0, ROWS, len(block)):
        keys[start : start + len(block)] = np.roll(block, start // len(block), axis=1)
    keys.flush()
    queries = keys[[5, 300_000, 599_999]].astype(np.float32) + 0.1
    np.save(tmp_path / "queries.npy", queries)
    group = GROUPS / f"knn-lm-eval-{uuid.uuid4().hex[:12]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        process = subprocess.run(
            [sys.executable, "-c", CHILD, tmp_path / "keys.npy", tmp_path / "queries.npy"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        assert process.returncode == 0, process.stderr
        most = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    found = json.loads(process.stdout)
    assert found["streams"] and found["available"] <= LIMIT < keys.nbytes
    assert most <= LIMIT
    for row, query in enumerate(queries):
        distances = np.concatenate(
            [((keys[s : s + 20_000] - query.astype(np.float32)) ** 2).sum(1) for s in range(0, ROWS, 20_000)]
        )
        entries = np.argsort(distances, kind="stable")[:16]
        assert found["entries"][row] == entries.tolist()
        np.testing.assert_allclose(found["distances"][row], distances[entries], rtol=1e-5)
