"""The lm-eval model against a dense float64 oracle and against lm-eval's own ``hf``."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from helpers.oracle import continuation_score, knn_lm_distributions
from helpers.places import TASKS
from helpers.programs import run_lm_eval
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, make_llama
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore

# The oracle and the float32 search differ by rounding alone: squared distances of about 50 lose 1e-5 of
# themselves when faiss computes |q|^2 + |x|^2 - 2qx in float32.
TOLERANCE = 1e-5


def rolling(text: str) -> Instance:
    return Instance("loglikelihood_rolling", {}, (text,), 0)


def pair(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


TEXTS = [EVAL_TEXT, EVAL_TEXT[100:220], "One.", EVAL_TEXT[300:]]
PAIRS = [
    ("The operator module", " also defines"),
    ("The operator module", " also"),  # a part of the first's tokens
    ("The operator module also", " defines"),  # reads the same tokens as the first, split elsewhere
    ("The operator module", " x"),  # differs in the last token only
    ("The operator module", " y"),
    ("", "No context"),
    (EVAL_TEXT, " and then some"),  # longer than the window: cut on the left
]


@pytest.fixture(scope="module")
def make(store: Datastore, model_folder: Path):
    def make(**changes: object) -> KNNHF:
        arguments = {"pretrained": str(model_folder), "datastore": str(store.path), "batch_size": 3, "k": 50}
        return KNNHF(**(arguments | changes))

    return make


def oracle_scores(
    lm: KNNHF, requests: list[tuple[list[int], list[int]]], k: int = 50, dot: bool = False
) -> list[tuple[float, bool]]:
    store = lm.retriever.datastore
    scores = []
    for context, continuation in requests:
        distributions = knn_lm_distributions(
            lm.model,
            lm.model.model.layers[-1].mlp,
            (context + continuation)[-(MAX_LENGTH + 1) : -1],
            store.keys,
            store.values,
            k=k,
            lmbda=lm.settings["lmbda"],
            temperature=lm.settings["knn_temp"],
            dot=dot,
        )
        scores.append(continuation_score(distributions, continuation))
    return scores


@pytest.mark.parametrize(
    "settings",
    [{}, {"lmbda": 0.9, "knn_temp": 3.0}, {"lmbda": 1.0, "knn_temp": 20.0}, {"k": 1}, {"k": "all"}],
)
@pytest.mark.parametrize("context_len", [1, MAX_LENGTH // 2])
def test_rolling_log_likelihood_equals_the_oracle(make, store: Datastore, settings: dict, context_len: int) -> None:
    if settings.get("k") == "all":
        settings = {"k": len(store)}
    lm = make(context_len=context_len, **settings)
    actual = lm.loglikelihood_rolling([rolling(text) for text in TEXTS])
    for text, result in zip(TEXTS, actual, strict=True):
        tokens = lm.tok_encode(text)
        windows = get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, context_len)
        scores = oracle_scores(lm, list(map(make_disjoint_window, windows)), settings.get("k", 50))
        assert result.num_tokens == len(tokens)
        # lmbda = 1 has no LM to fall back on: a token that no neighbour has gives minus infinity in both.
        assert result == pytest.approx(sum(score for score, _ in scores), abs=TOLERANCE * len(tokens))
        of_windows, lengths = zip(*result.spans, strict=True)
        assert of_windows == pytest.approx([score for score, _ in scores], abs=TOLERANCE * len(tokens))
        assert sum(lengths) == len(tokens) and max(lengths) <= MAX_LENGTH


def test_continuation_and_greedy_equal_the_oracle(make) -> None:
    lm = make(lmbda=0.6, knn_temp=2.0)
    encoded = [lm._encode_pair(*p) if p[0] else ([lm.prefix_token_id], lm.tok_encode(p[1])) for p in PAIRS]
    greedy_continuations = []
    for context, _ in encoded[:2]:  # what the mixture would really say, so that is_greedy is seen True
        distributions = knn_lm_distributions(
            lm.model,
            lm.model.model.layers[-1].mlp,
            context,
            lm.retriever.datastore.keys,
            lm.retriever.datastore.values,
            k=50,
            lmbda=0.6,
            temperature=2.0,
        )
        greedy_continuations.append((context, [int(distributions[-1].argmax())]))
    requests = encoded + greedy_continuations
    actual = lm._loglikelihood_tokens([(None, *request) for request in requests])
    expected = oracle_scores(lm, requests)
    for (log_prob, is_greedy), (oracle_log_prob, oracle_greedy) in zip(actual, expected, strict=True):
        assert log_prob == pytest.approx(oracle_log_prob, abs=10 * TOLERANCE)
        assert is_greedy == oracle_greedy
    assert [greedy for _, greedy in actual[-2:]] == [True, True]


def test_only_scored_positions_are_searched_and_shared_ones_once(make) -> None:
    lm = make()
    lm.loglikelihood([pair(*p) for p in PAIRS[3:5]])
    tokens = [lm._encode_pair(*p)[1] for p in PAIRS[3:5]]
    assert len(tokens[0]) == len(tokens[1])
    assert lm.retriever.statistics.searches == len(tokens[0])


@pytest.mark.parametrize("settings", [{"knn_sim_func": "dot"}, {"knn_sim_func": "dot", "recompute_dists": True}])
def test_inner_products_rank_and_weigh_as_the_oracle(tmp_path: Path, store: Datastore, make, settings: dict) -> None:
    shutil.copytree(store.path, tmp_path / "s")
    build_index(Datastore.open(tmp_path / "s"), "Flat", sim_func="dot", name="by_dot")
    lm = make(datastore=str(tmp_path / "s"), index="by_dot", **settings)
    (actual,) = lm.loglikelihood_rolling([rolling(TEXTS[1])])
    tokens = lm.tok_encode(TEXTS[1])
    windows = get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, 1)
    expected = oracle_scores(lm, list(map(make_disjoint_window, windows)), dot=True)
    assert actual == pytest.approx(sum(score for score, _ in expected), abs=TOLERANCE * len(tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_with_lmbda_0_every_request_equals_hf(make, model_folder: Path, dtype: str, batch_size: int) -> None:
    # With its logits_cache, HFLM takes a wrong position for a text that another request splits elsewhere.
    hf = HFLM(str(model_folder), device="cpu", dtype=dtype, batch_size=batch_size, logits_cache=False)
    lm = make(lmbda=0, dtype=dtype, batch_size=batch_size)
    # bfloat16 has 8 bits: two batch shapes may round a logit differently, by one part in 256.
    tolerance = 1e-5 if dtype == "float32" else 2**-7
    requests = [rolling(text) for text in TEXTS]
    assert lm.loglikelihood_rolling(requests) == pytest.approx(hf.loglikelihood_rolling(requests), rel=tolerance)
    requests = [pair(*p) for p in PAIRS]
    expected, actual = hf.loglikelihood(requests), lm.loglikelihood(requests)
    assert [score for score, _ in actual] == pytest.approx([score for score, _ in expected], rel=tolerance)
    if dtype == "float32":
        assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert lm.retriever.statistics.searches == 0


@pytest.mark.parametrize("batch_size", [1, 2, 7, "auto"])
def test_batch_size_does_not_change_results(make, batch_size: int | str) -> None:
    requests = [rolling(text) for text in TEXTS]
    expected = make(batch_size=3).loglikelihood_rolling(requests)
    assert make(batch_size=batch_size).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)


def test_small_blocks_do_not_change_results(make, monkeypatch) -> None:
    """Memory is bounded by working in blocks of logits and of neighbours."""
    lm = make(lmbda=0.5)
    requests = [pair(*p) for p in PAIRS]
    expected = lm.loglikelihood(requests)
    monkeypatch.setattr("knn_lm_eval.lm.reading.LOGITS_BYTES", 400 * 4 * 2)
    monkeypatch.setattr("knn_lm_eval.model.scoring.NEIGHBOURS_PER_BLOCK", 50 * 3)
    actual = lm.loglikelihood(requests)
    assert [s for s, _ in actual] == pytest.approx([s for s, _ in expected], rel=1e-5)
    assert [g for _, g in actual] == [g for _, g in expected]


def test_the_model_is_taken_from_the_store_when_none_is_given(
    store: Datastore, model_folder: Path, monkeypatch
) -> None:
    assert KNNHF(datastore=store.path, k=5).pretrained == str(model_folder)
    monkeypatch.setenv("KNN_LM_EVAL_DATASTORE", str(store.path))
    assert KNNHF(k=5).retriever.datastore.path == store.path


def test_a_model_object_scores_like_its_folder(make, tokenizer) -> None:
    requests = [rolling(text) for text in TEXTS]
    lm = KNNHF(make_llama(), tokenizer=tokenizer, datastore=make().retriever.datastore.path, k=50)
    assert lm.loglikelihood_rolling(requests) == pytest.approx(make().loglikelihood_rolling(requests), rel=1e-6)


# ------------------------------------------------------------------------------------- through lm-eval itself


@pytest.fixture(scope="module")
def law_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "test.en").write_text("\n".join([*TEXTS, PAIRS[0][0]]) + "\n")
    return folder


def run_law(law_data: Path, **arguments: object) -> dict:
    manager = TaskManager(include_path=[str(TASKS)], include_defaults=False, metadata={"data_dir": str(law_data)})
    return lm_eval.simple_evaluate(model="knn-hf", tasks=["law"], task_manager=manager, bootstrap_iters=0, **arguments)


def test_simple_evaluate_by_name_reports_settings_and_work_done(law_data, store, model_folder) -> None:
    results = run_law(law_data, model_args=f"pretrained={model_folder},datastore={store.path},k=50,lmbda=0.3")
    lm = KNNHF(str(model_folder), datastore=store.path, k=50, lmbda=0.3)
    scored = lm.loglikelihood_rolling([rolling(text) for text in [*TEXTS, PAIRS[0][0]]])
    tokens = sum(result.num_tokens for result in scored)
    assert results["results"]["law"]["token_perplexity,none"] == pytest.approx(np.exp(-sum(scored) / tokens), rel=1e-5)
    knn = results["config"]["knn"]
    assert (knn["k"], knn["lmbda"], knn["knn_temp"]) == (50, 0.3, 1.0)
    assert knn["setting_sources"] == {"k": "given", "lmbda": "given", "knn_temp": "default", "probe": "index"}
    assert knn["tokens_scored"] == tokens
    assert tokens - MAX_LENGTH < knn["searches"] <= tokens  # two texts end alike: they share a window
    assert knn["entries_compared"] == knn["searches"] * len(store)
    assert knn["datastore"]["entries"] == len(store) and knn["datastore"]["keys_sha256"] == store.keys_checksum
    assert knn["seconds"]["forward"] > 0 and knn["seconds"]["search"] > 0
    json.dumps(knn)


def test_limit_log_samples_and_caches_give_the_same_numbers(
    law_data, store, model_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    arguments = {"model_args": {"pretrained": str(model_folder), "datastore": str(store.path), "k": 50}}
    plain = run_law(law_data, **arguments, limit=3)
    for _ in range(2):  # filling the caches, then reading them
        cached = run_law(
            law_data,
            **arguments,
            limit=3,
            use_cache=str(tmp_path / "cache"),
            cache_requests=True,
            log_samples=True,
        )
        for metric in ("token_perplexity,none", "word_perplexity,none", "bits_per_byte,none"):
            assert cached["results"]["law"][metric] == pytest.approx(plain["results"]["law"][metric], rel=1e-6)
        assert len(cached["samples"]["law"]) == 3
    assert cached["config"]["knn"]["searches"] == 0
    with pytest.raises(UserError, match="holds results of another model or of other settings"):
        arguments["model_args"]["lmbda"] = 0.5
        run_law(law_data, **arguments, limit=3, use_cache=str(tmp_path / "cache"))


def test_a_cache_is_not_that_of_clusters_made_anew_under_the_same_name(
    law_data, store, model_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    shutil.copytree(store.path, tmp_path / "store")
    own = Datastore.open(tmp_path / "store")
    retrieval = {"k": 50, "retomaton": True, "clusters": "again"}
    arguments = {
        "model_args": {"pretrained": str(model_folder), "datastore": str(own.path), **retrieval},
        "limit": 1,
        "use_cache": str(tmp_path / "cache"),
    }
    cluster_kmeans(own, "again", num_clusters=20, seed=1)
    for _ in range(2):
        run_law(law_data, **arguments)
    cluster_kmeans(own, "again", num_clusters=20, seed=2, overwrite=True)
    with pytest.raises(UserError, match="holds results of another model or of other settings"):
        run_law(law_data, **arguments)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_store_needs_no_model_to_be_found_wanting(store: Datastore) -> None:
    """Settings are checked before the model is loaded: the model's name here does not exist."""

    def refuses(sentence: str, **arguments: object) -> None:
        with pytest.raises(UserError, match=sentence):
            KNNHF("no-such-model", **({"datastore": store.path} | arguments))

    refuses("needs a datastore", datastore=None)
    refuses("no such folder", datastore="/nowhere")
    refuses(f"k={len(store) + 1} does not fit", k=len(store) + 1)
    refuses("k=0 must be a whole number of at least 1", k=0)
    refuses("k=1.5 is not a whole number", k=1.5)
    refuses("k=inf is not a whole number", k=math.inf)
    refuses("max_knns=inf is not a whole number", k=5, retomaton=True, max_knns=math.inf)
    refuses("probe='many' is not a number", k=5, probe="many")
    refuses("lmbda=1.01 is not between 0 and 1", k=5, lmbda=1.01)
    refuses("lmbda='much' is not a number", k=5, lmbda="much")
    refuses("knn_temp=0 must be", k=5, knn_temp=0)
    refuses("probe=0 must be", k=5, probe=0)
    refuses("knn_sim_func='cos' is unknown", k=5, knn_sim_func="cos", recompute_dists=True)
    refuses("knn_sim_func=dot does not fit the index", k=5, knn_sim_func="dot")
    refuses("keys of the datastore .* are last_ffn_input", k=5, knn_keytype="last_ffn_output")
    refuses("no index called 'none'", k=5, index="none")
    refuses("Cannot load the model pretrained=no-such-model", k=5)


