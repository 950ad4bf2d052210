"""RetoMaton through the lm-eval model: against the slow walk, against kNN-LM, and in lm-eval's own table."""

from __future__ import annotations

import math
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from helpers.oracle import continuation_score, lm_outputs
from helpers.places import TASKS
from helpers.programs import run_script
from helpers.slow_automaton import StoreForOracle, slow_walk
from helpers.stores import make_store
from helpers.tiny_model import MAX_LENGTH, TRAIN_TEXT
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.faiss_index import open_index, set_probe
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters

# Text that the store has seen, so that pointers are followed for a while, and some that it has not.
TEXTS = [
    TRAIN_TEXT[2000:2300],
    "Nothing of this kind.",
    TRAIN_TEXT[5000:5150] + " and " + TRAIN_TEXT[900:1000],
]


def make(store: Datastore, **changes: object) -> KNNHF:
    arguments = {"datastore": store.path, "batch_size": 2, "k": 20, "knn_temp": 5.0, "retomaton": True}
    return KNNHF(**(arguments | changes))


def rolling(lm: KNNHF, texts: list[str] = TEXTS) -> list:
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])


@pytest.mark.parametrize("clusters", [None, "kmeans"])
@pytest.mark.parametrize(("min_knns", "duplicates"), [(1, "merge"), (1, "keep"), (5, "merge"), (math.inf, "keep")])
def test_rolling_scores_equal_the_slow_walk(clustered: Datastore, clusters, min_knns, duplicates) -> None:
    lm = make(clustered, clusters=clusters, min_knns=min_knns, duplicates=duplicates, max_knns=40)
    oracle = StoreForOracle(clustered, Clusters.open(clustered, clusters) if clusters else None)
    settings = AutomatonSettings(20, 5.0, min_knns, 40, duplicates)
    searches_in_all = 0
    for text, result in zip(TEXTS, rolling(lm), strict=True):
        expected, searches = 0.0, 0
        tokens = lm.tok_encode(text)
        windows = get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, 1)
        for context, continuation in map(make_disjoint_window, windows):
            p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, (context + continuation)[:-1])
            p_knn, made = slow_walk(oracle, queries[-len(continuation) :], continuation, settings)
            searches += made
            for row, token, p in zip(p_lm[-len(continuation) :], continuation, p_knn, strict=True):
                expected += math.log(0.75 * row[token] + 0.25 * p.get(token, 0.0))
        assert result == pytest.approx(expected, abs=1e-5 * len(tokens))
        assert (result.num_tokens, result.num_searches) == (len(tokens), searches)
        searches_in_all += searches
    info = lm.get_model_info()["knn"]
    assert info["searches"] == searches_in_all
    assert info["saved_searches"] == pytest.approx(1 - searches_in_all / info["tokens_scored"])


def test_continuations_and_greedy_equal_the_slow_walk(clustered: Datastore) -> None:
    lm = make(clustered, clusters="kmeans", lmbda=0.7, max_knns=40)
    oracle = StoreForOracle(clustered, Clusters.open(clustered, "kmeans"))
    words = TRAIN_TEXT[2000:2400].split()
    requests = [(" ".join(words[:10]), " " + " ".join(words[10:16])), (" ".join(words[:10]), " zebra")]
    requests += [(" ".join(words[20:25]), " " + words[25]), (" ".join(words[20:25]), " " + words[25] + "!")]
    encoded = [lm._encode_pair(*request) for request in requests]
    actual = lm._loglikelihood_tokens([(None, *pair) for pair in encoded])
    for (context, continuation), (log_prob, is_greedy) in zip(encoded, actual, strict=True):
        p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, (context + continuation)[:-1])
        queries = queries[-len(continuation) :]
        distributions = 0.3 * p_lm[len(p_lm) - len(continuation) :]
        p_knn, _ = slow_walk(oracle, queries, continuation, AutomatonSettings(20, 5.0, 1, 40, "merge"))
        for step, p in enumerate(p_knn):
            for value in p:
                distributions[step, value] += 0.7 * p[value]
        expected = continuation_score(distributions, continuation)
        assert log_prob == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]


def test_without_pointers_it_is_knn_lm_exactly(store: Datastore) -> None:
    knn_lm = make(store, retomaton=False)
    for settings in ({"no_pointer": True}, {"no_pointer": True, "min_knns": math.inf}):
        lm = make(store, **settings)
        assert [float(x) for x in rolling(lm)] == [float(x) for x in rolling(knn_lm)]


