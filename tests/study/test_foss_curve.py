"""What a curve's rows are made of where RetoMaton's distances are not the index's, and what a curve refuses."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.study.foss_curve import CurveScorer, foss_curves


def log_prob(lm: KNNHF) -> float:
    return sum(lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)]))


@pytest.mark.parametrize(("recompute", "kinds"), [(False, ["approximate", "exact"]), (True, ["exact", "exact"])])
def test_each_row_says_which_distances_it_has(
    store: Datastore, tmp_path: Path, caplog, recompute: bool, kinds: list[str]
) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    copy = Datastore.open(tmp_path / "store")
    build_index(copy, "IVF16,PQ8x4fs", name="fs", quality_queries=0)
    common = {"datastore": copy.path, "index": "fs", "k": 20, "lmbda": 0.9, "knn_temp": 5.0, "batch_size": 2}
    lm = KNNHF(**common, recompute_dists=recompute)
    with caplog.at_level(logging.WARNING):
        scorer = CurveScorer(lm, [math.inf], [None], AutomatonSettings(20, 5.0))
    assert ("add recompute_dists=True" in caplog.text) == (not recompute)
    with lm.scored_by(scorer):
        log_prob(lm)
    base, knn_lm, walk = scorer.points
    assert [base.row()["distances"], knn_lm.row()["distances"], walk.row()["distances"]] == ["", *kinds]
    assert knn_lm.log_prob == pytest.approx(log_prob(lm), rel=1e-5)
    walking = KNNHF(**common, recompute_dists=recompute, retomaton=True, min_knns=math.inf)
    assert walk.log_prob == pytest.approx(log_prob(walking), rel=1e-5)


def test_settings_of_walks_that_would_not_count_are_refused() -> None:
    with pytest.raises(UserError, match="carry_state=True is not for a curve"):
        next(foss_curves({"datastore": "D", "retomaton": True, "carry_state": True}, ["law"]))
    for name, value in {"min_knns": 4, "max_knns": 9, "clusters": "kmeans", "duplicates": "keep"}.items():
        with pytest.raises(UserError, match=f"give --{name} instead"):
            next(foss_curves({"datastore": "D", "retomaton": True, name: value}, ["law"]))