def test_another_models_store_is_refused_with_both_names(
    store: Datastore, model_folder: Path, tokenizer, tmp_path
) -> None:
    def refuses(model: torch.nn.Module, sentence: str, tokenizer=tokenizer) -> None:
        model.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=sentence) as error:
            KNNHF(str(tmp_path / "other"), datastore=store.path, k=5)
        assert str(model_folder) in str(error.value) and str(tmp_path / "other") in str(error.value)

    refuses(make_llama(seed=1), "keys are .* away")
    refuses(make_llama(hidden_size=16), "keys have 32 numbers and this model's 16")
    other = AutoTokenizer.from_pretrained(model_folder)
    other.add_tokens(["isn't", "东京", "Commission"])
    refuses(make_llama(), "tokenizer is not this model's", other)


def test_a_slightly_different_model_is_only_warned_about(store: Datastore, tokenizer, caplog) -> None:
    model = make_llama()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 0.03 * torch.randn(parameter.shape, generator=generator)
    KNNHF(model, tokenizer=tokenizer, datastore=store.path, k=5)
    assert "away from the datastore's" in caplog.text


@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ("", "error: knn-hf needs a datastore"),
        ("datastore=/nowhere", "error: There is no datastore at /nowhere"),
        ("datastore=STORE,lmbda=2", "error: lmbda=2 is not between 0 and 1"),
        ("datastore=STORE,k=5,no_such_argument=1", "no_such_argument"),
    ],
)
def test_the_command_line_ends_with_one_sentence(store, tmp_path, model_args: str, sentence: str) -> None:
    (tmp_path / "test.en").write_text("x\n")
    command = ["--model", "knn-hf", "--tasks", "law", "--metadata", f"data_dir={tmp_path}"]
    command += ["--include_path", TASKS, "--model_args", model_args.replace("STORE", str(store.path))]
    environment = {k: v for k, v in os.environ.items() if k != "KNN_LM_EVAL_DATASTORE"}
    run = run_lm_eval(*command, environment=environment)
    assert run.returncode == 1
    assert sentence in run.stderr.strip().splitlines()[-1], run.stderr[-2000:]
    assert "Traceback" not in run.stderr


