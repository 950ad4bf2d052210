"""What a visitor is answered, without a browser: sentences for errors, settings in words, and a port that is taken."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace

import pytest
from helpers.tiny_model import EVAL_TEXT

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.explore.visit import READ_FIRST, Desk, model_args
from knn_lm_eval.study.continuation import Sampling
from knn_lm_eval.study.exploration import ExploredSettings, Explorer

BUCKETS = {"kind": "buckets", "edges": [5.0], "lmbdas": [0.7, 0.2]}


@pytest.fixture(scope="module")
def desk(store: Datastore) -> Desk:
    return Desk(Explorer(KNNHF(datastore=store.path, k=20, lmbda=BUCKETS, knn_temp=2.0), max_tokens=60))


def test_a_visit_keeps_its_text_and_its_token(desk: Desk) -> None:
    first = desk.explorer.first
    assert first.lmbda is None and desk.explorer.weight_per_token == "buckets"
    visit, shown = desk.read(EVAL_TEXT[:60], lambda: first)
    assert visit is not None and "retomaton=True" in shown.walk
    assert "token 3:" in desk.choose(visit, 2)
    changed = desk.change(visit, lambda: replace(first, lmbda=0.0))
    assert "token 3: retrieval changes nothing" in changed.details and "k=20,lmbda=0,knn_temp=2" in changed.summary


def test_errors_are_sentences(desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    visit, shown = desk.read("<b>" * 200, lambda: desk.explorer.first)
    assert visit is None and "at most 60 tokens are read" in shown.summary and not shown.tokens
    assert READ_FIRST.split(":")[0] in desk.choose(None, 0)
    visit, _ = desk.read("an", lambda: desk.explorer.first)
    assert READ_FIRST.split(":")[0] in desk.choose(visit, 99)
    assert "k=0 must be at least 1." in desk.change(visit, lambda: ExploredSettings(0, 0.5, 1.0)).summary
    assert "new tokens are not between" in desk.go_on("an", lambda: desk.explorer.first, 0, Sampling())
    monkeypatch.setattr(desk.explorer, "mix", lambda *_: {}["<i>"])
    with caplog.at_level(logging.CRITICAL):
        said = desk.change(visit, lambda: desk.explorer.first).summary
    assert "This failed (KeyError: &lt;i&gt;); the terminal says more." in said


def test_settings_in_words() -> None:
    assert model_args(ExploredSettings(8, 0.25, 12.34567), walks=False) == "k=8,lmbda=0.25,knn_temp=12.35"
    assert model_args(ExploredSettings(8, None, 0.01, float("inf")), walks=True) == "k=8,knn_temp=0.01,min_knns=inf"


def test_a_port_that_is_taken(desk: Desk) -> None:
    pytest.importorskip("gradio")
    from knn_lm_eval.explore.page import make_page, serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^Cannot open a page at 127\.0\.0\.1:{port} .*: give another --port"):
            serve(make_page(desk.explorer, "x"), "127.0.0.1", port)
