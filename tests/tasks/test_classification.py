"""The classification tasks, on local data of the form that knnlm-limits has, and of the hub's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import yaml
from helpers.classification_data import write_classification_data
from helpers.places import TASKS
from lm_eval.tasks import TaskManager

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.tasks import classification, corpora

# Each task's prompts and the numbers of the right choices, by hand from the templates of knnlm-limits.
TONE = " The sentence has a tone that is"
EXPECTED: dict[str, list[tuple[str, int]]] = {
    "knn_sst2": [(f"a film of {label} stars .{TONE}", int(label > 3)) for label in (1, 2, 4, 5)],
    "knn_rt": [(f"the soundtrack is worth it .{TONE}", 1), (f"silly and tedious .{TONE}", 0)],
    "knn_mr": [(f"simplistic .{TONE}", 0), (f"a joy .{TONE}", 1)],
    "knn_cr": [("it does n't play . It was", 0), ("works well . It was", 1)],
    "knn_rte": [
        (" Dana had a cat.\nquestion: Dana had an animal. true or false?\nanswer:", 0),
        (" Dana had a cat.\nquestion: Dana had a dog. true or false?\nanswer:", 1),
    ],
    "knn_cb": [("premise: Is there a shipment?\nhypothesis: there is one\nanswer: The hypothesis is", 2)],
    "knn_agnews": [("title: Fears\nsummary: Unions say.\ntopic:", 2)],
    "knn_hyperpartisan": [("As seen on television neutral or partisan? Answer:", 1)],
    "knn_yahoo": [("question: why?\nanswer: a bug\nthe topic of the question and answer is", 4)],
}


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(corpora.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_classification_data(tmp_path / "data")
    return tmp_path / "data"


def manager(data: Path) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(data)})


def test_prompts_and_answers_are_those_of_the_papers_code(data: Path) -> None:
    for name, expected in EXPECTED.items():
        task = manager(data).load([name])["tasks"][name]
        docs = list(task.eval_docs)
        assert [(task.doc_to_text(doc), task.doc_to_target(doc)) for doc in docs] == expected, name
        choices = task.doc_to_choice(docs[0])
        assert all(re.fullmatch("[a-z]+", choice) for choice in choices)
        assert max(label for _, label in expected) < len(choices)


def test_the_group_is_scored_in_one_command(lm: CausalHFLM, data: Path) -> None:
    results = lm_eval.simple_evaluate(lm, tasks=["knn_lm_memory"], task_manager=manager(data), bootstrap_iters=0)
    assert set(EXPECTED) <= set(results["results"])
    of_group = results["groups"]["knn_lm_memory"]
    for metric in ("acc,none", "acc_norm,none", "acc_mutual_info,none"):
        of_tasks = [results["results"][name][metric] for name in EXPECTED]
        assert of_group[metric] == pytest.approx(sum(of_tasks) / len(of_tasks))


def test_mutual_information_takes_the_words_own_probability_off(lm: CausalHFLM, data: Path) -> None:
    results = lm_eval.simple_evaluate(lm, tasks=["knn_rte"], task_manager=manager(data), bootstrap_iters=0)
    for sample in results["samples"]["knn_rte"]:
        log_probs = [float(response[0][0]) for response in sample["resps"]]
        assert len(log_probs) == 4  # of two words, after the prompt and after nothing
        gains = [log_probs[i] - log_probs[2 + i] for i in range(2)]
        assert sample["acc_mutual_info"] == float(gains.index(max(gains)) == sample["target"])


def test_the_hubs_rows_give_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {
        "SetFit/sst2": [{"text": "good .", "label": 1, "label_text": "positive"}],
        "SetFit/CR": [{"text": "works well .", "label": 1, "label_text": "positive"}],
        "cornell-movie-review-data/rotten_tomatoes": [{"text": "silly .", "label": 0}],
        "aps/super_glue": [{"premise": "p", "hypothesis": "h", "label": 1, "idx": 0}],
        "fancyzhx/ag_news": [{"text": "Fears. Unions say.", "label": 2}],
        "community-datasets/yahoo_answers_topics": [
            {"topic": number % 10, "question_title": f"q{number}", "best_answer": "a"} for number in range(60)
        ],
    }
    asked = []

    def load(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return hub[path]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for file in sorted(TASKS.glob("knn_*.yaml")):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "!function" not in line]
        content = yaml.safe_load("\n".join(lines))
        kwargs = content.get("dataset_kwargs", {})
        if "path" not in kwargs:
            continue
        function = re.search(r"!function classification\.(\w+)", file.read_text(encoding="utf-8"))
        assert function is not None
        rows = getattr(classification, function[1])(**kwargs)[kwargs["split"]]
        assert all(0 <= row["label"] < len(content["doc_to_choice"]) and row["text"] for row in rows)
        if kwargs["folder"] == "yahoo":
            assert rows["text"][:] == [f"question: q{number}\nanswer: a" for number in (0, 20, 40)]
    assert ("aps/super_glue", "cb", "validation") in asked and ("SetFit/sst2", None, "test") in asked


def test_what_is_not_there_is_said_in_one_sentence(data: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("knn_mr", tmp_path, "mr is not on the hub in a form that can be read"),
        ("knn_cb", tmp_path, "could not be loaded"),
    ]
    (data / "cr" / "test.jsonl").write_text("no json\n")
    (data / "rte" / "val.jsonl").write_text('{"premise": "p", "label": 0}\n')
    (data / "hyp" / "test.jsonl").unlink()
    (data / "sst2" / "test.jsonl").write_text('{"text": "x", "label": "good"}\n')
    cases += [
        ("knn_cr", data, "cannot be read"),
        ("knn_rte", data, "the rows of rte are not what they should be: KeyError 'hypothesis'"),
        ("knn_hyperpartisan", data, "there is no test.jsonl"),
        ("knn_sst2", data, "a label of sst2 is not what it should be"),
    ]
    for name, folder, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            manager(folder).load([name])
        assert "\n" not in str(caught.value)