def test_where_nothing_is_found_the_lm_is_alone(store: Datastore) -> None:
    """With min_knns=0 no search is ever made, so that there is never a neighbour."""
    alone, never = make(store, lmbda=0.0, retomaton=False), make(store, min_knns=0)
    for one, other in zip(rolling(never), rolling(alone), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-6) and one.num_searches == 0
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in ((TEXTS[1], " the"), (TEXTS[1], " of"), ("A", " b c"))]
    for one, other in zip(never.loglikelihood(pairs), alone.loglikelihood(pairs), strict=True):
        assert one == (pytest.approx(other[0], rel=1e-6), other[1])
    prompt = Instance("generate_until", {}, (TEXTS[1][:60], {"until": [], "max_gen_toks": 8}), 0)
    assert never.generate_until([prompt]) == alone.generate_until([prompt])
    with never.mixed_forward:
        tokens = torch.tensor([never.tok_encode(TEXTS[1])[:9]])
        assert never.model(tokens).logits.exp().sum(-1) == pytest.approx(1.0, abs=1e-5)


def test_windows_may_carry_the_walk_on(store: Datastore, monkeypatch) -> None:
    anew, carried = make(store), make(store, carry_state=True)
    anew_results, carried_results = rolling(anew), rolling(carried)
    tokens = [len(anew.tok_encode(text)) for text in TEXTS]
    assert tokens[0] > MAX_LENGTH > tokens[1]
    assert carried_results[0].num_searches < anew_results[0].num_searches
    assert float(carried_results[1]) == pytest.approx(float(anew_results[1]))
    # Whether windows come in one call or in several does not matter.
    in_parts = make(store, carry_state=True, batch_size=1)
    monkeypatch.setattr("knn_lm_eval.model.retomaton.WAITING_BYTES", 1)
    assert [float(x) for x in rolling(in_parts)] == pytest.approx([float(x) for x in carried_results], rel=1e-6)
    assert [x.num_searches for x in rolling(in_parts)] == [x.num_searches for x in carried_results]


def test_a_call_does_not_go_on_where_another_ended(store: Datastore) -> None:
    text = TRAIN_TEXT[2000:2500]
    for half in range(200, 260, 7):  # in some the first half ends on something that the store has
        lm = make(store, carry_state=True)
        (alone,) = rolling(lm, [text[half:]])
        rolling(lm, [text[:half]])
        (after,) = rolling(lm, [text[half:]])
        assert (float(after), after.num_searches) == (float(alone), alone.num_searches)


@pytest.mark.parametrize("factory", ["IVF32,PQ8", "OPQ8,IVF32,PQ8", "IVF32,RaBitQfs", "RR32,IVF32,RaBitQfs"])
def test_pointer_distances_are_those_of_the_search(tmp_path: Path, factory: str) -> None:
    store = make_store(tmp_path / "s", count=5000, dimension=32)
    build_index(store, factory, quality_queries=0)
    index, _ = open_index(store)
    codes = CodeDistances.open(store, index, "index")
    assert codes is not None
    set_probe(index, 32)
    queries = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32) * 2
    distances, entries = index.search(queries, 100)
    counts = np.full(5, 100)
    if "PQ" in factory:  # both are the distance to the decoded vector
        np.testing.assert_allclose(codes(queries, entries, counts), distances, rtol=1e-4, atol=1e-3)
    else:  # the search rounds the query to 8 bits besides, which is little beside the estimate's own error
        exact = ((store.keys[entries].astype(np.float32) - queries[:, None]) ** 2).sum(-1)
        rounding, estimate = codes(queries, entries, counts) - distances, distances - exact
        assert np.abs(rounding).mean() < 0.3 * np.abs(estimate).mean()
    # Opened again, the files are read; after the index changed, they are made anew.
    again = CodeDistances.open(store, index, "index")
    assert (again(queries, entries, counts) == codes(queries, entries, counts)).all()


def test_rabitq_estimates_are_unbiased(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", count=5000, dimension=32)
    build_index(store, "IVF32,RaBitQfs", quality_queries=0)
    codes = CodeDistances.open(store, open_index(store)[0], "index")
    queries = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32) * 2
    entries = np.tile(np.arange(5000), (20, 1))
    exact = ((queries[:, None] - store.keys.astype(np.float32)[None]) ** 2).sum(-1)
    error = codes(queries, entries, np.full(20, 5000)) - exact
    assert abs(error.mean()) < 0.01 * exact.mean() < np.abs(error).mean()


