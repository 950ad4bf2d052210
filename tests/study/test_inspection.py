"""The neighbours behind each token: the figures are those of scoring, the neighbours those of exact search."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.programs import run_script
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.report.token_page import token_page
from knn_lm_eval.report.tokens import InspectedToken
from knn_lm_eval.store.manifest import file_record
from knn_lm_eval.study.inspection import inspect_text

TEXT = EVAL_TEXT[:200] + TRAIN_TEXT[300:500]


@pytest.mark.parametrize("how", [{}, {"retomaton": True, "min_knns": 2}])
def test_probabilities_are_those_of_scoring(store: Datastore, how: dict) -> None:
    lm = KNNHF(datastore=store.path, k=30, lmbda=0.4, knn_temp=2.0, batch_size=2, **how)
    tokens = inspect_text(lm, TEXT)
    request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
    (scored,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    assert len(tokens) == scored.num_tokens > MAX_LENGTH  # several windows
    assert "".join(token.text for token in tokens) == TEXT
    assert sum(math.log(token.p) for token in tokens) == pytest.approx(float(scored), rel=1e-5)
    for token in tokens:
        assert token.p == pytest.approx(0.6 * token.p_lm + 0.4 * token.p_knn, rel=1e-5)
    searched = sum(token.searched for token in tokens)
    assert searched == (scored.num_searches if how else len(tokens))


def test_neighbours_are_the_heaviest_and_decoded_with_their_context(store: Datastore) -> None:
    lm = KNNHF(datastore=store.path, k=30, lmbda=0.4, knn_temp=2.0)
    (first, *_) = inspect_text(lm, TEXT, num_neighbours=4, context_tokens=3)
    model = lm.language_model
    query = model.encode(torch.tensor([[lm.prefix_token_id]]))[0][0, 0].float().numpy()
    distances = ((store.keys.astype(np.float64) - query) ** 2).sum(-1)
    nearest = np.argsort(distances, kind="stable")[:30]
    weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / 2.0)
    weights /= weights.sum()
    assert [n.weight for n in first.neighbours] == pytest.approx(weights[:4].tolist(), rel=1e-3)
    for neighbour in first.neighbours:
        assert neighbour.distance == pytest.approx(distances[neighbour.entry], rel=1e-3, abs=1e-2)
        assert neighbour.value == lm.tokenizer.decode([int(store.values[neighbour.entry])])
        begin = max(s for s in store.document_starts.tolist() if s <= neighbour.entry)
        before = store.values[max(begin, neighbour.entry - 3) : neighbour.entry]
        assert neighbour.context == lm.tokenizer.decode(before.tolist())


def test_merged_entries_have_no_context(store: Datastore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    np.save(tmp_path / "store" / "weights.npy", np.full(len(store), 2, dtype=np.int32))
    files = store.manifest.files | {"weights.npy": file_record(tmp_path / "store" / "weights.npy")}
    replace(store.manifest, files=files).write(tmp_path / "store")
    tokens = inspect_text(KNNHF(datastore=tmp_path / "store", k=5, lmbda=0.4, knn_temp=2.0), TEXT[:40])
    assert {neighbour.context for token in tokens for neighbour in token.neighbours} == {""}


def test_the_page_holds_all_figures_and_cannot_be_broken_by_the_text() -> None:
    hostile = "</script></template><b>&\"'"
    token = InspectedToken(hostile, p_lm=0.25, p_knn=0.0, p=0.1, searched=False, neighbours=[])
    impossible = InspectedToken("x", p_lm=0.0, p_knn=0.5, p=0.2, searched=True, neighbours=[])
    page = token_page([token, impossible], hostile, hostile)
    assert page.count("</script>") == page.count("<script>") == 2
    assert page.count("</template>") == page.count("<template>") == 2
    assert "<b>" not in page and "inf" not in page.partition("</head>")[2]
    for said in ("token 1: 2.50 times less probable by retrieval (-0.916 nats); no search was made", "possible by"):
        assert said in page


def test_the_script_prints_and_writes_a_page(store: Datastore, tmp_path: Path) -> None:
    arguments = ("--model_args", f"datastore={store.path},k=20", "--text", "the statement executes")
    process = run_script("inspect_neighbours", *arguments)
    assert process.returncode == 0, process.stderr
    assert "statement" in process.stdout.replace("\n", "") or "tement" in process.stdout
    page = tmp_path / "pages" / "page.html"
    process = run_script("inspect_neighbours", *arguments, "--html", page)
    assert process.returncode == 0, process.stderr
    assert "lmbda=0.25" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "x", "--neighbours", 0], "--neighbours 0 must be at least 1."),
        (["--file", "nowhere.txt"], "Cannot read the text nowhere.txt: No such file or directory."),
        (["--file", sys.executable], f"{sys.executable} is not UTF-8 text"),
        (["--text", ""], "The text is empty: there is nothing to inspect."),
    ],
)
def test_bad_input(arguments: list[object], message: str) -> None:
    process = run_script("inspect_neighbours", "--model_args", "datastore=nowhere", *arguments)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {message}") and process.stderr.count("\n") == 1
