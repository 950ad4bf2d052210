"""exclude_overlap: what plain loops leave of the neighbours that exact search finds, token by token."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.oracle import lm_outputs
from helpers.slow_automaton import StoreForOracle, slow_walk
from helpers.stores import part_of
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT, make_llama
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from knn_lm_eval import KNNHF, UserError, retrieval_augmented
from knn_lm_eval.benchmark.shared_pass import _key, score_together
from knn_lm_eval.lm.reading import Passage, WholeText
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.report.record_files import read_records
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.study.grid import make_grid
from knn_lm_eval.study.grid_scorer import GridScorer
from knn_lm_eval.study.inspection import inspect_text
from knn_lm_eval.study.run import load_knn_hf

SIZE = 5
# In the store: a part of a document, half of which is the text; parts of two; a little of one.
TEXTS = [
    TRAIN_TEXT[2000:2250],
    "Nothing of this kind.",
    TRAIN_TEXT[5000:5150] + " and " + TRAIN_TEXT[900:1000],
    EVAL_TEXT[:100] + TRAIN_TEXT[3000:3060] + EVAL_TEXT[100:140],
]
KNN: dict[str, Any] = {"k": 20, "lmbda": 0.4, "knn_temp": 5.0}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def sorted_store(tmp_path_factory: pytest.TempPathFactory, clustered: Datastore) -> Datastore:
    folder = tmp_path_factory.mktemp("sorted") / "store"
    shutil.copytree(clustered.path, folder, ignore=shutil.ignore_patterns("*.codes", "*.scan"))
    build_suffix_array(Datastore.open(folder))
    return Datastore.open(folder)


@pytest.fixture
def make(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sorted_store: Datastore) -> Any:
    def make(**settings: Any) -> KNNHF:
        usual = KNN | {"datastore": sorted_store.path, "batch_size": 2, "exclude_overlap": SIZE}
        return KNNHF(model, tokenizer=tokenizer, **usual | settings)

    return make


def rolling(lm: KNNHF, texts: list[str] = TEXTS) -> list[Any]:
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])


class Oracle:
    """Which entries are left out of a text of ``tokens``, by plain loops."""

    def __init__(self, store: Datastore, tokens: list[int], size: int = SIZE) -> None:
        self.values, self.tokens, self.size = store.values.tolist(), tokens, size
        ends = [*store.document_starts.tolist(), len(store)]
        self.bounds = list(zip(ends[:-1], ends[1:], strict=True))
        self.away = [bounds for bounds in self.bounds if self.is_text(self.values[slice(*bounds)])]

    def is_text(self, document: list[int]) -> bool:
        read = self.tokens[:-1]
        shares = []
        for one, other in ((read, document), (document, read)):
            runs = {tuple(other[i : i + self.size]) for i in range(len(other) - self.size + 1)}
            shared = set()
            for i in range(len(one) - self.size + 1):
                if tuple(one[i : i + self.size]) in runs:
                    shared |= set(range(i, i + self.size))
            shares.append(len(shared) > 0 and 2 * len(shared) >= len(one))
        return any(shares)

    def __call__(self, position: int, entry: int) -> bool:
        if any(start <= entry < stop for start, stop in self.away):
            return True
        (begin,) = [start for start, stop in self.bounds if start <= entry < stop]
        if position < self.size or entry - begin < self.size:
            return False
        return self.values[entry - self.size : entry] == self.tokens[position - self.size : position]


def mixed(p_lm: float, p_knn: dict[int, float], token: int, lmbda: float = 0.4) -> float:
    return (1 - lmbda) * p_lm + lmbda * p_knn.get(token, 0.0) if p_knn else p_lm


def expected_of(
    lm: KNNHF, store: Datastore, tokens: list[int], windows: list[Any], walks: AutomatonSettings | None, first: int = 0
) -> tuple[list[float], int, int]:
    """log p of each scored token of a text, how many neighbours were left out, and found."""
    oracle, slow = Oracle(store, tokens), StoreForOracle(store, None)
    if walks is not None and lm.settings["clusters"] == "kmeans":
        slow = StoreForOracle(store, Clusters.open(store, "kmeans"))
    log_probs: list[float] = []
    gone = found = 0
    place = first
    for context, continuation in windows:
        read = (context + continuation)[-(lm.max_length + 1) : -1]
        p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, read)
        p_lm, queries = p_lm[-len(continuation) :], queries[-len(continuation) :]
        if walks is None:
            p_knn = []
            for step, query in enumerate(queries):
                distances, entries = (part[0] for part in slow.search(query[None], 20))
                kept = [i for i, entry in enumerate(entries) if not oracle(place + step, int(entry))]
                gone, found = gone + len(entries) - len(kept), found + len(entries)
                weights = np.exp(-(distances - distances[kept].min()) / 5.0) if kept else distances
                total, of_values = sum(weights[kept]), dict[int, float]()
                for i in kept:
                    value = int(store.values[entries[i]])
                    of_values[value] = of_values.get(value, 0.0) + weights[i] / total
                p_knn.append(of_values)
        else:
            base = place
            p_knn, _ = slow_walk(slow, queries, continuation, walks, lambda step, e, at=base: oracle(at + step, e))
        for row, p, token in zip(p_lm, p_knn, continuation, strict=True):
            log_probs.append(math.log(mixed(row[token], p, token)))
        place += len(continuation)
    return log_probs, gone, found


WAYS: dict[str, dict[str, Any]] = {
    "kNN-LM": {},
    "overlapping windows": {"context_len": MAX_LENGTH // 2},
    "one pass": {"search_all": True},
    "exact search": {"index": "exact"},
    "RetoMaton": {"retomaton": True, "min_knns": 3, "max_knns": 30},
    "RetoMaton with clusters": {"retomaton": True, "min_knns": 3, "max_knns": 30, "clusters": "kmeans"},
    "RetoMaton, all counted": {"retomaton": True, "min_knns": 2, "max_knns": 30, "duplicates": "keep"},
    "RetoMaton without pointers": {"retomaton": True, "no_pointer": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_token_is_the_oracle_s(way: str, make: Any, sorted_store: Datastore, tmp_path: Path) -> None:
    """Rolling scores of several texts in windows of a batch, and which share of the neighbours was left out."""
    lm = make(**WAYS[way], records=tmp_path / "r")
    walks = None
    if "min_knns" in WAYS[way]:
        duplicates = WAYS[way].get("duplicates", "merge")
        walks = AutomatonSettings(20, 5.0, WAYS[way]["min_knns"], 30, duplicates)
    scores = rolling(lm)
    of = read_records(tmp_path / "r").columns
    gone = found = away = 0
    for number, (text, score) in enumerate(zip(TEXTS, scores, strict=True)):
        tokens = lm.tok_encode(text)
        windows = get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, lm.context_len)
        expected, left_out, neighbours = expected_of(
            lm, sorted_store, tokens, [make_disjoint_window(w) for w in windows], walks
        )
        gone, found = gone + left_out, found + neighbours
        away += len(Oracle(sorted_store, tokens).away)
        np.testing.assert_allclose(of["log_prob"][of["document"] == number], expected, atol=2e-4)
        assert float(score) == pytest.approx(sum(expected), abs=2e-3)
    said = lm.get_model_info()["knn"]
    assert said["exclude_overlap"] == SIZE and said["texts_compared"] == len(TEXTS)
    assert said["excluded_documents"] == away > 1 and 0 < said["excluded_neighbours"] < 1
    if walks is None:
        assert said["excluded_neighbours"] == pytest.approx(gone / found)
    (alone,) = rolling(make(**WAYS[way], batch_size=1), TEXTS[:1])
    assert float(alone) == pytest.approx(float(scores[0]), rel=1e-6)
    (without,) = rolling(make(**WAYS[way], exclude_overlap=None), TEXTS[:1])
    assert float(scores[0]) < float(without) - 1


@pytest.mark.parametrize("way", ["kNN-LM", "one pass", "RetoMaton"])
def test_continuations(way: str, make: Any, sorted_store: Datastore) -> None:
    """Log-likelihoods look at all of the context, also where the window has lost its beginning; some share a pass."""
    lm = make(**WAYS[way])
    walks = AutomatonSettings(20, 5.0, 3, 30, "merge") if "min_knns" in WAYS[way] else None
    some, other = lm.tok_encode(TRAIN_TEXT[2000:2300]), lm.tok_encode(EVAL_TEXT)
    asked = [
        (some[:20], some[20:24]),
        (some[:20], some[20:23] + [7]),
        (some[:22], some[22:24]),
        (other[:150] + some[:3], some[3:12]),  # the window has not all of it
        (some[:100] + other[:150], some[3:12]),
        (other[:4], some[:3]),
        ([lm.prefix_token_id], some[30:45]),
    ]
    assert len(asked[3][0]) > MAX_LENGTH
    found = lm._loglikelihood_tokens([(None, *pair) for pair in asked], disable_tqdm=True)
    for (context, continuation), (score, _) in zip(asked, found, strict=True):
        own = [] if context == [lm.prefix_token_id] else context
        tokens = own + continuation
        windows = [((context + continuation)[: -len(continuation)], continuation)]
        expected, _, _ = expected_of(lm, sorted_store, tokens, windows, walks, len(own))
        assert score == pytest.approx(sum(expected), abs=1e-3)


@pytest.mark.parametrize("way", ["kNN-LM", "RetoMaton"])
def test_tuning_and_inspection_leave_the_same_out(way: str, make: Any, sorted_store: Datastore) -> None:
    """A grid's points are evaluations with their settings; of each k, the first of those found for the largest."""
    lm, is_walk = make(**WAYS[way]), way == "RetoMaton"
    grid = make_grid(len(sorted_store), is_walk, k="5,20", knn_temp="5", lmbda="0.4")
    scorer = GridScorer(lm, grid)
    with lm.scored_by(scorer):
        rolling(lm, TEXTS[:2])
    found = {settings["k"]: log_prob for surface in scorer.surfaces for settings, log_prob in surface.settings()}
    for k in (5, 20):
        expected = sum(map(float, rolling(make(**WAYS[way], k=k), TEXTS[:2])))
        assert found[k] == pytest.approx(expected, rel=1e-5)
    (expected,) = rolling(lm, TEXTS[:1])
    inspected = inspect_text(lm, TEXTS[0])
    assert sum(math.log(token.p) for token in inspected) == pytest.approx(float(expected), rel=1e-5)
    oracle = Oracle(sorted_store, lm.tok_encode(TEXTS[0]))
    assert not any(oracle(at, one.entry) for at, token in enumerate(inspected) for one in token.neighbours)


