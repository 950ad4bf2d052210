"""Recipes of published rows, small, with models and data that come from a hub over the real network code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.forks import Child, run_verb
from helpers.hub_contents import Hub
from helpers.hub_recipes import MODELS, WIKITEXT, publish_for_recipes, wikitext_rows

from knn_lm_eval.make.text import TextSource
from knn_lm_eval.store.datastore import Datastore


@pytest.fixture
def real_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The hub, which `datasets` takes for the hub as well; and nothing that takes seconds for nothing."""
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": tmp_path / "data_sets",
    }.items():
        monkeypatch.setattr(f"datasets.config.{name}", value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "models"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    return hub


def test_two_recipes_from_the_hub_to_their_tables(real_hub: Hub, tokenizer, tmp_path: Path) -> None:
    publish_for_recipes(real_hub, tokenizer, tmp_path / "published")
    fewer = [  # settings, not steps
        *("--set", "tune.knn.knn_temp=1,10", "--set", "tune.knn.lmbda=0.1,0.5", "--set", "index.quality_queries=0"),
        *("--set", "tune.retomaton=", "--set", "tune.adaptive="),
        *("--set", "evaluate.methods.retomaton_tuned=", "--set", "published.methods.retomaton_tuned="),
        *("--set", "evaluate.methods.adaptive=", "--set", "device=cpu"),
    ]
    for name, model, rows in (
        ("distilgpt2", MODELS[0], ["LM alone", "kNN-LM", "knn_tuned", "RetoMaton", "retomaton_searching"]),
        ("efficient_knnlm", MODELS[1], ["LM alone", "kNN-LM", "knn_exact", "knn_tuned"]),
    ):
        output = tmp_path / name
        ended = Child(run_verb("reproduce", name, "--fraction", "1e-5", "--output", output, *fewer), output).ended()
        assert ended.status == 0, ended.said[-3000:]
        assert real_hub.asked(f"GET .*{model}") and real_hub.asked("cdn GET .*train-00000-of-00001.parquet")
        assert "compares with nothing published" in ended.said
        store = Datastore.open(output / "store")
        assert len(store) == 1183 and store.manifest.source["dataset"] == WIKITEXT
        assert json.loads((output / "store" / "index.json").read_text())["factory"] == "IVF30,PQ64"
        table = ended.said[ended.said.rindex("tokens scored") :].splitlines()[2:]
        assert [line.split("  ")[0] for line in table if re.search(r"  \d", line)] == rows


def test_the_stream_of_the_hub_is_the_text_that_is_scored(tmp_path: Path) -> None:
    from knn_lm_eval.tasks.corpora import text_of_rows

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in wikitext_rows("train")))
    pieces = list(TextSource(dataset=str(file), documents="wikitext-stream").pieces())
    assert "".join(text for _, text in pieces) == text_of_rows(wikitext_rows("train"))
    assert [begins for begins, _ in pieces] == [True] + [False] * (len(pieces) - 1)