def test_projected_keys_have_the_distances_of_their_projections(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", count=5000, dimension=32)
    build_index(store, "PCAR16,IVF32,RaBitQfs", quality_queries=0)
    index, _ = open_index(store)
    codes = CodeDistances.open(store, index, "index")
    queries = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32) * 2
    projected, keys = (index.chain.at(0).apply(x) for x in (queries, store.keys.astype(np.float32)))
    exact = ((projected[:, None] - keys[None]) ** 2).sum(-1)
    error = codes(queries, np.tile(np.arange(5000), (20, 1)), np.full(20, 5000)) - exact
    assert abs(error.mean()) < 0.02 * exact.mean() and np.abs(error).mean() < 0.3 * exact.mean()


def test_an_index_without_codes_makes_all_distances_exact(store: Datastore, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(store.path, tmp_path / "s")
    copy = Datastore.open(tmp_path / "s")
    build_index(copy, "IVF4,SQ8", name="sq", quality_queries=0)
    lm = make(copy, index="sq", probe=4)
    assert lm.settings["recompute_dists"] is True
    # SQ8 ranks almost exactly, and the distances are exact: nearly the exact index's result.
    assert [float(x) for x in rolling(lm)] == pytest.approx([float(x) for x in rolling(make(store))], rel=2e-2)


def test_saved_searches_stand_in_lm_evals_table(clustered: Datastore, tmp_path: Path) -> None:
    (tmp_path / "test.en").write_text("\n".join(TEXTS) + "\n")
    manager = TaskManager(include_path=[str(TASKS)], include_defaults=False, metadata={"data_dir": str(tmp_path)})
    lm = make(clustered)
    results = lm_eval.simple_evaluate(model=lm, tasks=["law"], task_manager=manager, bootstrap_iters=0)
    expected = rolling(lm)
    tokens, searches = sum(x.num_tokens for x in expected), sum(x.num_searches for x in expected)
    assert results["results"]["law"]["saved_searches,none"] == pytest.approx(1 - searches / tokens)
    assert 0 < 1 - searches / tokens < 1


def test_the_curve_equals_separate_runs(clustered: Datastore, tmp_path: Path) -> None:
    (tmp_path / "test.en").write_text("\n".join(TEXTS) + "\n")
    command = [
        "foss_curve",
        "--tasks",
        "law",
        "--output",
        str(tmp_path / "foss"),
    ]
    command += [
        "--model_args",
        f"datastore={clustered.path},k=20,knn_temp=5",
        "--metadata",
        f"data_dir={tmp_path}",
    ]
    command += ["--min_knns", "1,5,inf", "--clusters", "none,kmeans"]
    run = run_script(*command)
    assert run.returncode == 0, run.stderr[-2000:]
    import csv

    rows = list(csv.DictReader((tmp_path / "foss" / "law.csv").open()))
    assert [row["method"] for row in rows] == ["base", "knn-lm"] + ["retomaton"] * 6
    for row in rows:
        settings = {"base": {"lmbda": 0.0, "retomaton": False}, "knn-lm": {"retomaton": False}}.get(
            row["method"], {"min_knns": float(row["min_knns"] or 0), "clusters": row["clusters"] or None}
        )
        results = rolling(make(clustered, **settings))
        tokens = sum(x.num_tokens for x in results)
        assert float(row["token_perplexity"]) == pytest.approx(math.exp(-sum(results) / tokens), abs=1e-3)
        if row["method"] == "retomaton":
            searches = sum(x.num_searches for x in results)
            assert float(row["saved_searches"]) == pytest.approx(1 - searches / tokens, abs=1e-4)
    for suffix in ("csv", "json", "png", "svg"):
        assert (tmp_path / "foss" / f"law.{suffix}").stat().st_size > 100


def test_settings_out_of_range_are_named(store: Datastore) -> None:
    def refuses(sentence: str, **arguments: object) -> None:
        with pytest.raises(UserError, match=sentence):
            KNNHF("no-such-model", datastore=store.path, k=5, **({"retomaton": True} | arguments))

    refuses("min_knns=-1 must be a number of at least 0, or inf", min_knns=-1)
    refuses("min_knns='few' is not a number", min_knns="few")
    refuses("max_knns=0 must be", max_knns=0)
    refuses("duplicates='drop' is unknown", duplicates="drop")
    refuses("no clusters called 'missing'", clusters="missing")
    refuses("clusters is for RetoMaton", retomaton=False, clusters="kmeans")
