"""Stages count by the clock in force, and nobody else's clock changes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.system.timing import StageTimer, counting_by, now


def test_stages_count_by_the_clock_in_force() -> None:
    timer = StageTimer(("a", "b"), torch.device("cpu"))
    ticks = itertools.count(step=5)
    with counting_by(lambda: float(next(ticks))):
        for _ in range(3):
            with timer("a"):
                pass
        assert timer.seconds == {"a": 15.0, "b": 0.0}
    with timer("b"):
        pass
    assert timer.seconds["a"] == 15.0 and 0 <= timer.seconds["b"] < 1


def test_the_usual_clock_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), counting_by(lambda: 1 / 0):
        now()
    before = time.perf_counter()
    assert before <= now() <= time.perf_counter()


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"recompute_dists": True}, {"forward", "head", "mixture", "search", "distances", "values"}),
        ({"retomaton": True}, {"forward", "head", "search", "distances", "automaton"}),
    ],
)
def test_all_of_a_scorers_stages_ask_that_clock(store: Datastore, settings: dict, stages: set[str]) -> None:
    lm = KNNHF(datastore=store.path, k=5, lmbda=0.5, knn_temp=1.0, **settings)
    ticks = itertools.count()
    with counting_by(lambda: float(next(ticks))):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)], disable_tqdm=True)
    seconds = lm.get_model_info()["knn"]["seconds"]
    for stage in stages:
        assert seconds[stage] >= 1 and seconds[stage] % 1 == 0, stage  # wall clocks do not tick so
