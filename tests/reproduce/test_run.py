"""Running a recipe: each step by the library as by its command; what is finished, changed, or made by hand."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forks import Child, run_verb
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.measured import Measurement, measured_tables
from knn_lm_eval.report.published_figures import PublishedFigure
from knn_lm_eval.reproduce.plan import plan
from knn_lm_eval.reproduce.recipe import Recipe, checked
from knn_lm_eval.reproduce.run import Measured, measured, run_recipe
from knn_lm_eval.store.datastore import Datastore

ALL = ["dump", "index", "cluster", "tune knn", "evaluate"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
        yield


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, train_file: Path) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data")
    words = EVAL_TEXT.split()
    for file in ("dev.en", "test.en"):
        lines = (" ".join(words[start : start + 12]) for start in range(0, len(words), 12))
        (data / file).write_text("\n".join(lines) + "\n")
    return {
        "data_dir": str(data),
        "device": "cpu",
        "model": {"pretrained": str(model_folder), "dtype": "float32"},
        "scoring": {"max_length": MAX_LENGTH},
        "dump": {"text": str(train_file), "documents": "file", "max_length": MAX_LENGTH, "max_tokens": 1500},
        "index": {"factory": "IVF8,SQ8", "quality_queries": 100},
        "cluster": {"method": "kmeans", "num_clusters": 30, "sample": 1000},
        "tune": {
            "knn": {"tasks": ["law_valid"], "limit": 3, "k": "8,64", "knn_temp": "1,10", "lmbda": "0.1,0.5"},
        },
        "evaluate": {
            "batch_size": 3,
            "methods": {
                "base": {"model": "hf"},
                "knn": {"k": 64, "lmbda": 0.25, "knn_temp": 5},
                "knn_tuned": {"params": "{output}/tuned/knn.json"},
                "retomaton": {"k": 64, "lmbda": 0.25, "knn_temp": 5, "retomaton": True, "clusters": "kmeans"},
            },
            "tasks": {"law": {"limit": 5}},
        },
    }


class Runs:
    """Runs recipes, and keeps which steps were done, and which were finished before."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.skipped: list[str] = []
        self.evaluated: list[str] = []

    def __call__(self, content: dict[str, Any], output: Path) -> list[Measured]:
        self.__init__()  # type: ignore[misc]
        return run_recipe(
            recipe_of(content),
            output,
            lambda step, finished: (self.skipped if finished else []).append(step.name),
            lambda step: self.done.append(step.name),
            lambda outcome: self.evaluated.append(f"{outcome.cell.method} {outcome.state}"),
        )


def recipe_of(content: dict[str, Any]) -> Recipe:
    return checked("small", copy.deepcopy(content), "small.yaml")


def changed(content: dict[str, Any], section: str, **settings: Any) -> dict[str, Any]:
    return {**content, section: {**content[section], **settings}}


@pytest.fixture(scope="module")
def finished(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Measured]]:
    """A recipe that was run."""
    output, runs = tmp_path_factory.mktemp("finished") / "out", Runs()
    found = runs(content, output)
    assert runs.done == ALL and runs.skipped == []
    assert sorted(runs.evaluated) == ["base done", "knn done", "knn_tuned done", "retomaton done"]
    return output, found


@pytest.fixture
def output(finished: tuple[Path, list[Measured]]) -> Iterator[Path]:
    """A run that may be changed: what it was is put back. (Results name the folder.)"""
    folder, _ = finished
    shutil.copytree(folder, folder.with_name("original"))
    yield folder
    shutil.rmtree(folder)
    folder.with_name("original").rename(folder)


def test_the_measurements_are_those_of_the_recipe(
    finished: tuple[Path, list[Measured]], content: dict[str, Any]
) -> None:
    output, found = finished
    assert [cell.method for cell, _ in found] == list(content["evaluate"]["methods"])
    perplexity = {cell.method: results["results"]["law"]["token_perplexity,none"] for cell, results in found}
    tuned = json.loads((output / "tuned" / "knn.json").read_text())["settings"]
    settings = next(results for cell, results in found if cell.method == "knn_tuned")["config"]["knn"]
    assert {name: settings[name] for name in ("k", "knn_temp", "lmbda")} == {
        name: tuned[name] for name in ("k", "knn_temp", "lmbda")
    }
    assert len(set(perplexity.values())) == len(perplexity)
    assert (output / ".gitignore").read_text() == "*\n"


def test_the_commands_shown_make_the_same_files(
    finished: tuple[Path, list[Measured]], content: dict[str, Any], tmp_path: Path
) -> None:
    """Each step's command, typed one after the other for another folder."""
    output, found = finished
    for planned in plan(recipe_of(content), output):
        words = shlex.split(planned.step.command.replace(str(output), str(tmp_path / "by_hand")))
        assert words.pop(0) == "knn-lm-eval"
        if words[0] == "benchmark":
            matrix = (output / "evaluate.yaml").read_text().replace(str(output), str(tmp_path / "by_hand"))
            (tmp_path / "by_hand" / "evaluate.yaml").write_text(matrix)
        ended = Child(run_verb(*words), tmp_path).ended()
        assert ended.status == 0, ended.said[-2000:]
    for name in ("keys.npy", "values.npy", "document_starts.npy", "index.faiss", "clusters/kmeans/members.npy"):
        assert (output / "store" / name).read_bytes() == (tmp_path / "by_hand" / "store" / name).read_bytes(), name
    params = [json.loads((folder / "tuned" / "knn.json").read_text()) for folder in (output, tmp_path / "by_hand")]
    assert params[0]["settings"] == params[1]["settings"]
    again = measured(recipe_of(content), tmp_path / "by_hand")
    assert [results["results"] for _, results in again] == [results["results"] for _, results in found]


