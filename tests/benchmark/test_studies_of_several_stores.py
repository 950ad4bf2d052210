"""Tuning, a benchmark, the neighbours' page and generation with two datastores."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmarks import figures, matrix_of
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT

import knn_lm_eval
from knn_lm_eval import KNNHF, Datastore, UserError, inspect_text, retrieval_augmented
from knn_lm_eval.benchmark.runner import run_matrix
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.study.foss_curve import foss_curves

TEXT = EVAL_TEXT[:120] + TRAIN_TEXT[300:400]


def test_params_are_tuned_for_all_stores_together(
    halves: list[Datastore], whole: Datastore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data" / "law"
    data.mkdir(parents=True)
    (data / "dev.en").write_text(f"{EVAL_TEXT[:200]}\n{TRAIN_TEXT[500:700]}\n", encoding="utf-8")
    both = [str(part.path) for part in halves]
    how: dict[str, Any] = {"metadata": {"data_dir": str(tmp_path / "data")}, "k": "8,40", "knn_temp": "1,10"}
    found, alone = (
        knn_lm_eval.tune({"datastore": store, "index": "exact"}, ["law_valid"], lmbda="0.2,0.5", **how)
        for store in (both, whole.path)
    )
    assert [row["token_perplexity"] for row in found.rows()] == pytest.approx(
        [row["token_perplexity"] for row in alone.rows()], rel=1e-6
    )
    params = tmp_path / "params.json"
    found.params.write(params)
    with caplog.at_level(logging.WARNING):
        lm = KNNHF(datastore="+".join(reversed(both)), params=params, index="exact")
    assert lm.settings["k"] == found.best.settings["k"] and "may not fit" not in caplog.text
    with caplog.at_level(logging.WARNING):
        KNNHF(datastore=both, params=params, index="exact", exclude="wiki")
    assert "tuned with datastore_weights=" in caplog.text and "exclude=['wiki']" in caplog.text
    with pytest.raises(UserError, match="was tuned for another datastore"):
        KNNHF(datastore=both[0], params=params)


def test_a_benchmark_has_several_stores_beside_one(
    content: dict[str, Any], halves: list[Datastore], whole: Datastore, tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    for part in (*halves, whole):
        shutil.copytree(part.path, tmp_path / "moved" / part.path.name)
    moved = tmp_path / "moved"
    content["datastores"] = {"one": str(moved / "whole"), "both": {"path": [str(moved / "law"), str(moved / "wiki")]}}
    content["methods"] = {"knn": content["methods"]["knn"] | {"index": "exact"}}
    content["tasks"] = {"law": {"limit": 3}}
    matrix = matrix_of(content, tmp_path)
    assert [outcome.state for outcome in run_matrix(matrix, lambda _: None)] == ["done", "done"]
    (one, _), (both, _) = (figures(matrix.output / cell.folder) for cell in matrix.cells)
    assert both["law"]["token_perplexity,none"] == pytest.approx(one["law"]["token_perplexity,none"], rel=1e-6)
    assert [outcome.state for outcome in run_matrix(matrix, lambda _: None)] == ["finished", "finished"]
    before = matrix.cells[1].checksum()
    shutil.rmtree(moved / "wiki")
    shutil.copytree(whole.path, moved / "wiki")
    assert matrix.cells[1].checksum() != before


@pytest.mark.parametrize("how", [{}, {"retomaton": True, "min_knns": 2}])
def test_neighbours_say_which_store_and_document_they_are_of(halves: list[Datastore], how: dict) -> None:
    settings: dict[str, Any] = {"k": 30, "lmbda": 0.4, "knn_temp": 2.0} | how
    lm = KNNHF(datastore=[str(part.path) for part in halves], **settings)
    neighbours = [neighbour for token in inspect_text(lm, TEXT) for neighbour in token.neighbours]
    stores = {part.path.name: part for part in halves}
    assert {neighbour.store for neighbour in neighbours} == {"law", "wiki"}
    for neighbour in neighbours:
        store = stores[str(neighbour.store)]
        assert neighbour.value == lm.tokenizer.decode([int(store.values[neighbour.entry])])
        assert neighbour.document is not None
        start = int(store.document_starts[neighbour.document])
        before = store.values[max(start, neighbour.entry - 24) : neighbour.entry]
        assert start <= neighbour.entry and neighbour.context == lm.tokenizer.decode(before.tolist())


@pytest.mark.parametrize("how", [{}, {"retomaton": True, "min_knns": 2}])
def test_generation_is_that_of_one_store(lm: CausalHFLM, halves: list[Datastore], whole: Datastore, how: dict) -> None:
    settings: dict[str, Any] = {"k": 30, "lmbda": 0.6, "knn_temp": 2.0, "index": "exact"} | how
    ids = torch.tensor([lm.tok_encode(TEXT)[:20]])
    written = []
    for datastore in ([str(part.path) for part in halves], whole.path):
        with retrieval_augmented(lm.model, datastore, **settings):
            written.append(lm.model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist())
    assert written[0] == written[1]


def test_studies_of_one_store_say_so(halves: list[Datastore]) -> None:
    both = "+".join(str(part.path) for part in halves)
    with pytest.raises(UserError, match="A FoSS curve is for one datastore"):
        next(foss_curves({"datastore": both, "k": 5}, ["law"]))
