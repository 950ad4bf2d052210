"""N-grams in scoring and generation: what plain loops over the store's documents give, mixed into the LM or kNN-LM."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.texts import count, longest_end, ngram_p
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT, make_llama
from lm_eval.api.instance import Instance
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from knn_lm_eval import KNNHF, UserError, retrieval_augmented
from knn_lm_eval.make.suffix_building import BASE_BYTES, BYTES_PER_SYMBOL, build_suffix_array
from knn_lm_eval.store.datastore import Datastore

TEXT = TRAIN_TEXT[40:160] + EVAL_TEXT[:120]
KNN = {"k": 20, "lmbda": 0.4, "knn_temp": 2.0}
WAYS: dict[str, dict[str, Any]] = {
    "LM": {"lmbda": 0},
    "kNN-LM": KNN,
    "one pass": KNN | {"search_all": True},
    "RetoMaton": KNN | {"retomaton": True, "min_knns": 4},
    "RetoMaton without pointers": KNN | {"retomaton": True, "no_pointer": True},
    "buckets": KNN | {"lmbda": {"kind": "buckets", "edges": [1.0], "lmbdas": [0.7, 0.3]}},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def sorted_store(tmp_path_factory: pytest.TempPathFactory, clustered: Datastore) -> Datastore:
    """A store with a suffix array in several parts."""
    folder = tmp_path_factory.mktemp("sorted") / "store"
    shutil.copytree(clustered.path, folder, ignore=shutil.ignore_patterns("*.codes", "*.scan"))
    store = Datastore.open(folder)
    longest = int(np.diff(store.document_starts, append=len(store)).max())
    ngrams = build_suffix_array(store, BASE_BYTES + BYTES_PER_SYMBOL * max(longest, len(store) // 3))
    assert len(ngrams.parts) > 1
    return Datastore.open(folder)


@pytest.fixture(scope="module")
def documents(sorted_store: Datastore) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.array(sorted_store.values), sorted_store.document_starts[1:])]


def open_lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: Datastore, **settings: Any) -> KNNHF:
    return KNNHF(model, tokenizer=tokenizer, datastore=store.path, batch_size=2, **settings)


def requests_of(lm: KNNHF) -> list[tuple[Any, list[int], list[int]]]:
    """A context with continuations of several tokens and of one, and one that the LM would go on with."""
    tokens = lm.tok_encode(TEXT)
    return [((str(n), ""), tokens[:n], tokens[n : n + length]) for n, length in ((12, 9), (30, 1), (30, 4), (50, 2))]


@pytest.mark.parametrize("way", WAYS)
def test_scores(
    way: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sorted_store: Datastore,
    documents: list[list[int]],
) -> None:
    """Token by token: the score without n-grams, and p of the oracle."""
    without = open_lm(model, tokenizer, sorted_store, **WAYS[way])
    lm = open_lm(model, tokenizer, sorted_store, **WAYS[way], ngram_lmbda=0.3)
    for _, context, continuation in requests_of(lm):
        expected = before = 0.0
        for stop in range(1, len(continuation) + 1):
            asked = [(None, context, continuation[:stop])]
            after = without._loglikelihood_tokens(asked, disable_tqdm=True)[0][0]
            p = ngram_p(documents, [*context, *continuation[: stop - 1]], continuation[stop - 1])
            p_others = math.exp(after - before)
            expected += math.log(p_others if math.isnan(p) else 0.7 * p_others + 0.3 * p)
            before = after
        found = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)[0][0]
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_rolling_and_results(
    way: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sorted_store: Datastore,
    documents: list[list[int]],
) -> None:
    """Rolling scores are those of the same windows, and results say what was looked up."""
    lm = open_lm(model, tokenizer, sorted_store, **WAYS[way], ngram_lmbda=0.3, max_length=32)
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    tokens = [lm.prefix_token_id, *lm.tok_encode(TEXT)]
    windows = [
        (None, tokens[start : start + 1], tokens[start + 1 : start + 33]) for start in range(0, len(tokens) - 1, 32)
    ]
    said = lm.get_model_info()["knn"]
    assert said["ngram_lmbda"] == 0.3 and said["setting_sources"]["ngram_lmbda"] == "given"
    last = len(tokens) - 1
    read = [tokens[at // 32 * 32 : at + 1] for at in range(last // 32 * 32)]
    read += [tokens[last - 32 : at + 1] for at in range(last // 32 * 32, last)]
    lengths = [longest_end(documents, context, True) for context in read]
    assert said["mean_ngram_match"] == pytest.approx(np.mean(lengths))
    if last % 32 == 0:
        scores = lm._loglikelihood_tokens(windows, disable_tqdm=True)
        assert rolling == pytest.approx(sum(score for score, _ in scores), abs=1e-3)
    without = open_lm(model, tokenizer, sorted_store, **WAYS[way], max_length=32)
    assert not [name for name in without.get_model_info()["knn"] if "ngram" in name]


@pytest.mark.parametrize("way", ["LM", "kNN-LM", "RetoMaton"])
@pytest.mark.parametrize("ngram_lmbda", [0.3, 0.9, 1])
def test_generation_is_what_scoring_says(
    way: str, ngram_lmbda: float, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sorted_store: Datastore
) -> None:
    """Greedy tokens, from a batch with padding, are greedy in scoring, and others are not."""
    lm = open_lm(model, tokenizer, sorted_store, **WAYS[way], ngram_lmbda=ngram_lmbda)
    settings = {name: value for name, value in WAYS[way].items() if name != "search_all"} | {"min_knns": 4, "k": 20}
    prompts = [lm.tok_encode(TEXT)[:n] for n in (9, 14)]
    batch = {
        "input_ids": torch.tensor([[3] * (14 - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (14 - len(p)) + [1] * len(p) for p in prompts]),
    }
    with retrieval_augmented(model, sorted_store.path, **settings, ngram_lmbda=ngram_lmbda):
        found = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=3)
    for prompt, tokens in zip(prompts, found[:, 14:].tolist(), strict=True):
        if way == "RetoMaton":  # whose walk begins with the first token here as there
            asked = [(None, prompt, tokens)]
            assert lm._loglikelihood_tokens(asked, disable_tqdm=True)[0][1]
            continue
        for at, token in enumerate(tokens):
            options = [(None, prompt + tokens[:at], [other]) for other in (token, (token + 1) % 400)]
            scores = lm._loglikelihood_tokens(options, disable_tqdm=True)
            assert [is_greedy for _, is_greedy in scores] == [True, False]


@pytest.mark.parametrize("way", ["LM", "kNN-LM"])
def test_forward_gives_a_distribution(
    way: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sorted_store: Datastore,
    documents: list[list[int]],
) -> None:
    tokens = tokenizer(TEXT)["input_ids"][:30]
    ids = torch.tensor([tokens])
    settings = {"k": 20} | WAYS[way]
    with torch.no_grad(), retrieval_augmented(model, sorted_store.path, **settings):
        others = model(ids).logits[0].double().exp()
    with torch.no_grad(), retrieval_augmented(model, sorted_store.path, **settings, ngram_lmbda=0.5):
        found = model(ids).logits[0].double().exp()
        with pytest.raises(UserError, match="embeddings were given: leave ngram_lmbda out"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    for row in range(len(tokens)):
        length = longest_end(documents, tokens[: row + 1], True)
        if not length:
            np.testing.assert_allclose(found[row], others[row], rtol=1e-4)
            continue
        end = tokens[row + 1 - length : row + 1]
        of_end = count(documents, end, True)
        following = {d[i + length] for d in documents for i in range(len(d) - length) if d[i : i + length] == end}
        p = np.zeros(found.shape[1])
        for token in following:
            p[token] = count(documents, [*end, token]) / of_end
        np.testing.assert_allclose(found[row], 0.5 * others[row] + 0.5 * p, rtol=1e-4, atol=1e-9)


def test_without_a_suffix_array(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: Datastore) -> None:
    with pytest.raises(UserError, match="has no suffix array, .*; build one with build_suffix_array"):
        open_lm(model, tokenizer, store, lmbda=0, ngram_lmbda=0.1)
    with pytest.raises(UserError, match="ngram_lmbda=1.5 must be a number from 0 to 1"):
        open_lm(model, tokenizer, store, ngram_lmbda=1.5)


def test_no_index_no_search(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sorted_store: Datastore, tmp_path: Path
) -> None:
    shutil.copytree(sorted_store.path, tmp_path / "store", ignore=shutil.ignore_patterns("index*"))
    lm = open_lm(model, tokenizer, Datastore.open(tmp_path / "store"), index="exact", lmbda=0, ngram_lmbda=0.2)
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    assert lm.get_model_info()["knn"]["searches"] == 0
