"""The script that times knn-hf beside hf and a bare search."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from helpers.programs import run_script
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.methods.automaton import Automaton
from knn_lm_eval.search import index_retriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.study.speed import SpeedComparison


def bench(*arguments: object) -> CompletedProcess[str]:
    return run_script("speed", *arguments)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(EVAL_TEXT, encoding="utf-8")
    return file


def test_figures(store: Datastore, lm: CausalHFLM, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    process = bench(
        *("--model_args", f"datastore={store.path},k=20,lmbda=0.5"),
        *("--text", text, "--repeats", 2, "--batch_size", 3, "--threads", 1, "--no_memory", "--json", file),
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(file.read_text())
    tokens = len(lm.tok_encode(EVAL_TEXT))
    assert figures["tokens"] == figures["queries"] == tokens
    assert set(figures["seconds"]) == {"hf", "bare search", "knn-hf"}
    for stages, seconds in zip(figures["stages"]["knn-hf"], figures["seconds"]["knn-hf"], strict=True):
        assert sum(stages.values()) == pytest.approx(seconds)
    request = Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0)
    (log_likelihood,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    assert figures["perplexity"]["hf"] == pytest.approx(math.exp(-log_likelihood / tokens), rel=1e-5)
    assert figures["perplexity"]["knn-hf"] != pytest.approx(figures["perplexity"]["hf"], rel=1e-3)
    assert "knn-hf / (hf + bare search)" in process.stdout


def test_retomaton_is_timed_beside_knn_lm(clustered: Datastore, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    process = bench(
        *("--model_args", f"datastore={clustered.path},k=20,lmbda=0.5,retomaton=True,clusters=kmeans,min_knns=3"),
        *("--text", text, "--repeats", 1, "--no_memory", "--json", file, "--cpu_time"),
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(file.read_text())
    assert list(figures["seconds"]) == ["hf", "bare search", "knn-hf", "knn-hf RetoMaton"]
    assert figures["saved_searches"]["knn-hf"] is None
    assert 0 < figures["saved_searches"]["knn-hf RetoMaton"] < 1
    assert figures["queries"] == figures["tokens"]  # the bare search does what kNN-LM does
    assert figures["perplexity"]["knn-hf"] != figures["perplexity"]["knn-hf RetoMaton"]
    assert figures["stages"]["knn-hf RetoMaton"][0]["automaton"] > 0
    assert "CPU s" in process.stdout


def test_nothing_is_changed_that_others_use(clustered: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, searches = [], []
    walk = Automaton.walk

    def looking_around(*arguments: Any, **more: Any) -> None:
        clocks.append(time.perf_counter)
        searches.append(index_retriever.search)
        walk(*arguments, **more)

    monkeypatch.setattr(Automaton, "walk", looking_around)
    usual = time.perf_counter, index_retriever.search
    threads = torch.get_num_threads()
    settings = {"datastore": clustered.path, "k": 20, "lmbda": 0.5, "retomaton": True, "max_length": 32}
    comparison = SpeedComparison(settings, EVAL_TEXT, tokens=60, cpu_time=True)
    scorer = comparison.lm.scorer
    report = comparison.times(1)
    torch.set_num_threads(threads)
    assert set(clocks) == {usual[0]} and set(searches) == {usual[1]}
    assert comparison.lm.scorer is scorer
    assert report["windows"] == 32 and report["queries"] == report["tokens"] == 60
    assert all(seconds > 0 for rounds in report["seconds"].values() for seconds in rounds)


@pytest.mark.skipif("KNN_TRANSFORMERS" not in os.environ, reason="KNN_TRANSFORMERS names no checkout of that project")
@pytest.mark.parametrize("clusters", ["", ",clusters=kmeans"])
def test_the_published_code_gives_the_same_perplexity(
    clustered: Datastore, text: Path, tmp_path: Path, clusters: str
) -> None:
    copied = Datastore.open(shutil.copytree(clustered.path, tmp_path / "copied"))
    build_index(copied, "IVF16,PQ8x4", name="ivfpq")
    file = tmp_path / "figures.json"
    settings = f"k=20,lmbda=0.5,retomaton=True,duplicates=keep{clusters}"
    process = bench(
        *("--model_args", f"datastore={copied.path},index=ivfpq,probe=4,{settings}"),
        *("--text", text, "--max_length", 60, "--repeats", 1, "--no_memory", "--json", file),
        *("--knn_transformers", os.environ["KNN_TRANSFORMERS"]),
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(file.read_text())
    perplexity, saved = figures["perplexity"], figures["saved_searches"]
    assert perplexity["knn-transformers"] == pytest.approx(perplexity["knn-hf"], rel=1e-5)
    assert perplexity["knn-transformers RetoMaton"] == pytest.approx(perplexity["knn-hf RetoMaton"], rel=1e-5)
    assert saved["knn-transformers RetoMaton"] == saved["knn-hf RetoMaton"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "There is no nowhere.txt."),
        (["--repeats", 0], "--repeats 0 must be at least 1."),
        (["--knn_transformers", "nowhere"], "There is no nowhere."),
    ],
)
def test_bad_input(store: Datastore, text: Path, arguments: list[object], message: str) -> None:
    process = bench("--model_args", f"datastore={store.path},k=20", "--text", text, *arguments)
    assert process.returncode == 1
    assert process.stderr.strip() == f"error: {message}"