def test_what_is_finished_is_not_done_again(finished: tuple[Path, list[Measured]], content: dict[str, Any]) -> None:
    output, found = finished
    runs = Runs()
    assert runs(content, output) == found
    assert (
        runs.skipped == ALL[:-1]
        and runs.done == ["evaluate"]
        and {one.split()[1] for one in runs.evaluated} == {"finished"}
    )
    assert [one.finished for one in plan(recipe_of(content), output)] == [True] * 4 + [False]


def test_what_changed_is_made_anew_with_what_rests_on_it(output: Path, content: dict[str, Any]) -> None:
    runs, keys = Runs(), (output / "store" / "keys.npy").stat()
    runs(changed(content, "index", factory="IVF4,SQ8"), output)
    assert runs.done == ["index", "tune knn", "evaluate"] and runs.skipped == ["dump", "cluster"]
    assert json.loads((output / "store" / "index.json").read_text())["factory"] == "IVF4,SQ8"
    assert (output / "store" / "keys.npy").stat() == keys
    assert "base finished" in runs.evaluated and "knn done" in runs.evaluated
    runs(changed(changed(content, "index", factory="IVF4,SQ8"), "cluster", num_clusters=20), output)
    assert runs.done == ["cluster", "tune knn", "evaluate"]
    assert len(np.load(output / "store" / "clusters" / "kmeans" / "member_starts.npy")) == 21


def test_a_datastore_of_other_settings_is_not_replaced(output: Path, content: dict[str, Any]) -> None:
    keys = (output / "store" / "keys.npy").read_bytes()
    with pytest.raises(
        UserError, match=r"store was begun with dump.max_tokens=1500, .* now has dump.max_tokens=900: del"
    ):
        Runs()(changed(content, "dump", max_tokens=900), output)
    with pytest.raises(UserError, match="was begun with"):
        plan(recipe_of(changed(content, "dump", max_tokens=900)), output)
    assert (output / "store" / "keys.npy").read_bytes() == keys


def test_a_datastore_that_was_made_by_hand_is_taken(output: Path, content: dict[str, Any]) -> None:
    marks = output / "steps.json"
    content_of_marks = json.loads(marks.read_text())
    del content_of_marks["steps"]["dump"]
    marks.write_text(json.dumps(content_of_marks))
    runs = Runs()
    runs(content, output)
    assert runs.skipped == ALL[:-1]
    assert json.loads(marks.read_text())["steps"]["dump"]["finished"]


def test_damaged_marks_are_said(output: Path, content: dict[str, Any]) -> None:
    (output / "steps.json").write_text('{"steps": {"dump": 3}}')
    with pytest.raises(UserError, match=r"steps.json is damaged: steps.dump is 3, .*give another --output"):
        Runs()(content, output)


def test_an_evaluation_that_fails_is_said_and_the_others_kept(output: Path, content: dict[str, Any]) -> None:
    broken = copy.deepcopy(content)
    broken["evaluate"]["methods"]["retomaton"]["clusters"] = "none_such"
    with pytest.raises(UserError, match=r"small x store x retomaton x law failed: .*none_such"):
        Runs()(broken, output)
    assert len(measured(recipe_of(content), output)) == 4 or len(measured(recipe_of(broken), output)) == 3


def test_keys_may_go_straight_into_the_index(content: dict[str, Any], tmp_path: Path) -> None:
    without = changed(content, "dump", keys="none")
    without["index"] = {"factory": "IVF4,SQ8"}
    without |= {"cluster": {}, "tune": {}}
    without["evaluate"] = {**content["evaluate"], "methods": {"knn": {"k": 8, "lmbda": 0.2}}}
    runs = Runs()
    found = runs(without, tmp_path / "out")
    assert runs.done == ["dump", "evaluate"] and len(found) == 1
    assert Datastore.open(tmp_path / "out" / "store").keys is None


# --- The table ----------------------------------------------------------------------------------------------


def test_the_table_shows_what_was_measured_beside_what_is_published(finished: tuple[Path, list[Measured]]) -> None:
    _, found = finished
    figure = PublishedFigure("a model", "kNN-LM", "law", 12.5, "a README", "nobody got it")
    rows = [
        Measurement(cell.method, "law", results, figure if cell.method.startswith("knn") else None)
        for cell, results in found
    ]
    (table,) = measured_tables(rows, 1)
    assert (
        table.title
        == f"law: {found[1].results['config']['knn']['tokens_scored']} tokens scored, 1,500 in the datastore"
    )
    assert list(table.columns) == [
        "",
        "token perplexity",
        "word perplexity",
        "bits per byte",
        "saved searches",
        "published",
    ]
    assert [row[""] for row in table.rows] == ["LM alone", "kNN-LM", "knn_tuned", "RetoMaton"]
    for row, (_, results) in zip(table.rows, found, strict=True):
        assert row["token perplexity"] == results["results"]["law"]["token_perplexity,none"]
    assert [row["published"] for row in table.rows] == [None, 12.5, 12.5, None]
    assert table.notes == ["Published: token perplexity of a model (a README).", "12.5: nobody got it."]
    (small,) = measured_tables([replace(one, published=None) for one in rows], 0.01)
    assert "published" not in small.columns and small.notes == [
        "Warning: this is a fraction (0.01) of the recipe, which compares with nothing published."
    ]
