"""The standard errors that lm-eval shows beside perplexities."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from helpers.places import TASKS
from helpers.tiny_model import MAX_LENGTH, TRAIN_TEXT
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from knn_lm_eval.model.scores import RollingLoglikelihood
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.tasks import perplexity

METRICS = ["bits_per_byte", "byte_perplexity", "token_perplexity", "word_perplexity"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One long document, and thirty short ones."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    (folder / "wikitext103").mkdir(parents=True)
    (folder / "wikitext103" / "wiki.test.raw").write_text(TRAIN_TEXT[:3000])
    (folder / "law").mkdir()
    (folder / "law" / "test.en").write_text("".join(f"{TRAIN_TEXT[40 * n :][: 20 + n]!r}\n" for n in range(30)))
    return folder


def evaluate(model: str, task: str, data: Path, limit: int | None = None, **model_args: Any) -> dict[str, Any]:
    model_args |= {"dtype": "float32"}
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata=model_args | {"data_dir": str(data)}
    )
    return lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        log_samples=True,
        bootstrap_iters=100,
        batch_size=4,
        device="cpu",
    )


def shown(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Metric -> figure and standard error of lm-eval's own table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in make_table(results).splitlines()[2:]]
    return {row[4]: (row[6], row[8]) for row in rows}


def left_out(pairs: np.ndarray, with_neighbours: bool) -> float:
    """The jackknife of exp(-sum a / sum b), by leaving out one row after the other."""
    figures = [math.exp(-a / b) for a, b in (np.delete(pairs, row, 0).sum(0) for row in range(len(pairs)))]
    away = np.array(figures) - np.mean(figures)
    alike = 2 * max(0, sum(one * other for one, other in itertools.pairwise(away))) if with_neighbours else 0
    return math.sqrt((len(pairs) - 1) / len(pairs) * (sum(away**2) + alike))


def test_one_document_has_errors_over_its_windows(data: Path, store: Datastore, model_folder: Path) -> None:
    results = evaluate("knn-hf", "wikitext103", data, pretrained=str(model_folder), datastore=str(store.path), k=20)
    table, figures = shown(results), results["results"]["wikitext103"]
    assert list(table) == METRICS
    for metric in METRICS:
        error = figures[f"{metric}_stderr,none"]
        assert table[metric] == (f"{figures[f'{metric},none']:.4f}", f"{error:.4f}") and error > 0
    (sample,) = json.loads(json.dumps(results["samples"]["wikitext103"]))
    windows = np.array(sample["token_perplexity_stderr"])
    assert windows[:-1, 1].tolist() == [MAX_LENGTH] * (len(windows) - 1) and len(windows) > 10
    assert windows.sum(axis=0) == pytest.approx(sample["token_perplexity"])
    assert figures["token_perplexity_stderr,none"] == pytest.approx(left_out(windows, True))
    for metric in METRICS:  # relative errors: of all the same tokens
        words = np.array(sample[f"{metric}_stderr"])
        assert words.sum(axis=0) == pytest.approx(sample[metric])
        assert words[:, 1] / words[:, 1].sum() == pytest.approx(windows[:, 1] / windows[:, 1].sum())


def test_many_documents_have_errors_over_documents_for_any_model(
    data: Path, store: Datastore, model_folder: Path
) -> None:
    one = evaluate("hf", "law", data, pretrained=str(model_folder))
    other = evaluate("knn-hf", "law", data, pretrained=str(model_folder), datastore=str(store.path), k=20, lmbda=0.0)
    for results in (one, other):
        pairs = np.array([sample["token_perplexity"] for sample in results["samples"]["law"]])
        error = results["results"]["law"]["token_perplexity_stderr,none"]
        assert len(pairs) == 30 and error == pytest.approx(left_out(pairs, False))
    assert {metric: float(error) for metric, (_, error) in shown(one).items()} == pytest.approx(
        {metric: float(error) for metric, (_, error) in shown(other).items()}, rel=1e-3
    )


def test_a_document_without_sums_of_windows_has_no_error(data: Path, model_folder: Path) -> None:
    results = evaluate("hf", "wikitext103", data, pretrained=str(model_folder))
    assert {error for _, error in shown(results).values()} == {"N/A"} and list(shown(results)) == METRICS
    few = evaluate("hf", "law", data, 3, pretrained=str(model_folder))
    assert all(re.fullmatch(r"\d+\.\d{4}", error) for _, error in shown(few).values())


def test_parts_share_words_by_tokens() -> None:
    spans = [(-6.0, 4), (-3.0, 1)]
    assert perplexity.parts(-9.0, 10, spans) == [(-6.0, 8.0), (-3.0, 2.0)]
    assert perplexity.parts(RollingLoglikelihood(-9.0, 5), 10, None) == [(-9.0, 10)]
    assert perplexity.parts(0.0, 1, []) == perplexity.parts(0.0, 1, [(0.0, 0)]) == [(0.0, 1)]


def test_errors_are_no_metrics_to_reports(data: Path, store: Datastore, model_folder: Path, tmp_path: Path) -> None:
    from knn_lm_eval.report.comparison import compare
    from knn_lm_eval.report.results import read_folder

    for method, lmbda in (("base", 0.0), ("knn", 0.3)):
        results = evaluate(
            "knn-hf", "wikitext103", data, pretrained=str(model_folder), datastore=str(store.path), k=20, lmbda=lmbda
        )
        samples = results.pop("samples")["wikitext103"]
        results["config"]["benchmark"] = {"method": method}
        folder = tmp_path / "results" / method
        folder.mkdir(parents=True)
        (folder / "results_1.json").write_text(json.dumps(results, default=str))
        (folder / "samples_wikitext103_1.jsonl").write_text(json.dumps(samples[0], default=str) + "\n")
    found, _ = read_folder([tmp_path / "results"])
    assert {tuple(sorted(result.metrics)) for result in found} == {tuple(METRICS)}
    for metric in METRICS:
        (task,) = compare(found, "base", metric, published=False).tasks
        assert task.rows[1].interval.p_value < 1 and "blocks of consecutive windows" in task.notes[0]
