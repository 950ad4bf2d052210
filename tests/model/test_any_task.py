"""Tasks of every output type through lm-eval itself, from data in ``local_tasks``, against the dense oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from helpers.generation_oracle import KNN, RETOMATON, Oracle, encode
from helpers.oracle import continuation_score, knn_lm_distributions
from helpers.places import LOCAL_TASKS
from helpers.tiny_model import MAX_LENGTH
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from knn_lm_eval import KNNHF, Datastore

FOLDER = LOCAL_TASKS
K, LMBDA, TEMPERATURE = 50, 0.6, 2.0


@pytest.fixture(autouse=True)
def local_data_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(FOLDER)  # the task files name their data by relative paths
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second


def make(store: Datastore, model_folder: Path, **changes: Any) -> KNNHF:
    settings = {"batch_size": 3, "k": K, "lmbda": LMBDA, "knn_temp": TEMPERATURE} | changes
    return KNNHF(str(model_folder), datastore=store.path, **settings)


def evaluate(lm: Any, task: str) -> tuple[dict[str, float], list[dict]]:
    """The task's metrics, and its samples in the order of the documents."""
    manager = TaskManager(include_path=[str(FOLDER)], include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, cache_requests=False
    )
    metrics = {name.removesuffix(",none"): value for name, value in results["results"][task].items()}
    return metrics, sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def oracle_score(lm: KNNHF, store: Datastore, context: str, continuation: str) -> tuple[float, bool]:
    before, after = lm._encode_pair(context, continuation)
    distributions = knn_lm_distributions(
        lm.model,
        lm.model.model.layers[-1].mlp,
        (before + after)[:-1],
        store.keys,
        store.values,
        k=K,
        lmbda=lm.settings["lmbda"],
        temperature=lm.settings["knn_temp"],
    )
    return continuation_score(distributions, after)


def check_against_oracle(lm: KNNHF, store: Datastore, samples: list[dict]) -> list[list[tuple[float, bool]]]:
    """Log-probabilities and is_greedy of all requests, of which each document has some."""
    expected = []
    for sample in samples:
        expected.append([oracle_score(lm, store, *pair) for pair in sample["arguments"]])
        for (log_p, is_greedy), (oracle_log_p, oracle_greedy) in zip(
            sample["filtered_resps"], expected[-1], strict=True
        ):
            assert float(log_p) == pytest.approx(oracle_log_p, abs=1e-4)
            assert str(is_greedy) == str(oracle_greedy)
    return expected


def test_multiple_choice_equals_the_oracle(store: Datastore, model_folder: Path) -> None:
    lm = make(store, model_folder)
    metrics, samples = evaluate(lm, "local_choose")
    scores = check_against_oracle(lm, store, samples)
    right, right_by_length = [], []
    for sample, choices in zip(samples, scores, strict=True):
        log_p = np.array([score for score, _ in choices])
        lengths = [len(choice) for choice in sample["doc"]["choices"]]
        right.append(log_p.argmax() == sample["doc"]["answer"])
        right_by_length.append((log_p / lengths).argmax() == sample["doc"]["answer"])
    assert metrics["acc"] == np.mean(right) and metrics["acc_norm"] == np.mean(right_by_length)
    assert right != right_by_length  # two metrics, seen to differ
    tokens = sum(len(lm._encode_pair(*pair)[1]) for sample in samples for pair in sample["arguments"])
    assert lm.retriever.statistics.searches <= tokens  # the continuations' positions alone


def test_choices_after_one_context_share_its_forward_pass(store: Datastore, model_folder: Path) -> None:
    lm = make(store, model_folder)
    assert lm.language_model.vocabulary_size == 400  # found by a forward pass of its own
    rows: list[int] = []
    handle = lm.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    metrics, samples = evaluate(lm, "local_letter")
    handle.remove()
    scores = check_against_oracle(lm, store, samples)
    right = [np.argmax([s for s, _ in c]) == sample["doc"]["answer"] for sample, c in zip(samples, scores, strict=True)]
    assert metrics["acc"] == np.mean(right)
    assert sum(rows) == len(samples) == lm.retriever.statistics.searches