def test_a_shared_pass_tells_texts_apart(make: Any) -> None:
    """The same window of another text has other neighbours left out."""
    lm, tokens = make(), make().tok_encode(TRAIN_TEXT[2000:2100])
    whole, other = WholeText.of(tokens), WholeText.of([7, *tokens])
    places = [(whole, 2), (whole, 3), (other, 2), (None, 0)]
    passages = [Passage(tokens[2:9], [[5]], whole=text, start=start) for text, start in places]
    assert len({_key(passage, False) for passage in passages}) == len(passages)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS[:2]]
    together = score_together([lm.scorer, make(exclude_overlap=None).scorer], [[passages[0]]], False)
    alone = [make(exclude_overlap=size).scorer.score([[passages[0]]], False) for size in (SIZE, None)]
    assert together == alone and rolling(lm, TEXTS[:2]) == lm.loglikelihood_rolling(requests)


def test_greedy_is_the_mixture_s(make: Any) -> None:
    """Where all neighbours are left out, the LM's most probable token is the most probable one."""
    text = make().tok_encode(TRAIN_TEXT[2000:2200])
    lm, alone = make(exclude_overlap=1, k=1), make(lmbda=0, exclude_overlap=None)
    for length in (8, 20, 40):
        asked = [(None, text[:length], [token]) for token in range(0, 400, 3)]
        found, expected = (one._loglikelihood_tokens(asked, disable_tqdm=True) for one in (lm, alone))
        np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], atol=1e-5)
        assert [best for _, best in found] == [best for _, best in expected]


