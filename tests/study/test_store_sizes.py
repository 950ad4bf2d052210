"""Perplexity against the store's size: parts of the store are stores, and the script's file is what a report draws."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from helpers.oracle import knn_lm_distributions
from helpers.places import TASKS
from helpers.programs import run_script
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.pruning import positions_of_entries
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.study.store_sizes import StoreSizeScorer


def law(tmp_path: Path) -> TaskManager:
    (tmp_path / "test.en").write_text(EVAL_TEXT[:90] + "\n" + EVAL_TEXT[90:170] + "\n")
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(tmp_path)})


@pytest.mark.parametrize("searched", [20, 80, 10**9])
def test_a_part_of_the_store_is_a_store_of_its_entries(
    store, model_folder, tmp_path, monkeypatch, searched: int
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, lmbda=0.4, knn_temp=3.0, batch_size=2)
    scorer = StoreSizeScorer(lm, [0.1, 1.0], seed=3, searched=min(searched, len(store)))
    with lm.scored_by(scorer):
        lm_eval.simple_evaluate(
            model=lm, tasks=["law"], task_manager=law(tmp_path), bootstrap_iters=0, log_samples=False
        )
    positions = positions_of_entries(np.arange(len(store)), 3)
    for point, share in zip(scorer.points, (0.0, 0.1, 1.0), strict=True):
        inside = positions < share if share else np.ones(len(store), dtype=bool)
        total, count = 0.0, 0
        for text in (tmp_path / "test.en").read_text().splitlines():
            tokens = lm.tok_encode(text)
            distributions = knn_lm_distributions(
                lm.model,
                lm.model.model.layers[-1].mlp,
                [lm.prefix_token_id, *tokens[:-1]],
                store.keys[inside],
                store.values[inside],
                k=20,
                lmbda=0.4 if share else 0.0,
                temperature=3.0,
            )
            total += sum(math.log(distributions[i][token]) for i, token in enumerate(tokens))
            count += len(tokens)
        assert point.tokens == count
        assert point.perplexity == pytest.approx(math.exp(-total / count), rel=1e-4), share
        assert point.neighbours == (20 * count if share else 0)


def test_parts_are_random_nested_and_of_their_size() -> None:
    positions = positions_of_entries(np.arange(200_000), 0)
    assert ((positions >= 0) & (positions < 1)).all()
    for fraction in (0.01, 0.3):
        assert (positions < fraction).mean() == pytest.approx(fraction, rel=0.05)
    neighbours = (positions[1:] < 0.3) & (positions[:-1] < 0.3)
    assert neighbours.mean() == pytest.approx(0.09, rel=0.05)  # entries side by side are chosen independently
    assert not np.array_equal(positions, positions_of_entries(np.arange(200_000), 1))


def test_the_script_for_sizes_writes_what_the_report_draws(store, tmp_path) -> None:
    law(tmp_path)
    process = run_script(
        "store_sizes",
        *("--model_args", f"datastore={store.path},k=20,knn_temp=5", "--tasks", "law"),
        *("--metadata", f"data_dir={tmp_path}", "--fractions", "0.05,1", "--output", tmp_path / "sizes"),
    )
    assert process.returncode == 0, process.stderr
    content = json.loads((tmp_path / "sizes" / "law.json").read_text())
    assert [row["fraction"] for row in content["store_sizes"]] == [0.0, 0.05, 1.0]
    assert content["store_sizes"][1]["mean_neighbours"] == 20 < 80 < content["store_sizes"][1]["mean_searched"]
    assert content["settings"]["searched"] == 80 and content["settings"]["seed"] == 0


def test_sizes_out_of_range_are_named(store, model_folder) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20)
    with pytest.raises(UserError, match="The fraction 1.5 of the datastore must be above 0 and at most 1."):
        StoreSizeScorer(lm, [0.5, 1.5])
    walking = KNNHF(str(model_folder), datastore=store.path, k=20, retomaton=True)
    with pytest.raises(UserError, match="leave retomaton out"):
        StoreSizeScorer(walking, [0.5])


def test_small_parts_have_k_neighbours_where_the_lists_searched_hold_fewer(store, model_folder, tmp_path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    build_index(Datastore.open(tmp_path / "store"), "IVF16,Flat", name="lists", quality_queries=0)
    lm = KNNHF(str(model_folder), datastore=tmp_path / "store", index="lists", probe=1, k=20, lmbda=0.4, knn_temp=3.0)
    scorer = StoreSizeScorer(lm, [0.02, 1.0])
    with lm.scored_by(scorer):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (EVAL_TEXT[:90],), 0)])
    assert [point.neighbours for point in scorer.points[1:]] == [20 * scorer.tokens_scored] * 2
    assert scorer.points[1].searched > scorer.points[2].searched