# ------------------------------------------------------------------------------ contexts and continuations of any size


@pytest.mark.parametrize("settings", [{}, {"retomaton": True, "min_knns": 10**6}], ids=["knn-lm", "retomaton"])
def test_a_context_of_white_space_leaves_the_prefix_token(make, settings: dict) -> None:
    """lm-eval moves the context's trailing white space to the continuation, and nothing is left of it."""
    lm = make(lmbda=0.5, knn_temp=2.0, **settings)
    beside = pair("The operator module", " also defines")
    (alone,) = lm.loglikelihood([beside], disable_tqdm=True)
    (blank, unharmed) = lm.loglikelihood([pair("\n", " module"), beside], disable_tqdm=True)
    tokens = lm.tok_encode("\n module")
    ((expected, greedy),) = oracle_scores(lm, [([lm.prefix_token_id], tokens)])
    assert blank == (pytest.approx(expected, abs=TOLERANCE * len(tokens)), greedy)
    assert unharmed == (pytest.approx(alone[0], rel=1e-6), alone[1])


@pytest.mark.parametrize("retomaton", [False, True], ids=["knn-lm", "retomaton"])
@pytest.mark.parametrize("context", ["", "The operator module"])
@pytest.mark.parametrize("length", [MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 2 * MAX_LENGTH, 2 * MAX_LENGTH + 7])
def test_a_continuation_longer_than_the_window_is_scored_in_windows(
    make, retomaton: bool, context: str, length: int
) -> None:
    lm = make(lmbda=0.5, knn_temp=2.0, retomaton=retomaton)
    before = lm.tok_encode(context) or [lm.prefix_token_id]
    tokens = lm.tok_encode(EVAL_TEXT + EVAL_TEXT)[:length]
    other = lm.tok_encode(" also defines")

    def score(*windows: tuple[list[int], list[int]]) -> list[tuple[float, bool]]:
        if not retomaton:
            return oracle_scores(lm, list(windows))
        return [lm._loglikelihood_tokens([(("a", "b"), *window)], disable_tqdm=True)[0] for window in windows]

    requests = [((context, "long"), before, tokens), (("a", "b"), before, other)]
    (actual, greedy), (unharmed, _) = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    # Windows end where the text does; each scores as many tokens as it reads, the first one what is left.
    text, windows, end = before + tokens, [], len(before) + len(tokens)
    while end > len(before):
        begin = max(len(before), end - MAX_LENGTH)
        windows.append((text[:begin], text[begin:end]))
        end = begin
    expected = score(*windows)
    assert actual == pytest.approx(sum(log_prob for log_prob, _ in expected), abs=TOLERANCE * length)
    assert greedy == all(is_greedy for _, is_greedy in expected)
    assert unharmed == pytest.approx(score((before, other))[0][0], abs=TOLERANCE * len(other))


def test_an_empty_continuation_is_certain(make) -> None:
    lm = make()
    requests = [(("a", ""), [3, 4], []), (("a", "b"), [3, 4], [5])]
    scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert scores[0] == (0.0, True) and scores[1][0] < 0
