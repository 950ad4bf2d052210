"""Comparing indexes on text: against the evaluation itself, and against brute force."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.programs import run_script
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.study.index_comparison import IndexComparison, Measurement, efficient
from knn_lm_eval.study.text_queries import collect_queries

TEXTS = {"one": EVAL_TEXT[:300], "two": EVAL_TEXT[300:]}
LMBDA, TEMPERATURE = 0.4, 2.0


@pytest.fixture(scope="module")
def indexed(store: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    path = tmp_path_factory.mktemp("compared") / "store"
    shutil.copytree(store.path, path)
    copy = Datastore.open(path)
    build_index(copy, "IVF16,RaBitQ", name="coarse", quality_queries=0)
    return copy


@pytest.fixture(scope="module")
def knn(indexed: Datastore) -> KNNHF:
    return KNNHF(datastore=indexed.path, k=40, lmbda=LMBDA, knn_temp=TEMPERATURE, batch_size=2)


@pytest.fixture(scope="module")
def comparison(knn: KNNHF, indexed: Datastore, tmp_path_factory: pytest.TempPathFactory) -> IndexComparison:
    return IndexComparison(
        indexed,
        collect_queries(knn, TEXTS),
        lmbda=LMBDA,
        knn_temp=TEMPERATURE,
        sim_func="l2",
        max_k=40,
        cache=tmp_path_factory.mktemp("exact"),
    )


def evaluated_perplexity(knn: KNNHF, texts: list[str]) -> float:
    scores = knn.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])
    tokens = sum(len(knn.tok_encode(text)) for text in texts)
    return math.exp(-sum(map(float, scores)) / tokens)


def test_perplexities_are_those_of_the_evaluation(comparison: IndexComparison, knn: KNNHF, indexed: Datastore) -> None:
    (flat, coarse) = comparison.measure(
        [LocalRetriever(indexed, 40), LocalRetriever(indexed, 40, index="coarse").with_settings(probe=2)], 1
    )
    settings = {"datastore": indexed.path, "k": 40, "batch_size": 2}
    with_coarse = KNNHF(**settings, lmbda=LMBDA, knn_temp=TEMPERATURE, index="coarse", probe=2)
    for result, evaluated in ((flat, knn), (coarse, with_coarse)):
        for name, text in TEXTS.items():
            assert result.perplexity[name] == pytest.approx(evaluated_perplexity(evaluated, [text]), rel=1e-5)
        all_texts = evaluated_perplexity(evaluated, list(TEXTS.values()))
        assert result.perplexity["all"] == pytest.approx(all_texts, rel=1e-5)
    tuned = KNNHF(**settings, lmbda=flat.lmbda, knn_temp=flat.knn_temp)
    assert flat.tuned == pytest.approx(evaluated_perplexity(tuned, list(TEXTS.values())), rel=1e-5)
    assert flat.tuned < flat.perplexity["all"]
    assert flat.recall == 1 and flat.p_knn_error < 1e-6
    assert flat.perplexity == pytest.approx(comparison.exact(40).perplexity, rel=1e-6)
    assert coarse.recall < 1 and coarse.p_knn_error > 1e-4
    assert coarse.bytes_per_entry == (indexed.path / "coarse.faiss").stat().st_size / len(indexed)


def test_the_base_perplexity_is_the_lms_alone(comparison: IndexComparison, indexed: Datastore) -> None:
    alone = KNNHF(datastore=indexed.path, k=40, lmbda=0.0, batch_size=2)
    for name, text in TEXTS.items():
        assert comparison.base_perplexity[name] == pytest.approx(evaluated_perplexity(alone, [text]), rel=1e-5)


@pytest.mark.parametrize("k", [7, 40])
def test_recall_and_error_against_brute_force(comparison: IndexComparison, indexed: Datastore, k: int) -> None:
    retriever = LocalRetriever(indexed, k, 1, index="coarse")
    shared = LocalRetriever(indexed, 40, index="coarse")
    (result, _) = comparison.measure([shared.with_settings(probe=1, k=k), shared.with_settings(probe=4)], 1)
    queries = comparison.queries.queries
    found = retriever.search(queries)
    keys = indexed.keys.astype(np.float64)
    recalls, errors = [], []
    for i, query in enumerate(queries.numpy().astype(np.float64)):
        squared = ((keys - query) ** 2).sum(1)
        order = np.argsort(squared, kind="stable")[:k]
        mine = [e for e in found.entries[i].tolist() if e >= 0]
        recalls.append(len(set(mine) & set(order.tolist())) / k)
        ps = []
        for distances, entries in ((squared[order], order), (found.distances[i].numpy()[: len(mine)], mine)):
            weights = np.exp(-(distances - min(distances, default=0)) / TEMPERATURE)
            right = indexed.values[entries] == int(comparison.queries.targets[i])
            ps.append(weights[right].sum() / weights.sum())
        errors.append(abs(ps[0] - ps[1]))
    assert result.recall == pytest.approx(np.mean(recalls), abs=1e-3)
    assert result.p_knn_error == pytest.approx(np.mean(errors), abs=1e-4)


def test_exact_neighbours_are_kept(comparison: IndexComparison, knn: KNNHF, indexed: Datastore, monkeypatch) -> None:
    cache = comparison.cache
    monkeypatch.setattr("knn_lm_eval.study.index_comparison.search_exactly", None)  # would fail if asked again
    settings = {"lmbda": LMBDA, "knn_temp": TEMPERATURE, "sim_func": "l2", "cache": cache}
    again = IndexComparison(indexed, comparison.queries, max_k=10, **settings)
    assert again.exact(10).perplexity == comparison.exact(10).perplexity
    with pytest.raises(TypeError):
        IndexComparison(indexed, comparison.queries, max_k=41, **settings)


def test_the_front_is_what_nothing_beats() -> None:
    def row(time: float, perplexity: float) -> Measurement:
        return Measurement("", "", 1, None, 1, [time], tuned=perplexity)

    a, b, c, d = row(10, 30), row(20, 31), row(20, 25), row(50, 25)
    assert efficient([d, b, c, a]) == [a, c]


def test_command_line(indexed: Datastore, tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    command = ["compare_indexes", "--model_args", f"datastore={indexed.path},lmbda=0.4"]
    command += ["--text", *(str(tmp_path / f"{name}.txt") for name in TEXTS), "--tokens", "50"]
    command += ["--indexes", "index", "coarse:1,4", "--k", "10,20", "--cpu_time", "--output", str(tmp_path / "out")]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "indexes.json").read_text())
    assert report["settings"]["tokens"] == {"one": 50, "two": 50} and report["settings"]["entries"] == len(indexed)
    assert len(report["indexes"]) == 3 * 2 + 2
    assert all(row["microseconds"] > 0 for row in report["indexes"])
    with open(tmp_path / "out" / "indexes.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(report["indexes"])
    assert (tmp_path / "out" / "indexes.png").stat().st_size > 1000
    assert "coarse" in done.stdout and "exact" in done.stdout
    wrong = run_script(*command, "--k", "0")
    assert wrong.returncode and wrong.stderr.strip().count("\n") == 0 and "at least 1" in wrong.stderr
