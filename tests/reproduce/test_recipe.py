"""Recipes: those that there are, strict reading, changes, fractions, and what they are said to take."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.places import REPO

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.published_figures import PUBLISHED_FIGURES
from knn_lm_eval.reproduce.fraction import fraction_of
from knn_lm_eval.reproduce.plan import Estimator
from knn_lm_eval.reproduce.recipe import checked, read_recipe, recipe_names
from knn_lm_eval.reproduce.steps import steps_of

RECIPES = [
    "distilgpt2",
    "efficient_knnlm",
    "gpt2",
    "gpt2_published_files",
    "knnlm_limits",
    "python_docs",
    "retomaton_law",
]
DATA = ["data_dir=DATA"]
SMALL: dict[str, Any] = {
    "model": {"pretrained": "M", "dtype": "float32"},
    "scoring": {"max_length": 64},
    "sizes": {"entries": 5000, "dimension": 64, "parameters": 10**6, "tokens": {"law": 100}},
    "dump": {"dataset": "org/name"},
    "index": {"factory": "PCA32,IVF256,PQ16"},
    "cluster": {"method": "kmeans", "num_clusters": 500, "sample": 4000},
    "tune": {"knn": {"tasks": ["law_valid"], "k": "16,2048", "with": {"k": 3000}}},
    "evaluate": {"methods": {"base": {"model": "hf"}, "knn": {"k": 4096}}, "tasks": {"law": {"limit": 10}}},
}


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(SMALL)


def test_the_recipes_that_there_are() -> None:
    assert recipe_names() == RECIPES == sorted(path.stem for path in (REPO / "recipes").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_each_says_what_it_is_and_takes_and_is_held_against(name: str) -> None:
    recipe = read_recipe(name, DATA)
    assert recipe["title"] and recipe["notes"] and set(recipe["needs"]) == {"disk", "memory", "hours"}
    assert all(re.search(r"computed|estimated|measured", needs) for needs in recipe["needs"].values())
    figures = [
        recipe.figure(method, task) for method in recipe["published"].get("methods", {}) for task in tasks(recipe)
    ]
    assert None not in figures
    assert figures or "figures are in the paper" in "".join(recipe["notes"])


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"gpt2_published_files"}))
def test_the_disk_that_is_named_is_what_is_computed(name: str) -> None:
    recipe = read_recipe(name, DATA)
    estimator = Estimator(recipe, speed=1e12)
    computed = sum(estimator.costs(step).disk or 0 for step in steps_of(recipe, Path("out"), print))
    said = re.match(r"([\d.]+) GB \(computed", recipe["needs"]["disk"])
    assert said is not None and float(said[1]) == pytest.approx(computed / 1e9, rel=0.01)


def test_every_published_figure_has_its_recipe() -> None:
    """But for one that differs in hardware alone, and those of an LM that nobody else can have."""
    recipes = [read_recipe(name, DATA) for name in RECIPES]
    held = {
        recipe.figure(method, task)
        for recipe in recipes
        for method in recipe["published"].get("methods", {})
        for task in tasks(recipe)
    }
    left = {f"{one.model}, {one.method}" for one in set(PUBLISHED_FIGURES) - held}
    tuned = "wmt19.en, fine-tuned (fairseq)"
    assert left == {
        "wmt19.en (fairseq), kNN-LM, index on GPU",
        f"{tuned}, base",
        f"{tuned}, kNN-LM",
        f"{tuned}, RetoMaton",
    }


def tasks(recipe: Any) -> list[str]:
    return list(recipe["evaluate"]["tasks"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["dmp.stride=3"], "unknown key 'dmp'; did you mean 'dump'?"),
        (["dump.strid=3"], "unknown key 'strid'; did you mean 'stride'?"),
        (["dump.stride=far"], "dump.stride is 'far', not a whole number of at least 1"),
        (["index.probe=3"], "index: unknown key 'probe'; did you mean"),
        (["cluster.probe=3"], "cluster: unknown key 'probe'"),
        (["cluster.method=means"], "cluster: method: 'means' should be kmeans or greedy_merge"),
        (["tune.knn.lamda=3"], "tune: knn: unknown key 'lamda'; did you mean 'lmbda'?"),
        (["tune.knn.tasks="], "tune: knn has no tasks"),
        (["evaluate.methods.knn.lamda=3"], "unknown key 'lamda'; did you mean 'lmbda'?"),
        (["evaluate.output=x"], "evaluate: unknown key 'output'"),
        (["model.pretrained="], "model should have `pretrained`, or else `package`"),
        (["dump="], "should have a dump, or else what is prebuilt"),
        (["dump.text=a.txt"], "dump should name a text, or else a dataset"),
        (["dump.keys=none", "index.k=4"], "index (of a dump without keys): unknown key 'k'"),
        (["dump=", "prebuilt.addresses=3"], "prebuilt should have addresses, a list of texts"),
        (["published.model=gpt2", "published.methods.knn=kNN-LM"], "there is no figure of gpt2, kNN-LM"),
        (["published.methods.kn=kNN-LM"], "published: methods: unknown key 'kn'; did you mean 'knn'?"),
        (["no"], "--set 'no' should be SECTION.KEY=VALUE"),
        (["dump.stride={"], "'{' is no value"),
        (["dump.stride.x=2", "dump.stride=3", "dump.stride.x=2"], "stride has no keys"),
        (["needs.disk=3"], "needs.disk is 3, not text"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_sentence(
    content: dict[str, Any], tmp_path: Path, changes: list[str], message: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    read_recipe(str(file))
    with pytest.raises(UserError) as error:
        read_recipe(str(file), changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_no_recipe_has() -> None:
    with pytest.raises(UserError, match="no recipe called 'gtp2'; did you mean gpt2?"):
        read_recipe("gtp2")
    with pytest.raises(UserError, match="Cannot read gone.yaml: No such file"):
        read_recipe("gone.yaml")


def test_changes_reach_every_value(tmp_path: Path, content: dict[str, Any]) -> None:
    content["evaluate"]["tasks"] = ["law", "wikitext103"]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    recipe = read_recipe(
        str(file),
        ["model.dtype=bfloat16", "evaluate.tasks.law.limit=3", "data_dir=/D", "scoring=", "tune=", "device=cpu"],
    )
    assert recipe["model"]["dtype"] == "bfloat16" and recipe["tune"] == {} and recipe["scoring"] == {}
    matrix = recipe.matrix(tmp_path)
    limits = {cell.task: cell.task_settings.get("limit") for cell in matrix.cells}
    assert limits == {"law": 3, "wikitext103": None}
    assert matrix.cells[0].task_settings["metadata"] == {"data_dir": "/D"} and matrix.device == "cpu"


def test_local_data_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KNN_LM_EVAL_DATA", raising=False)
    with pytest.raises(UserError, match=r"needs a folder of local data .*--set data_dir=FOLDER"):
        steps_of(read_recipe("retomaton_law"), Path("out"), print)
    monkeypatch.setenv("KNN_LM_EVAL_DATA", "/some/DATA")
    steps = steps_of(read_recipe("retomaton_law"), Path("out"), print)
    assert "--text /some/DATA/law/train.en" in steps[0].command


# --- Fractions ----------------------------------------------------------------------------------------------


def test_a_fraction_makes_everything_small(content: dict[str, Any]) -> None:
    small = fraction_of(checked("mine", content, "mine"), 0.3)
    assert small.entries == small["dump"]["max_tokens"] == 1500
    assert small["index"]["factory"] == "PCA32,IVF38,PQ16"  # 39 for each list
    assert small["cluster"] == {"method": "kmeans", "num_clusters": 150, "sample": 1200}
    assert small["tune"]["knn"] == {"tasks": ["law_valid"], "k": "16,1500", "with": {"k": 1500}, "limit": 0.3}
    assert small["evaluate"]["methods"]["knn"] == {"k": 1500}
    assert small["evaluate"]["tasks"]["law"] == {"limit": 3}
    assert small.matrix(Path("out")).cells[0].task_settings["metadata"]["text_fraction"] == 0.3
    assert small["sizes"]["tokens"] == {"law": 30}
    assert content == SMALL


def test_no_fraction_is_too_small_to_run(content: dict[str, Any]) -> None:
    small = fraction_of(checked("mine", content, "mine"), 1e-9)
    assert small.entries == 1000 and small["index"]["factory"] == "PCA32,IVF25,PQ16"
    assert small["cluster"]["num_clusters"] == 1 and small["cluster"]["sample"] == 1
    assert small["evaluate"]["tasks"]["law"] == {"limit": 1}
    whole = checked("mine", content, "mine")
    assert fraction_of(whole, 1) is whole


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan")])
def test_what_is_no_fraction(content: dict[str, Any], fraction: float) -> None:
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        fraction_of(checked("mine", content, "mine"), fraction)


def test_a_fraction_needs_to_know_of_what(content: dict[str, Any]) -> None:
    del content["sizes"]
    with pytest.raises(UserError, match="--set sizes.entries=NUMBER"):
        fraction_of(checked("mine", content, "mine"), 0.1)
    with pytest.raises(UserError, match="prebuilt, of which there is no fraction"):
        fraction_of(read_recipe("gpt2_published_files"), 0.1)


# --- Costs --------------------------------------------------------------------------------------------------


def test_costs_are_computed_from_the_sizes_and_unknown_without(content: dict[str, Any]) -> None:
    content["dump"] |= {"max_length": 64, "stride": 32}
    recipe = checked("mine", content, "mine")
    costs = {step.name: Estimator(recipe, 1e9).costs(step) for step in steps_of(recipe, Path("out"), print)}
    assert costs["dump"].disk == 5000 * (2 * 64 + 4)
    assert costs["dump"].seconds == pytest.approx(2 * 10**6 * 5000 * 2 / 1e9)
    assert costs["dump"].memory == 4 * 10**6
    assert costs["cluster"].disk == 5000 * (4 + 4) + 8 * 501
    assert costs["evaluate"].seconds == pytest.approx(2 * 10**6 * 100 * 64 / 63 / 1e9)
    assert costs["tune knn"].seconds is None  # how many tokens its text has is not said
    del content["sizes"]
    recipe = checked("mine", content, "mine")
    for step in steps_of(recipe, Path("out"), print):
        assert Estimator(recipe, 1e9).costs(step).seconds is None
