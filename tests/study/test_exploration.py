"""What is kept of a text mixes with any setting to what scoring with that setting gives; continuations are the LM's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.lm.reading import Passage
from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.model.token_figures import TokenFigures
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.study.continuation import Sampling, continue_both
from knn_lm_eval.study.exploration import ExploredSettings, Explorer
from knn_lm_eval.study.inspection import inspect_text, windows_of

TEXT = EVAL_TEXT[:200] + TRAIN_TEXT[300:500]
OPENED = {"k": 30, "lmbda": 0.4, "knn_temp": 2.0}
BUCKETS = {"kind": "buckets", "edges": [5.0], "lmbdas": [0.7, 0.2]}


@pytest.fixture(scope="module")
def hnsw(clustered: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """The store with a suffix array, and an index whose searches for few neighbours find others than those for many."""
    folder = tmp_path_factory.mktemp("hnsw") / "store"
    shutil.copytree(clustered.path, folder)
    build_index(Datastore.open(folder), "HNSW4", name="graph")
    build_suffix_array(Datastore.open(folder))
    return Datastore.open(folder)


def scored(lm: KNNHF) -> TokenFigures:
    """Each token of the text, as scoring knows it."""
    batches = [
        [Passage((context + targets)[:-1], [targets], 0)] for context, targets in windows_of(lm, lm.tok_encode(TEXT))
    ]
    lm.scorer.begin_texts()
    of_windows = [score.figures for ((score,),) in (lm.scorer.score([batch], False) for batch in batches)]
    return TokenFigures(*(torch.cat(parts) for parts in zip(*of_windows, strict=True)))  # type: ignore[arg-type]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kNN-LM": ({}, {}),
    "n-grams": ({"ngram_lmbda": 0.3, "context_len": 20}, {}),
    "buckets": ({"lmbda": BUCKETS}, {"lmbda": None}),
    "a graph": ({"index": "graph"}, {}),
    "RetoMaton": ({"retomaton": True, "min_knns": 2}, {"min_knns": 1}),
    "clusters": (
        {"retomaton": True, "clusters": "kmeans", "duplicates": "keep", "context_len": 20, "carry_state": True},
        {"min_knns": 9},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_settings_of_a_kept_text_are_those_of_a_fresh_scoring(case: str, hnsw: Datastore, tmp_path: Path) -> None:
    how, changes = CASES[case]
    explorer = Explorer(KNNHF(datastore=hnsw.path, **OPENED | how))
    kept = explorer.read(TEXT)
    assert len(kept) > MAX_LENGTH and len(kept.windows) > 1 and "".join(kept.texts) == TEXT
    before = explorer.mix(kept, explorer.first)
    for k, lmbda, knn_temp in ((30, 0.4, 2.0), (7, 0.9, 5.0), (30, 0.0, 0.3), (12, 0.5, 40.0)):
        if explorer.walks:
            lmbda = max(lmbda, 1e-9)  # at 0 scoring does not walk
        settings = replace(ExploredSettings(k, lmbda, knn_temp), **changes)
        mixed = explorer.mix(kept, settings)
        in_force = {"k": k, "lmbda": lmbda, "knn_temp": knn_temp}
        if settings.lmbda is None:
            in_force["lmbda"] = how["lmbda"]
        if explorer.walks:
            in_force["min_knns"] = settings.min_knns
        fresh = KNNHF(datastore=hnsw.path, records=tmp_path / str(k + lmbda), **how | in_force)
        expected = scored(fresh)
        assert mixed.log_probs.numpy() == pytest.approx(expected.log_prob.numpy(), rel=1e-6, abs=1e-6)
        if explorer.walks or lmbda:  # at 0 kNN-LM does not search
            assert torch.equal(mixed.figures.searched, expected.searched)
            assert mixed.figures.knn_log_prob.exp().numpy() == pytest.approx(
                expected.knn_log_prob.exp().numpy(), rel=1e-5, abs=1e-6, nan_ok=True
            )
    again = explorer.mix(kept, explorer.first)
    assert torch.equal(again.log_probs, before.log_probs)  # nothing that is kept was changed


@pytest.mark.parametrize("how", [{}, {"retomaton": True, "min_knns": 3, "clusters": "kmeans"}])
def test_a_token_is_that_of_inspection(how: dict[str, Any], hnsw: Datastore) -> None:
    lm = KNNHF(datastore=hnsw.path, **OPENED, **how)
    explorer = Explorer(lm)
    mixed = explorer.mix(explorer.read(TEXT), explorer.first)
    inspected, tokens = inspect_text(lm, TEXT, num_neighbours=4), explorer.tokens(mixed)
    assert len(inspected) == len(tokens)
    behind = 0
    for row, (token, plain) in enumerate(zip(inspected, tokens, strict=True)):
        # A search of many queries adds up in another order than one of few, so the last digits differ.
        for name, value in asdict(replace(token, neighbours=[], found=None, hits=None)).items():
            assert getattr(plain, name) == value or asdict(plain)[name] == pytest.approx(value, rel=1e-5, abs=1e-6)
        detailed = explorer.token(mixed, row, num_neighbours=4)
        for name in ("distance", "weight"):
            found, expected = ([getattr(n, name) for n in one.neighbours] for one in (detailed, token))
            assert found[:4] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        for hit in detailed.neighbours[4:]:  # where no other has the token
            assert hit.value == token.text and all(other.value != hit.value for other in detailed.neighbours[:4])
            behind += 1
        assert bool(token.hits) == any(neighbour.value == token.text for neighbour in detailed.neighbours)
    assert behind
    if how:
        ways = {neighbour.came_by for token in inspected for neighbour in token.neighbours}
        assert ways == {"pointer", "cluster", "search"}
        for token in inspected:
            assert token.step is not None
            assert token.step.pointers + token.step.members + token.step.found == token.found
            weight = token.step.pointer_weight + token.step.member_weight + token.step.found_weight
            assert weight == pytest.approx(1, abs=1e-5)


def test_several_stores_are_kept_as_one(halves: list[Datastore], tmp_path: Path) -> None:
    how = {"datastore": [half.path for half in halves], "datastore_weights": [2, 0.5]}
    explorer = Explorer(KNNHF(**OPENED, **how))
    mixed = explorer.mix(explorer.read(TEXT), ExploredSettings(9, 0.7, 4.0))
    fresh = KNNHF(k=9, lmbda=0.7, knn_temp=4.0, records=tmp_path / "records", **how)
    assert mixed.log_probs.numpy() == pytest.approx(scored(fresh).log_prob.numpy(), rel=1e-6, abs=1e-6)


def test_what_is_refused(store: Datastore) -> None:
    explorer = Explorer(KNNHF(datastore=store.path, **OPENED), max_tokens=100)
    with pytest.raises(UserError, match=r"^The text is empty"):
        explorer.read("")
    with pytest.raises(UserError, match=r"tokens, and at most 100 tokens are read: give a shorter one\.$"):
        explorer.read("an " * 500)
    with pytest.raises(UserError, match=r"^The text has 1,000,000 characters"):
        explorer.read("x" * 10**6)
    kept = explorer.read("an")
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: explorer.mix(kept, ExploredSettings(31, 0.4, 1.0)), "k=31 is above the k=30"),
        (lambda: ExploredSettings(0, 0.4, 1.0), "k=0 must be"),
        (lambda: ExploredSettings(1, 1.4, 1.0), "lmbda=1.4 is not between"),
        (lambda: ExploredSettings(1, 0.4, 0.0), "knn_temp=0.0 must be above 0"),
        (lambda: ExploredSettings(1, 0.4, np.nan), "knn_temp=nan must be above 0"),
        (lambda: ExploredSettings(1, 0.4, 1.0, -1), "min_knns=-1 must be"),
        (
            lambda: continue_both(explorer, "an", explorer.first, 64, Sampling()),
            "64 new tokens are not between 1 and 63",
        ),
        (lambda: continue_both(explorer, "an", explorer.first, 4, Sampling(-1)), "temperature -1 must be at least 0"),
    ]
    for refuse, message in refused:
        with pytest.raises(UserError, match=message):
            refuse()
    with pytest.raises(UserError, match="With lmbda=0 RetoMaton does not walk"):
        Explorer(KNNHF(datastore=store.path, k=5, lmbda=0.0, knn_temp=1.0, retomaton=True))


@pytest.mark.parametrize("how", [{}, {"retomaton": True}])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, seed=5)])
def test_continuations_are_those_of_the_models(how: dict[str, Any], sampling: Sampling, store: Datastore) -> None:
    opened = Explorer(KNNHF(datastore=store.path, **OPENED, **how))
    settings = ExploredSettings(8, 0.8, 5.0)
    both = continue_both(opened, TRAIN_TEXT[300:340], settings, 20, sampling)
    fresh = KNNHF(datastore=store.path, k=8, lmbda=0.8, knn_temp=5.0, **how)
    prompt = torch.tensor([fresh.tok_encode(TRAIN_TEXT[300:340])])
    drawn = {"do_sample": True, "temperature": 1.3, "top_k": 0} if sampling.temperature else {"do_sample": False}
    expected = []
    for mixed in (True, False):
        torch.manual_seed(sampling.seed)
        if mixed:
            with fresh.mixed_forward:
                ids = fresh.model.generate(prompt, max_new_tokens=20, pad_token_id=1, **drawn)
        else:
            ids = fresh.model.generate(prompt, max_new_tokens=20, pad_token_id=1, **drawn)
        expected.append(ids[0, prompt.shape[1] :].tolist())
    assert expected[0] != expected[1]
    same = next(i for i, (one, other) in enumerate(zip(*expected, strict=False)) if one != other)
    decode = fresh.tokenizer.decode
    assert both.same_tokens == same and both.same == decode(expected[0][:same])
    assert both.with_retrieval == decode(expected[0][same:], skip_special_tokens=True)
    assert both.by_lm == decode(expected[1][same:], skip_special_tokens=True)


def test_a_prompt_longer_than_the_window_loses_its_beginning(store: Datastore) -> None:
    explorer = Explorer(KNNHF(datastore=store.path, **OPENED))
    tokens = len(explorer.lm.tok_encode(TEXT))
    assert continue_both(explorer, TEXT, explorer.first, 10, Sampling()).left_out == tokens - (MAX_LENGTH - 10)
    assert continue_both(explorer, "", explorer.first, 10, Sampling()).left_out == 0