def test_last_words_equal_the_oracle(store: Datastore, model_folder: Path) -> None:
    lm = make(store, model_folder, lmbda=0.95, knn_temp=0.5)  # sharp enough to copy what the store has seen
    metrics, samples = evaluate(lm, "local_last_word")
    scores = [score for document in check_against_oracle(lm, store, samples) for score in document]
    assert metrics["perplexity"] == pytest.approx(math.exp(-np.mean([log_p for log_p, _ in scores])), rel=1e-4)
    assert metrics["acc"] == np.mean([is_greedy for _, is_greedy in scores])
    assert 0 < metrics["acc"] < 1


def cut(text: str, until: list[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
def test_generated_text_equals_the_oracle(clustered, model_folder, tokenizer, settings: dict) -> None:
    lm = make(clustered, model_folder, **settings)
    metrics, samples = evaluate(lm, "local_go_on")
    oracle = Oracle(lm.model, clustered, "model.layers.1.mlp", "retomaton" in settings)
    texts, generated = [], 0
    for sample in samples:
        batch = encode(tokenizer, [sample["doc"]["start"]])
        output = oracle.generate(batch, max_new_tokens=12, do_sample=False, pad_token_id=1)
        new = output[0, batch["input_ids"].shape[1] :]
        texts.append(cut(tokenizer.decode(new, skip_special_tokens=True), [".", "\n"]))
        generated += len(new)
    assert [sample["filtered_resps"][0] for sample in samples] == texts
    assert metrics["exact_match"] == np.mean([t == s["doc"]["end"] for t, s in zip(texts, samples, strict=True)])
    assert any(len(cut(text, ["."])) for text in texts)
    knn = lm.get_model_info()["knn"]
    # A sequence that has met its stop is computed to the end of its batch.
    assert 0 < knn["searches"] <= knn["positions_generated"]
    assert knn["seconds"]["forward"] > 0 and knn["seconds"]["mixture"] > 0
    if settings is RETOMATON:
        assert knn["saved_searches"] == 1 - knn["searches"] / knn["positions_generated"] > 0


def requests(**gen_kwargs: Any) -> list[Instance]:
    starts = ["Assert statements are a", "Grey", 'Assignments to "__debug__" are', "A list of the remaining items in"]
    gen_kwargs = {"until": ["the"], "max_gen_toks": 10} | gen_kwargs
    return [Instance("generate_until", {}, (start, gen_kwargs), i) for i, start in enumerate(starts)]


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
# HFLM's stop sequences are made for one row per text: with beams they end others than their own.
@pytest.mark.parametrize("gen_kwargs", [{}, {"num_beams": 3, "until": []}], ids=["greedy", "beams"])
def test_batch_size_does_not_change_generated_text(clustered, model_folder, settings: dict, gen_kwargs: dict) -> None:
    one, three = (make(clustered, model_folder, batch_size=size, **settings) for size in (1, 3))
    texts = one.generate_until(requests(**gen_kwargs))
    assert three.generate_until(requests(**gen_kwargs)) == texts
    assert make(clustered, model_folder, batch_size="auto", **settings).generate_until(requests(**gen_kwargs)) == texts


@pytest.mark.parametrize("gen_kwargs", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_weight_the_text_is_hfs(store, model_folder, gen_kwargs: dict, dtype: str) -> None:
    hf = HFLM(str(model_folder), device="cpu", batch_size=3, dtype=dtype, max_length=MAX_LENGTH)
    lm = make(store, model_folder, lmbda=0, dtype=dtype)
    torch.manual_seed(5)
    expected = hf.generate_until(requests(**gen_kwargs))
    torch.manual_seed(5)
    assert lm.generate_until(requests(**gen_kwargs)) == expected
    assert lm.retriever.statistics.searches == 0


def test_seeded_sampling_repeats_itself_and_differs_from_hfs(store: Datastore, model_folder: Path) -> None:
    texts = []
    for lmbda in (0.6, 0.6, 0):
        torch.manual_seed(5)
        texts.append(make(store, model_folder, lmbda=lmbda).generate_until(requests(do_sample=True, temperature=0.7)))
    assert texts[0] == texts[1] != texts[2]
