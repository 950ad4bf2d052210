"""An lmbda per token: its scores against a float64 oracle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracle import continuation_score, lm_outputs, mixture_weights
from helpers.slow_automaton import StoreForOracle, slow_walk
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knn_lm_eval import KNNHF, Datastore, UserError, retrieval_augmented
from knn_lm_eval.methods.adaptive import (
    FEATURES,
    LM_FEATURES,
    Buckets,
    Gate,
    lm_features,
    neighbour_features,
    read_weight,
)
from knn_lm_eval.methods.automaton import AutomatonSettings

K, TEMPERATURE = 50, 3.0
BUCKETS = Buckets((5.0, 15.0, 20.0, 40.0), (0.9, 0.7, 0.5, 0.2, 0.05))


def some_gate(features: tuple[str, ...], threshold: float | None = None, seed: int = 0) -> Gate:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(3, len(features)))
    return Gate(
        features,
        mean=tuple(random.normal(size=len(features)).tolist()),
        std=(1.5,) * len(features),
        hidden=tuple(tuple(row) for row in rows.tolist()),
        hidden_bias=(0.1, -0.2, 0.3),
        output=(1.0, -1.5, 0.7),
        bias=-0.2,
        threshold=threshold,
    )


FULL_GATE = some_gate(FEATURES)
CHOOSY_GATE = some_gate(LM_FEATURES, threshold=0.8171)  # about half of the texts' weights are below


# ------------------------------------------------------------------------------------------- an obvious oracle


def slow_features(p_lm: np.ndarray, distances: np.ndarray, values: np.ndarray) -> dict[str, float]:
    order = np.argsort(distances, kind="stable")
    near, theirs = distances[order], values[order]
    return {
        "confidence": math.log(p_lm.max()),
        "entropy": -sum(p * math.log(p) for p in p_lm if p > 0),
        "nearest": near[0],
        "mean_of_8": sum(near[:8]) / len(near[:8]),
        "distinct_in_8": len(set(theirs[:8].tolist())),
        "distinct_in_64": len(set(theirs[:64].tolist())),
    }


def slow_lmbda(lmbda: Buckets | Gate, features: dict[str, float]) -> float:
    if isinstance(lmbda, Buckets):
        return lmbda.lmbdas[sum(features["nearest"] >= edge for edge in lmbda.edges)]
    x = [
        (math.copysign(math.log(1 + abs(features[name])), features[name]) - mean) / std
        for name, mean, std in zip(lmbda.features, lmbda.mean, lmbda.std, strict=True)
    ]
    total = lmbda.bias
    for row, bias, output in zip(lmbda.hidden, lmbda.hidden_bias, lmbda.output, strict=True):
        total += output * math.tanh(sum(a * b for a, b in zip(row, x, strict=True)) + bias)
    weight = 0.999 / (1 + math.exp(-total))
    return 0.0 if lmbda.threshold is not None and weight < lmbda.threshold else weight


def slow_distribution(
    lmbda: Buckets | Gate, p_lm: np.ndarray, distances: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, float]:
    """The mixture over the vocabulary, and the weight of p_kNN in it."""
    weight = slow_lmbda(lmbda, slow_features(p_lm, distances, values))
    p_knn = mixture_weights(distances, values, TEMPERATURE, len(p_lm))
    return (1 - weight) * p_lm + weight * p_knn, weight


def slow_distributions(lm: KNNHF, lmbda: Buckets | Gate, tokens: list[int]) -> tuple[np.ndarray, list[float]]:
    p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, tokens)
    store = lm.retriever.datastore
    rows, weights = [], []
    for p, query in zip(p_lm, queries, strict=True):
        distances = ((store.keys.astype(np.float64) - query.astype(np.float64)) ** 2).sum(1)
        nearest = np.argsort(distances, kind="stable")[:K]
        row, weight = slow_distribution(lmbda, p, distances[nearest], np.asarray(store.values)[nearest])
        rows.append(row)
        weights.append(weight)
    return np.array(rows), weights


def make(store: Datastore, lmbda: Buckets | Gate, **changes: object) -> KNNHF:
    arguments = {"datastore": store.path, "batch_size": 2, "k": K, "knn_temp": TEMPERATURE, "lmbda": lmbda.plain()}
    return KNNHF(**(arguments | changes))


TEXTS = [EVAL_TEXT[:200], TRAIN_TEXT[2000:2300], "One."]


# ----------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("lmbda", [BUCKETS, FULL_GATE, CHOOSY_GATE], ids=["buckets", "gate", "choosy"])
def test_rolling_scores_equal_the_oracle(store: Datastore, lmbda) -> None:
    lm = make(store, lmbda)
    results = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS])
    used = []
    for text, result in zip(TEXTS, results, strict=True):
        tokens = lm.tok_encode(text)
        expected, searches = 0.0, 0
        windows = get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, 1)
        for context, continuation in map(make_disjoint_window, windows):
            rows, weights = slow_distributions(lm, lmbda, (context + continuation)[:-1])
            expected += continuation_score(rows, continuation)[0]
            used += weights[-len(continuation) :]
            searches += sum(weight > 0 for weight in weights[-len(continuation) :])
        assert result == pytest.approx(expected, abs=2e-5 * len(tokens))
        assert result.num_searches == (searches if lmbda is CHOOSY_GATE else None)
    assert len(set(used)) >= 3  # it is different from token to token
    info = lm.get_model_info()["knn"]
    if lmbda is CHOOSY_GATE:
        assert 0.1 < info["saved_searches"] < 0.9
        assert info["saved_searches"] == pytest.approx(sum(weight == 0 for weight in used) / len(used))
        assert info["searches"] == sum(weight > 0 for weight in used)
    else:
        assert "saved_searches" not in info
    assert read_weight(info["lmbda"]) == lmbda


@pytest.mark.parametrize("lmbda", [BUCKETS, FULL_GATE, CHOOSY_GATE], ids=["buckets", "gate", "choosy"])
def test_continuations_and_greedy_equal_the_oracle(store: Datastore, lmbda) -> None:
    lm = make(store, lmbda)
    words = TRAIN_TEXT[2000:2400].split()
    requests = [lm._encode_pair(" ".join(words[:10]), " " + " ".join(words[10:13])), lm._encode_pair("A", " zebra")]
    for context, _ in list(requests):  # what the mixture would really say, so that is_greedy is seen True
        rows, _ = slow_distributions(lm, lmbda, context)
        requests.append((context, [int(rows[-1].argmax())]))
    actual = lm._loglikelihood_tokens([(None, *request) for request in requests])
    for (context, continuation), (log_prob, is_greedy) in zip(requests, actual, strict=True):
        rows, _ = slow_distributions(lm, lmbda, (context + continuation)[:-1])
        expected = continuation_score(rows, continuation)
        assert log_prob == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]
    assert [greedy for _, greedy in actual[-2:]] == [True, True]


@pytest.mark.parametrize("lmbda", [FULL_GATE, CHOOSY_GATE], ids=["gate", "choosy"])
def test_forward_and_generation_equal_the_oracle(store: Datastore, lmbda) -> None:
    lm = make(store, lmbda)
    tokens = lm.tok_encode(TEXTS[1])[:20]
    expected, weights = slow_distributions(lm, lmbda, tokens)
    with retrieval_augmented(lm.model, store.path, k=K, knn_temp=TEMPERATURE, lmbda=lmbda.plain()) as mixed:
        actual = lm.model(torch.tensor([tokens])).logits[0].double().exp().numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        assert mixed.work.counts["rows_skipped"] == sum(weight == 0 for weight in weights)
        generated = lm.model.generate(torch.tensor([tokens]), max_new_tokens=3, do_sample=False)[0].tolist()
    for end in range(20, 23):
        rows, _ = slow_distributions(lm, lmbda, generated[:end])
        assert generated[end] == int(rows[-1].argmax())


@pytest.mark.parametrize("lmbda", [BUCKETS, FULL_GATE], ids=["buckets", "gate"])
def test_retomaton_equals_the_slow_walk(store: Datastore, lmbda) -> None:
    lm = make(store, lmbda, retomaton=True, min_knns=2, max_knns=40)
    (result,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXTS[1],), 0)])
    oracle, settings = StoreForOracle(store, None), AutomatonSettings(K, TEMPERATURE, 2, 40, "merge")
    expected, searches = 0.0, 0
    windows = get_rolling_token_windows(lm.tok_encode(TEXTS[1]), lm.prefix_token_id, MAX_LENGTH, 1)
    for context, continuation in map(make_disjoint_window, windows):
        p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, (context + continuation)[:-1])
        p_lm, queries = p_lm[-len(continuation) :], queries[-len(continuation) :]
        walk = lm.scorer.automaton
        # The neighbours of the fast walk, which its own tests hold against the slow one, weighed slowly.
        from knn_lm_eval.methods.automaton import Walk

        fast = Walk(queries, np.array(continuation))
        walk.walk([fast], keep_neighbours=True)
        searches += slow_walk(oracle, queries, continuation, settings)[1]
        for row, token, (distances, entries) in zip(p_lm, continuation, fast.neighbours, strict=True):
            mixed, _ = slow_distribution(lmbda, row, distances.astype(np.float64), walk.values[entries])
            expected += math.log(mixed[token])
    assert result == pytest.approx(expected, abs=2e-5 * result.num_tokens)
    assert result.num_searches == searches


def test_small_blocks_do_not_change_results(store: Datastore, monkeypatch) -> None:
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    expected = [make(store, lmbda).loglikelihood_rolling(requests) for lmbda in (FULL_GATE, CHOOSY_GATE)]
    monkeypatch.setattr("knn_lm_eval.lm.reading.LOGITS_BYTES", 400 * 4 * 2)
    monkeypatch.setattr("knn_lm_eval.model.scoring.NEIGHBOURS_PER_BLOCK", K * 3)
    actual = [make(store, lmbda).loglikelihood_rolling(requests) for lmbda in (FULL_GATE, CHOOSY_GATE)]
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_what_does_not_go_together_is_refused(store: Datastore) -> None:
    with pytest.raises(UserError, match="RetoMaton has min_knns for it"):
        make(store, CHOOSY_GATE, retomaton=True)
    with pytest.raises(UserError, match="carry_state=True needs a number for lmbda"):  # before a model is loaded
        make(store, FULL_GATE, retomaton=True, carry_state=True, pretrained="no-such-model")
    plain = FULL_GATE.plain()
    for change, sentence in (
        ({"features": ["nearest", "weather"]}, "unknown features"),
        ({"threshold": 0.3}, "can only have the LM's features"),
        ({"std": [1.0]}, "do not fit together"),
        ({"bias": "nan"}, "'nan' is not a number"),
        ({"output": None}, "malformed"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_weight(plain | change)


# ---------------------------------------------------------------------------------------------------- features


def test_features_equal_the_obvious_ones() -> None:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(5, 30)) * 3).float()
    logits[:, 3] = -math.inf  # a token that cannot be
    log_probs = logits.log_softmax(-1)
    distances = random.uniform(0, 90, size=(5, 100)).astype(np.float32)
    distances[1, 5:], distances[2, :] = np.inf, np.inf
    values = random.integers(0, 40, size=(5, 100)).astype(np.int32)
    features = torch.cat([lm_features(log_probs), neighbour_features(torch.tensor(distances), torch.tensor(values))], 1)
    for i in range(5):
        found = np.isfinite(distances[i])
        if not found.any():
            assert torch.isinf(features[i, 2:4]).all() and (features[i, 4:] == 0).all()
            continue
        expected = slow_features(log_probs[i].double().exp().numpy(), distances[i][found], values[i][found])
        assert features[i].tolist() == pytest.approx([expected[name] for name in FEATURES], rel=1e-5)


def test_a_table_in_a_file_stays_the_same(tmp_path: Path) -> None:
    import json

    for lmbda in (BUCKETS, FULL_GATE, CHOOSY_GATE):
        assert read_weight(json.loads(json.dumps(lmbda.plain()))) == lmbda
