"""Token records: they are what was scored, whatever scored it, and whole or not there."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.forks import Child
from helpers.oracle import lm_outputs
from helpers.stores import change_json, flip_bit
from helpers.texts import longest_end, ngram_p
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.make.pruning import prune_greedy_merge
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.methods.adaptive import Buckets, Gate
from knn_lm_eval.model import records as records_module
from knn_lm_eval.report.record_files import COLUMNS, Records, check_same_tokens, read_records
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore

TEXTS = [EVAL_TEXT, EVAL_TEXT[100:220], "One.", EVAL_TEXT[300:]]
PAIRS = [
    ("The operator module", " also defines"),
    ("The operator module", " also"),
    ("The operator module also", " defines"),  # reads the same tokens as the first, split elsewhere
    ("The operator module", " x"),
    ("", "No context"),
    (EVAL_TEXT, " and then some"),  # longer than the window
    ("A", EVAL_TEXT),  # a continuation of several windows
]
GATE = Gate(("entropy",), (1.5,), (0.5,), ((1.0,),), (0.0,), (1.5,), 0.0, threshold=0.5).plain()
BUCKETS = Buckets((30.0, 60.0), (0.7, 0.5, 0.2)).plain()
HOW: dict[str, dict[str, Any]] = {
    "kNN-LM": {"lmbda": 0.4},
    "kNN alone": {"lmbda": 1.0, "knn_temp": 50.0},
    "overlapping windows": {"lmbda": 0.4, "context_len": MAX_LENGTH // 2},
    "buckets": {"lmbda": BUCKETS},
    "gate with a threshold": {"lmbda": GATE},
    "one search for all": {"lmbda": 0.4, "search_all": True},
    "one search for all, gate": {"lmbda": GATE, "search_all": True},
    "LM alone": {"lmbda": 0},
    "k below three": {"lmbda": 0.4, "k": 2},
    "RetoMaton": {"lmbda": 0.4, "retomaton": True, "min_knns": 3},
    "RetoMaton without search": {"lmbda": 0.4, "retomaton": True, "min_knns": 0},
    "RetoMaton, buckets": {"lmbda": BUCKETS, "retomaton": True, "min_knns": 3},
    "RetoMaton, carried": {
        "lmbda": 0.4,
        "retomaton": True,
        "min_knns": 3,
        "carry_state": True,
        "context_len": MAX_LENGTH // 2,
    },
    "pruned": {"lmbda": 0.4, "store": "pruned"},
}


def rolling() -> list[Instance]:
    return [
        Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("texts", number, 1))
        for number, text in enumerate(TEXTS)
    ]


def choices() -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, number % 2, metadata=("choices", number // 2, 1))
        for number, pair in enumerate(PAIRS)
    ]


@pytest.fixture(scope="module")
def pruned(store: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    merged = prune_greedy_merge(store, tmp_path_factory.mktemp("pruned") / "store", neighbours=5)
    build_index(merged, "Flat", quality_queries=0)
    return merged


@pytest.fixture(scope="module")
def make(store: Datastore, pruned: Datastore, model_folder: Path) -> Callable[..., KNNHF]:
    def make(**changes: Any) -> KNNHF:
        path = {"store": store.path, "pruned": pruned.path}[changes.pop("store", "store")]
        usual = {"pretrained": str(model_folder), "datastore": str(path), "batch_size": 3, "k": 40, "knn_temp": 5.0}
        return KNNHF(**(usual | changes))

    return make


@pytest.fixture(scope="module")
def sorted_store(store: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("sorted") / "store"
    shutil.copytree(store.path, folder)
    build_suffix_array(Datastore.open(folder))
    return Datastore.open(folder)


def by_request(records: Records, task: str) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    columns = records.columns
    of_task = columns["task"] == records.tasks.index(task)
    found = {}
    for document, request in sorted(set(zip(columns["document"][of_task], columns["request"][of_task], strict=True))):
        mine = of_task & (columns["document"] == document) & (columns["request"] == request)
        found[int(document), int(request)] = {name: column[mine] for name, column in columns.items()}
    return found


@pytest.mark.parametrize("name", HOW)
def test_records_are_what_was_scored(name: str, make: Callable[..., KNNHF], tmp_path: Path) -> None:
    plain, lm = make(**HOW[name]), make(**HOW[name], records=tmp_path / "r")
    texts, pairs = lm.loglikelihood_rolling(rolling()), lm.loglikelihood(choices())
    assert texts == plain.loglikelihood_rolling(rolling())  # records change nothing
    # RetoMaton's records leave out that two requests walk side by side.
    assert pairs == plain.loglikelihood(choices())
    records = read_records(tmp_path / "r")
    assert records.tasks == ["choices", "texts"]
    of_texts, of_pairs = by_request(records, "texts"), by_request(records, "choices")
    for number, (text, score) in enumerate(zip(TEXTS, texts, strict=True)):
        mine, tokens = of_texts[number, 0], lm.tok_encode(text)
        assert mine["token"].tolist() == tokens and mine["position"].tolist() == list(range(len(tokens)))
        assert mine["log_prob"].astype(np.float64).sum() == pytest.approx(score, rel=1e-6)
        windows = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, 0, MAX_LENGTH, lm.context_len)]
        read = [len((c + t)[-(MAX_LENGTH + 1) : -1]) - len(t) + 1 + i for c, t in windows for i in range(len(t))]
        assert mine["read"].tolist() == read and max(read) <= MAX_LENGTH
        if score.num_searches is not None:
            assert mine["searched"].sum() == score.num_searches
    for number, (pair, (score, _)) in enumerate(zip(PAIRS, pairs, strict=True)):
        context, continuation = lm._encode_pair(*pair) if pair[0] else ([], lm.tok_encode(pair[1]))
        mine = of_pairs[number // 2, number % 2]
        assert mine["token"].tolist() == continuation
        assert mine["position"].tolist() == [len(context) + i for i in range(len(continuation))]
        assert mine["log_prob"].astype(np.float64).sum() == pytest.approx(score, rel=1e-6)
    check_mixture(records, lm)
    assert (records.columns["overlap"] == -1).all()
    about = json.loads((tmp_path / "r" / "loglikelihood-0-00000-of-00001.json").read_text())
    assert about["datastore"][0]["keys_sha256"] == lm.retriever.datastore.keys_checksum
    assert about["settings"]["lmbda"] == lm.settings["lmbda"] and about["tasks"] == ["choices"]


def check_mixture(records: Records, lm: KNNHF) -> None:
    """The three log-probabilities go together by the weight, and neighbours are there where there is a p_kNN."""
    of = {name: column.astype(np.float64) for name, column in records.columns.items()}
    for i in range(len(records)):
        lmbda, p_lm = of["lmbda"][i], math.exp(of["lm_log_prob"][i])
        if math.isnan(of["knn_log_prob"][i]):
            assert lmbda == 0 and of["nearest"][i] == math.inf and of["entry_0"][i] == -1 and of["weight_0"][i] == 0
            assert of["log_prob"][i] == pytest.approx(of["lm_log_prob"][i], rel=1e-6)
        else:
            mixed = (1 - lmbda) * p_lm + lmbda * math.exp(of["knn_log_prob"][i])
            assert math.exp(of["log_prob"][i]) == pytest.approx(mixed, rel=1e-4)
            weights = [of[f"weight_{place}"][i] for place in range(3)]
            assert weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1 + 1e-5
            assert of["entry_0"][i] >= 0
    if "retomaton" not in lm.settings:
        has_neighbours = ~np.isnan(of["knn_log_prob"])
        assert (has_neighbours == (of["searched"] == 1)).all()


def test_each_figure_is_the_oracle_s(make: Callable[..., KNNHF], store: Datastore, tmp_path: Path) -> None:
    lm = make(lmbda=0.4, records=tmp_path / "r")
    lm.loglikelihood_rolling(rolling()[:1])
    of = read_records(tmp_path / "r").columns
    tokens, place = lm.tok_encode(TEXTS[0]), 0
    keys = store.keys.astype(np.float64)
    for context, targets in map(make_disjoint_window, get_rolling_token_windows(tokens, 0, MAX_LENGTH, 1)):
        p_lm, queries = lm_outputs(lm.model, lm.model.model.layers[-1].mlp, (context + targets)[:-1])
        rows = range(len(p_lm) - len(targets), len(p_lm))
        for row, target in zip(rows, targets, strict=True):
            p = p_lm[row]
            assert of["lm_log_prob"][place] == pytest.approx(math.log(p[target]), abs=1e-4)
            assert of["entropy"][place] == pytest.approx(-sum(x * math.log(x) for x in p.tolist() if x), rel=1e-3)
            assert abs(int(of["rank"][place]) - (1 + sum(p > p[target]))) <= 1  # of nearly equal ones
            distances = ((keys - queries[row]) ** 2).sum(axis=1)
            nearest = np.argsort(distances, kind="stable")[:40]
            weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / 5.0)
            weights /= weights.sum()
            assert of["nearest"][place] == pytest.approx(distances[nearest[0]], rel=1e-3, abs=1e-2)
            for heaviest in range(3):
                assert of[f"weight_{heaviest}"][place] == pytest.approx(weights[heaviest], rel=1e-2, abs=1e-4)
                entry = int(of[f"entry_{heaviest}"][place])
                assert distances[entry] == pytest.approx(distances[nearest[heaviest]], rel=1e-3, abs=1e-2)
            place += 1
    assert place == len(tokens)


def test_row_groups_change_nothing(make: Callable[..., KNNHF], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in (("one", 2**16), ("many", 20)):
        monkeypatch.setattr(records_module, "ROWS_PER_GROUP", rows)
        make(lmbda=0.4, records=tmp_path / name).loglikelihood_rolling(rolling())
    groups = [pq.ParquetFile(next((tmp_path / name).glob("*.parquet"))).num_row_groups for name in ("one", "many")]
    assert groups[0] == 1 and groups[1] > 3
    one, many = (read_records(tmp_path / name) for name in ("one", "many"))
    assert len(one) == sum(len(make().tok_encode(text)) for text in TEXTS)
    for name in COLUMNS:
        np.testing.assert_array_equal(one.columns[name], many.columns[name])


def test_what_is_asked_for_twice_is_recorded_once(make: Callable[..., KNNHF], tmp_path: Path) -> None:
    """Where processes have different numbers of requests, lm-eval has them do their last one again."""
    requests = choices()
    make(lmbda=0.4, records=tmp_path / "r").loglikelihood([*requests, requests[-1]])
    make(lmbda=0.4, records=tmp_path / "once").loglikelihood(requests)
    assert len(read_records(tmp_path / "r")) == len(read_records(tmp_path / "once"))


NGRAMS: dict[str, dict[str, Any]] = {
    "LM": {"lmbda": 0},
    "kNN-LM": {"lmbda": 0.4},
    "gate with a threshold": {"lmbda": GATE},
    "one search for all": {"lmbda": 0.4, "search_all": True},
    "RetoMaton": {"lmbda": 0.4, "retomaton": True, "min_knns": 3},
    "RetoMaton, buckets": {"lmbda": BUCKETS, "retomaton": True, "min_knns": 3},
}


class SlowNGrams:
    """Plain loops over the datastore's documents, each done once for all tests."""

    def __init__(self, store: Datastore) -> None:
        documents = [part.tolist() for part in np.split(np.array(store.values), store.document_starts[1:])]
        self.p = cache(lambda read, token: ngram_p(documents, list(read), token))
        self.overlap = cache(lambda tokens: longest_end(documents, list(tokens), continued=False))


