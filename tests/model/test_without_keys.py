"""A store without keys: what its index can do gives the numbers that a store with keys gives; the rest is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stores import without_keys
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore, UserError, retrieval_augmented
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.growing import grow_datastore
from knn_lm_eval.make.projecting import project_datastore
from knn_lm_eval.make.pruning import prune_confidence, prune_greedy_merge, prune_random
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.whole_store import verify_store
from knn_lm_eval.study.foss_curve import CurveScorer
from knn_lm_eval.study.grid import Grid
from knn_lm_eval.study.grid_scorer import GridScorer
from knn_lm_eval.study.index_comparison import compare_indexes
from knn_lm_eval.study.inspection import inspect_text

INDEXES = {
    "index": "RR32,IVF16,RaBitQfs",
    "plain": "IVF16,RaBitQ",
    "pq": "IVF16,PQ8",
    "bits": "IVF16,RaBitQfs4",
    "sq": "IVF16,SQ8",
}
COMMON: dict[str, Any] = {"k": 30, "lmbda": 0.5, "knn_temp": 4.0, "batch_size": 2}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, clustered: Datastore) -> Datastore:
    folder = tmp_path_factory.mktemp("keyed") / "store"
    shutil.copytree(clustered.path, folder, ignore=shutil.ignore_patterns("index.*", "*.codes", "lm_log_probs*"))
    for name, factory in INDEXES.items():
        build_index(Datastore.open(folder), factory, name=name, quality_queries=0)
    return Datastore.open(folder)


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory, keyed: Datastore) -> Datastore:
    return without_keys(keyed, tmp_path_factory.mktemp("keyless") / "store")


def rolling(lm: KNNHF) -> list[float]:
    return [float(one) for one in lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)])]


def test_it_is_whole(keyless: Datastore) -> None:
    assert keyless.keys is None and not (keyless.path / "keys.npy").exists()
    assert all(verdict.fault is None for verdict in verify_store(keyless.path))


@pytest.mark.parametrize("index", ["index", "plain", "pq"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"retomaton": True, "min_knns": 3}, {"retomaton": True, "min_knns": 3, "clusters": "kmeans"}],
    ids=["kNN-LM", "RetoMaton", "clusters"],
)
def test_scores_are_those_with_keys(keyed: Datastore, keyless: Datastore, index: str, settings: dict) -> None:
    with_keys, without = (KNNHF(datastore=store.path, index=index, **COMMON, **settings) for store in (keyed, keyless))
    assert rolling(without) == rolling(with_keys)
    prompt = Instance("generate_until", {}, (EVAL_TEXT[:60], {"until": [], "max_gen_toks": 6}), 0)
    assert without.generate_until([prompt]) == with_keys.generate_until([prompt])


def test_generation_in_a_block(lm: CausalHFLM, keyed: Datastore, keyless: Datastore) -> None:
    ids, logits = torch.tensor([lm.tok_encode(EVAL_TEXT[:100])]), []
    for store in (keyed, keyless):
        with retrieval_augmented(lm.model, store.path, k=30, lmbda=0.5, knn_temp=4.0, retomaton=True):
            logits.append(lm.model(ids).logits)
    assert torch.equal(*logits)


def test_studies(keyed: Datastore, keyless: Datastore) -> None:
    def tuned(store: Datastore) -> list[float]:
        lm = KNNHF(datastore=store.path, **COMMON)
        scorer = GridScorer(lm, Grid(k=(5, 30), knn_temp=(1.0, 8.0), lmbda=(0.2, 0.6)), 0)
        with lm.scored_by(scorer):
            rolling(lm)
        return [surface.log_prob.tolist() for surface in scorer.surfaces]

    def curve(store: Datastore) -> list[Any]:
        lm = KNNHF(datastore=store.path, **COMMON)
        clusters = Clusters.open(store, "kmeans")
        scorer = CurveScorer(lm, [2, math.inf], [None, clusters], AutomatonSettings(30, 4.0))
        with lm.scored_by(scorer):
            rolling(lm)
        return [point.row() for point in scorer.points]

    def inspected(store: Datastore) -> list[float]:
        return [token.p for token in inspect_text(KNNHF(datastore=store.path, **COMMON), EVAL_TEXT[:200])]

    studies: list[Callable[[Datastore], list[Any]]] = [tuned, curve, inspected]
    for study in studies:
        assert study(keyless) == study(keyed)


def test_indexes_are_compared_with_each_other(
    keyed: Datastore, keyless: Datastore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def compared(store: Datastore) -> Any:
        settings = {"datastore": store.path, **COMMON}
        indexes = [("index", [None]), ("pq", [2, 4])]
        return compare_indexes(settings, {"a": EVAL_TEXT}, indexes, [30], tmp_path, tokens=100, repeats=1)

    with_keys, without = compared(keyed), compared(keyless)
    assert "and not with exact search" in caplog.text
    assert without.exact == [] and [one.recall for one in without.measured] == [None] * 3
    assert [one.tuned for one in without.measured] == [one.tuned for one in with_keys.measured]
    assert all(row["recall"] is None and row["p_knn_error"] is None for row in without.rows())


REFUSED: dict[str, Callable[[Datastore, Path], Any]] = {
    "recompute_dists=True": lambda store, out: KNNHF("none", datastore=store.path, recompute_dists=True),
    "exact search": lambda store, out: KNNHF("none", datastore=store.path, index="exact"),
    "RetoMaton with the index IVF16,SQ8": lambda store, out: KNNHF(
        "none", datastore=store.path, index="sq", retomaton=True
    ),
    "RetoMaton with the index IVF16,RaBitQfs4": lambda store, out: KNNHF(
        "none", datastore=store.path, index="bits", retomaton=True
    ),
    "building an index": lambda store, out: build_index(store, "Flat", name="more"),
    "pruning": lambda store, out: prune_random(store, out, 0.5),
    "pruning by confidence": lambda store, out: prune_confidence(store, out, lambda: pytest.fail("loaded"), keep=0.5),
    "pruning by merging": lambda store, out: prune_greedy_merge(store, out),
    "growing": lambda store, out: grow_datastore([store], out, 10_000),
    "projecting": lambda store, out: project_datastore(store, out, 8),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_keys_says_so_before_anything_is_loaded(keyless: Datastore, tmp_path: Path, what: str) -> None:
    before = sorted(keyless.path.rglob("*"))
    with pytest.raises(UserError, match=r"has no keys, which .* needs; dump it again, without --keys none\.$"):
        REFUSED[what](keyless, tmp_path / "new")
    assert not (tmp_path / "new").exists() and sorted(keyless.path.rglob("*")) == before
