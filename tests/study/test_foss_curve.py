"""The curve's points against evaluations of their own, where kNN-LM and RetoMaton have other distances."""

from __future__ import annotations

import math
import shutil

import pytest
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.study.foss_curve import CurvePoint, CurveScorer

SETTINGS = {"k": 20, "lmbda": 0.4, "knn_temp": 5.0, "batch_size": 2}
REQUEST = Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)


def perplexity(lm: KNNHF) -> float:
    (score,) = lm.loglikelihood_rolling([REQUEST], disable_tqdm=True)
    return math.exp(-score / score.num_tokens)


@pytest.fixture(scope="module")
def coarse(store: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """With an index whose distances are rough, and which has none to entries that are given."""
    copy = Datastore.open(shutil.copytree(store.path, tmp_path_factory.mktemp("coarse") / "store"))
    build_index(copy, "IVF4,SQ4", name="rough", quality_queries=0)
    return copy


def test_each_row_is_scored_by_the_distances_that_its_settings_name(coarse: Datastore) -> None:
    rough = {"datastore": coarse.path, "index": "rough", "probe": 4}
    lm = KNNHF(**rough, **SETTINGS)
    scorer = CurveScorer(lm, [1, math.inf], [None], AutomatonSettings(20, 5.0))
    with lm.scored_by(scorer):
        perplexity(lm)
    base, knn_lm, *walks = scorer.points
    assert knn_lm.perplexity == pytest.approx(perplexity(lm), rel=1e-5)
    assert not lm.retriever.recompute_dists and not lm.settings["recompute_dists"]
    exact = perplexity(KNNHF(**rough, **SETTINGS, recompute_dists=True))
    assert abs(knn_lm.perplexity / exact - 1) > 1e-3  # the two can be told apart
    for point in walks:
        walking = KNNHF(**rough, **SETTINGS, retomaton=True, min_knns=point.min_knns)
        assert point.perplexity == pytest.approx(perplexity(walking), rel=1e-5)
    assert base.row()["saved_searches"] == "" and base.perplexity > knn_lm.perplexity


def test_rows_leave_out_what_does_not_apply() -> None:
    point = CurvePoint("retomaton", "kmeans", 8.0, log_prob=-20.0, tokens=10, searches=4, candidates=55)
    assert point.row() == {
        "method": "retomaton",
        "clusters": "kmeans",
        "min_knns": 8.0,
        "token_perplexity": round(math.exp(2), 4),
        "saved_searches": 0.6,
        "mean_candidates": 5.5,
        "tokens": 10,
    }
    knn_lm = CurvePoint("knn-lm", log_prob=-20.0, tokens=10, searches=10).row()
    assert [knn_lm[name] for name in ("clusters", "min_knns", "mean_candidates")] == ["", "", ""]


def test_a_curve_has_its_own_searches_statistics_only(coarse: Datastore) -> None:
    """What a study searches for with other settings is not counted as the LM's."""
    lm = KNNHF(datastore=coarse.path, index="rough", probe=4, **SETTINGS)
    scorer = CurveScorer(lm, [1], [None], AutomatonSettings(20, 5.0))
    with lm.scored_by(scorer):
        perplexity(lm)
    assert lm.retriever.statistics.searches == scorer.tokens_scored