@pytest.fixture(scope="module")
def slow_ngrams(sorted_store: Datastore) -> SlowNGrams:
    return SlowNGrams(sorted_store)


@pytest.mark.parametrize("name", NGRAMS)
def test_records_of_a_mixture_with_ngrams(
    name: str, make: Callable[..., KNNHF], sorted_store: Datastore, slow_ngrams: SlowNGrams, tmp_path: Path
) -> None:
    """log p is the whole mixture's, and overlaps are those of plain loops over the datastore's documents."""
    how = NGRAMS[name] | {"datastore": str(sorted_store.path), "ngram_lmbda": 0.3}
    plain, lm = make(**how), make(**how, records=tmp_path / "r")
    texts, pairs = lm.loglikelihood_rolling(rolling()), lm.loglikelihood(choices())
    assert texts == plain.loglikelihood_rolling(rolling()) and pairs == plain.loglikelihood(choices())
    records = read_records(tmp_path / "r")
    of_texts, of_pairs = by_request(records, "texts"), by_request(records, "choices")
    for number, score in enumerate(texts):
        mine = of_texts[number, 0]
        assert mine["log_prob"].astype(np.float64).sum() == pytest.approx(score, rel=1e-6)
    for number, (score, _) in enumerate(pairs):
        assert of_pairs[number // 2, number % 2]["log_prob"].astype(np.float64).sum() == pytest.approx(score, rel=1e-6)
    for number in (1, 2):  # short ones
        mine, tokens = of_texts[number, 0], lm.tok_encode(TEXTS[number])
        for place in range(len(tokens)):
            of = {column: float(part[place]) for column, part in mine.items()}
            p_knn = 0.0 if math.isnan(of["knn_log_prob"]) else math.exp(of["knn_log_prob"])
            others = (1 - of["lmbda"]) * math.exp(of["lm_log_prob"]) + of["lmbda"] * p_knn
            read = [lm.prefix_token_id, *tokens[:place]][-int(of["read"]) :]
            p = slow_ngrams.p(tuple(read), tokens[place])
            assert math.exp(of["ngram_log_prob"]) == pytest.approx(p, rel=1e-5, nan_ok=True)
            expected = others if math.isnan(p) else 0.7 * others + 0.3 * p
            assert math.exp(of["log_prob"]) == pytest.approx(expected, rel=1e-4)
            assert of["overlap"] == slow_ngrams.overlap(tuple(tokens[: place + 1]))
    assert (records.columns["searched"].any()) == (name != "LM")


def test_a_suffix_array_of_another_text_measures_nothing(
    make: Callable[..., KNNHF], sorted_store: Datastore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning where nothing else needs it; what does, is refused."""
    shutil.copytree(sorted_store.path, tmp_path / "store")
    remove_documents(tmp_path / "store", [1])
    shutil.copytree(sorted_store.path / "suffixes", tmp_path / "store" / "suffixes", dirs_exist_ok=True)
    caplog.clear()
    lm = make(datastore=str(tmp_path / "store"), lmbda=0.4, records=tmp_path / "r")
    lm.loglikelihood_rolling(rolling()[1:3])
    (said,) = [text for text in caplog.messages if "overlaps with the datastore" in text]
    assert "is of another text than" in said and "build it again" in said
    of = read_records(tmp_path / "r").columns
    assert (of["overlap"] == -1).all() and np.isnan(of["ngram_log_prob"]).all()
    for needs_it in ({"ngram_lmbda": 0.2}, {"exclude_overlap": 13}):
        with pytest.raises(UserError, match="is of another text than"):
            make(datastore=str(tmp_path / "store"), lmbda=0.4, records=tmp_path / "n", **needs_it)


def test_overlaps_are_measured_where_something_measures_them(make: Callable[..., KNNHF], tmp_path: Path) -> None:
    lm = make(lmbda=0.4, records=tmp_path / "r")
    assert lm.records is not None
    lm.records.overlaps = lambda tokens: (tokens % 7 + np.arange(len(tokens))).astype(np.int32)
    lm.loglikelihood_rolling(rolling())
    lm.loglikelihood(choices()[:4])
    of = read_records(tmp_path / "r").columns
    np.testing.assert_array_equal(of["overlap"], of["token"] % 7 + of["position"])


def test_a_rerun_replaces_and_another_run_is_refused(make: Callable[..., KNNHF], tmp_path: Path) -> None:
    make(lmbda=0.4, records=tmp_path / "r").loglikelihood_rolling(rolling())
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    make(lmbda=0.4, records=tmp_path / "r").loglikelihood_rolling(rolling())
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before
    with pytest.raises(UserError, match="holds records of a run with another settings; give another folder"):
        make(lmbda=0.5, records=tmp_path / "r")
    others = make(lmbda=0.4, records=tmp_path / "r")
    request = Instance("loglikelihood_rolling", {}, ("Words.",), 0, metadata=("others", 0, 1))
    with pytest.raises(UserError, match=r"holds records of other tasks \('texts'\); give another folder"):
        others.loglikelihood_rolling([request])
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_studies_leave_none(make: Callable[..., KNNHF], tmp_path: Path) -> None:
    lm, other = make(lmbda=0.4, records=tmp_path / "r"), make(lmbda=0.4)
    with lm.scored_by(other.scorer):
        lm.loglikelihood_rolling(rolling()[:1])
    assert not list((tmp_path / "r").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_change_of_the_disk(make: Callable[..., KNNHF], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(records_module, "ROWS_PER_GROUP", 50)
    folder = tmp_path / "r"

    def evaluate() -> None:
        lm = make(lmbda=0.4, records=folder)
        lm.loglikelihood_rolling(rolling())
        lm.loglikelihood(choices())

    assert Child(evaluate, tmp_path).ended().status == 0
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    kills, at = 0, 1
    for again in (False, True):  # into an empty folder, and over whole records
        while True:
            if not again:
                shutil.rmtree(folder, ignore_errors=True)
            ended = Child(evaluate, tmp_path, at).ended()
            if ended.status != -signal.SIGKILL:
                assert ended.status == 0, ended.said[-2000:]
                break
            kills += 1
            try:
                found = read_records(folder)
            except UserError as error:
                assert str(error).count("\n") == 0
            else:  # one kind is whole, or both
                assert len(found.tasks) >= 1
            assert Child(evaluate, tmp_path).ended().status == 0
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
            at += 3
        at = 2
    assert kills > 6


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "There are no token records in"),
    "parquet gone": (lambda folder: parquet(folder).unlink(), "is incomplete: .*parquet is missing"),
    "a bit": (lambda folder: flip_bit(parquet(folder), 4000), "is damaged: it is not what the JSON beside it says"),
    "cut": (lambda folder: os.truncate(parquet(folder), 900), "is damaged: it is not what the JSON beside it says"),
    "no JSON": (lambda folder: said(folder).unlink(), "There are no token records in"),
    "JSON changed": (lambda folder: replace(said(folder), '"rows": ', '"rows": 1'), "is damaged, or was changed"),
    "another format": (lambda folder: change_json(said(folder), format="x"), "is no JSON of token records"),
    "later version": (lambda folder: change_json(said(folder), format_version=9), "has format version 9"),
    "a process is missing": (lambda folder: change_json(said(folder), processes=2), "of the 2 processes .* 1 left"),
    "unfinished": (lambda folder: (folder / ".x.unfinished").touch(), "holds unfinished records"),
    "no rows": (lambda folder: change_json(said(folder), rows=3), "its column task is not what the JSON"),
}


def parquet(folder: Path) -> Path:
    return next(folder.glob("*.parquet"))


def said(folder: Path) -> Path:
    return next(folder.glob("*.json"))


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture(scope="module")
def whole(make: Callable[..., KNNHF], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "r"
    make(lmbda=0.4, records=folder).loglikelihood_rolling(rolling())
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_gives_one_sentence(name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "r")
    damage, sentence = DAMAGES[name]
    damage(tmp_path / "r")
    with pytest.raises(UserError, match=sentence) as caught:
        read_records(tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_parquet_gives_one_sentence(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "r")
    parquet(tmp_path / "r").write_bytes(b"PAR1 words")
    file = json.loads(said(tmp_path / "r").read_text())["file"]
    import hashlib

    forged = file | {"bytes": 10, "sha256": hashlib.sha256(b"PAR1 words").hexdigest()}
    change_json(said(tmp_path / "r"), file=forged)
    with pytest.raises(UserError, match="is damaged: it is no Parquet file of token records"):
        read_records(tmp_path / "r")


def test_only_records_of_the_same_tokens_go_together(
    make: Callable[..., KNNHF], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_records(whole)
    make(lmbda=0.2, records=tmp_path / "same").loglikelihood_rolling(rolling())
    check_same_tokens([first, read_records(tmp_path / "same")])
    make(lmbda=0.2, records=tmp_path / "fewer").loglikelihood_rolling(rolling()[:2])
    with pytest.raises(UserError, match="are records of other tokens: [0-9]+ and [0-9]+ of them"):
        check_same_tokens([first, read_records(tmp_path / "fewer")])
    changed = Records(first.folder, first.about, first.tasks, first.columns | {"token": first.columns["token"] + 1})
    with pytest.raises(UserError, match="at document 0, position 0 their token differs"):
        check_same_tokens([first, changed])
    other = Records(first.folder, first.about | {"tokenizer": {"name": "x", "sha256": "0"}}, first.tasks, first.columns)
    with pytest.raises(UserError, match="are records of other tokenizers"):
        check_same_tokens([first, other])
    renamed = Records(first.folder, first.about, ["others"], first.columns)
    with pytest.raises(UserError, match="are records of other tasks"):
        check_same_tokens([first, renamed])


def test_a_cache_of_results_is_refused(make: Callable[..., KNNHF], tmp_path: Path) -> None:
    class Hook:
        dbdict = {"x": 1}

    with pytest.raises(UserError, match="records and --use_cache do not go together"):
        make(lmbda=0.4, records=tmp_path / "r").set_cache_hook(Hook())
