"""SmolLM2-135M, as the first run makes it of a package's GGUF file, against the oracles on real text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from helpers.oracle import continuation_score, knn_lm_distributions, lm_outputs
from helpers.real_model import NEEDS_REAL_MODEL, FirstRun
from helpers.slow_automaton import StoreForOracle, slow_walk
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import python_docs_split
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters

# Squared distances between SmolLM2's keys are differences of numbers of some hundreds, which float32 search gets
# right to about 1e-4: the exponent of a neighbour's weight at temperature 1.
TOLERANCE = 1e-4
MAX_LENGTH = 128
TEXT = python_docs_split("test")[3][:500]


pytestmark = NEEDS_REAL_MODEL


@pytest.fixture(scope="module")
def smollm2(first_run: FirstRun) -> Iterator[CausalHFLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield CausalHFLM(str(first_run.model), dtype="float32", max_length=MAX_LENGTH, batch_size=4)
    torch.set_num_threads(threads)  # on which last bits of other tests' sums depend


@pytest.fixture(scope="module")
def real_store(smollm2: CausalHFLM, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    pieces = [(True, text) for text in python_docs_split("train")[:40]]
    folder = tmp_path_factory.mktemp("real") / "store"
    store = dump_datastore(smollm2, pieces, folder, max_length=MAX_LENGTH, max_tokens=1500)
    build_index(store, "Flat")
    cluster_kmeans(store)
    return store


def make(smollm2: CausalHFLM, store: Datastore, **settings: object) -> KNNHF:
    return KNNHF(smollm2.model, tokenizer=smollm2.tokenizer, datastore=store.path, max_length=MAX_LENGTH, **settings)


def windows(lm: HFLM) -> list[tuple[list[int], list[int]]]:
    tokens = lm.tok_encode(TEXT)
    return list(map(make_disjoint_window, get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, 1)))


def rolling(lm: HFLM) -> float:
    (result,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)])
    return result


def test_knn_lm_equals_the_oracle(smollm2: CausalHFLM, real_store: Datastore) -> None:
    lm = make(smollm2, real_store, k=256, lmbda=0.3)
    expected = 0.0
    for context, continuation in windows(lm):
        distributions = knn_lm_distributions(
            lm.model,
            lm.model.model.layers[-1].mlp,
            (context + continuation)[:-1],
            real_store.keys,
            real_store.values,
            k=256,
            lmbda=0.3,
            temperature=1.0,
        )
        expected += continuation_score(distributions, continuation)[0]
    result = rolling(lm)
    assert result == pytest.approx(expected, abs=TOLERANCE * result.num_tokens)


def test_with_lmbda_0_it_equals_hf(smollm2: CausalHFLM, real_store: Datastore) -> None:
    hf = HFLM(smollm2.model, tokenizer=smollm2.tokenizer, max_length=MAX_LENGTH)
    assert rolling(make(smollm2, real_store, lmbda=0, k=256)) == pytest.approx(rolling(hf), rel=1e-5)


@pytest.mark.parametrize("clusters", [None, "kmeans"])
def test_retomaton_equals_the_slow_walk(smollm2: CausalHFLM, real_store: Datastore, clusters: str | None) -> None:
    lm = make(smollm2, real_store, k=128, lmbda=0.3, retomaton=True, max_knns=128, clusters=clusters)
    oracle = StoreForOracle(real_store, Clusters.open(real_store, clusters) if clusters else None)
    expected, searches = 0.0, 0
    for context, continuation in windows(lm):
        p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, (context + continuation)[:-1])
        p_knn, made = slow_walk(
            oracle, queries[-len(continuation) :], continuation, AutomatonSettings(128, 1.0, 1, 128, "merge")
        )
        searches += made
        for row, token, p in zip(p_lm[-len(continuation) :], continuation, p_knn, strict=True):
            expected += math.log(0.7 * row[token] + 0.3 * p.get(token, 0.0))
    result = rolling(lm)
    assert result == pytest.approx(expected, abs=TOLERANCE * result.num_tokens)
    assert result.num_searches == searches < result.num_tokens