def test_windows_that_carry_the_walk_on(make: Any) -> None:
    how = {"retomaton": True, "carry_state": True, "context_len": MAX_LENGTH // 2}
    scores = [float(score) for score in rolling(make(**how))]
    np.testing.assert_allclose([float(s) for s in rolling(make(**how, batch_size=1))], scores, rtol=1e-6)
    assert scores != [float(score) for score in rolling(make(**how, exclude_overlap=None))]


def test_several_stores_are_one(make: Any, sorted_store: Datastore, tmp_path: Path) -> None:
    documents = len(sorted_store.document_starts)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, first, stop in zip(folders, (0, documents // 3), (documents // 3, documents), strict=True):
        build_suffix_array(part_of(sorted_store, folder, first, stop))
    both = make(datastore=[str(folder) for folder in folders])
    expected = [float(score) for score in rolling(make(index="exact"))]
    np.testing.assert_allclose([float(score) for score in rolling(both)], expected, rtol=1e-5)
    walking = {"retomaton": True, "min_knns": 3}
    expected = [float(score) for score in rolling(make(index="exact", **walking))]
    both = make(datastore=[str(folder) for folder in folders], **walking)
    np.testing.assert_allclose([float(score) for score in rolling(both)], expected, rtol=1e-5)


def test_refusals(
    make: Any, model: LlamaForCausalLM, sorted_store: Datastore, store: Datastore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no suffix array, which .* exclude_overlap look in; build one with"):
        make(datastore=store.path)
    with pytest.raises(UserError, match="exclude_overlap=0 must be a whole number of at least 1"):
        make(exclude_overlap=0)
    with pytest.raises(UserError, match="leave exclude_overlap or ngram_lmbda out"):
        make(ngram_lmbda=0.3)
    with pytest.raises(UserError, match="is for texts that are scored"):
        retrieval_augmented(model, sorted_store.path, k=20, exclude_overlap=SIZE)
    with pytest.raises(UserError, match="is for texts that are scored"):
        make().generate_until([Instance("generate_until", {}, ("A", {"until": [], "max_gen_toks": 2}), 0)])
    with pytest.raises(UserError, match="exclude_overlap is not for this study"):
        load_knn_hf({"datastore": sorted_store.path, "exclude_overlap": SIZE})
    changed = tmp_path / "changed"
    shutil.copytree(sorted_store.path, changed)
    remove_documents(changed, [1])
    shutil.copytree(sorted_store.path / "suffixes", changed / "suffixes")
    with pytest.raises(UserError, match="is of another text than .* has now; build it again"):
        make(datastore=changed)
