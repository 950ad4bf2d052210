"""Reading the next batch before the present one is searched changes the order of work and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.benchmark.shared_pass import score_together
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.store.datastore import Datastore

TEXTS = [EVAL_TEXT, TRAIN_TEXT[300:700], EVAL_TEXT[100:350]]


def score_texts(lm: KNNHF) -> list[float]:
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(TEXTS)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


def note_work(lm: KNNHF, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """What the LM and the index do, in order, and at each search how many batches are kept."""
    work: list[str] = []
    waiting: list[int] = []
    assert lm.language_model.vocabulary_size  # which is found by reading, once
    encode, search = lm.language_model.encode, lm.retriever.search

    def noting_encode(*args):
        work.append("read")
        return encode(*args)

    def noting_search(*args):
        work.append("search")
        waiting.append(1 + (lm.scorer.reader._ahead is not None))
        return search(*args)

    monkeypatch.setattr(lm.language_model, "encode", noting_encode)
    monkeypatch.setattr(lm.retriever, "search", noting_search)
    return work, waiting


@pytest.mark.parametrize("rows_at_once", [1, 100])
def test_the_next_batch_is_read_before_the_present_one_is_searched(
    store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cpu")
    monkeypatch.setattr(type(lm.scorer), "rows_at_once", rows_at_once)
    assert not lm.scorer.reader.reads_ahead  # on a CPU both would want the same cores
    work, waiting = note_work(lm, monkeypatch)
    expected = score_texts(lm)
    batches = work.count("read")
    assert batches > 3 and work == ["read", "search"] * batches
    work.clear()
    lm.scorer.reader.reads_ahead = True
    assert score_texts(lm) == expected
    assert work == ["read", *["read", "search"] * (batches - 1), "search"]
    assert max(waiting) == 2 and lm.scorer.reader._ahead is None


def test_scorers_that_share_a_pass_read_each_batch_once(
    store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cpu")
    lm.scorer.reader.reads_ahead = True
    batches: list = []
    score = lm.scorer.score
    monkeypatch.setattr(lm.scorer, "score", lambda given, *args: batches.extend(given) or score(given, *args))
    score_texts(lm)
    monkeypatch.undo()
    alone = lm.scorer.score(batches, False)
    work, _ = note_work(lm, monkeypatch)
    assert score_together([lm.scorer], batches, False) == [alone]
    assert work == ["read"] * len(batches) + ["search"] * len(batches)
