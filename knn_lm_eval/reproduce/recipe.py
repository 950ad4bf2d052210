"""A recipe: what it takes to get a published figure, as data, read strictly.

The sections are the steps, and their keys the options of the verbs that do them by hand:

    title: gpt2 with kNN-LM on WikiText-103
    model: {pretrained: gpt2, dtype: float16}          # of the dump and of all evaluations
    scoring: {max_length: 1024, context_len: 512}      # of the evaluations alone
    dump: {dataset: Salesforce/wikitext, ...}          # or prebuilt: {addresses: [...]}
    index: {factory: "IVF4096,PQ64"}
    cluster: {method: kmeans, num_clusters: 500000}
    tune: {knn: {tasks: [wikitext103_valid]}}          # each makes OUTPUT/tuned/NAME.json
    evaluate: {methods: ..., tasks: ...}               # a benchmark's, of this model and this datastore
    published: {model: "gpt2, fine-tuned", methods: {knn: kNN-LM}}

In texts, ``{output}`` stands for the output's folder and ``{data_dir}`` for that of local data.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml

from knn_lm_eval._startup import recipes_dir
from knn_lm_eval.benchmark.matrix import Matrix, matrix_of
from knn_lm_eval.benchmark.strict_yaml import check_types, mapping, read_yaml, refuse_unknown
from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.importing import import_datastore
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.report.published_figures import PUBLISHED_FIGURES, PublishedFigure
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.study.tuning import tune
from knn_lm_eval.system.json_schema import Count, Positive

SECTIONS = (
    *("title", "notes", "needs", "sizes", "model", "scoring", "dump", "prebuilt", "index", "cluster", "tune"),
    *("evaluate", "published", "device", "data_dir"),
)
DATA_VARIABLE = "KNN_LM_EVAL_DATA"  # the tasks' as well
STORE, TUNED, RESULTS = "store", "tuned", "results"  # below the output's folder
PACKAGED_MODEL = "model"
METHODS: dict[str, Callable[..., Any]] = {"kmeans": cluster_kmeans, "greedy_merge": cluster_greedy_merge}


def _options(function: Any, *others: str) -> tuple[str, ...]:
    """What a recipe may say of a step: the arguments of the function that does it, but those that are found out."""
    return tuple(name for name in inspect.signature(function).parameters if name not in others)


TEXT = tuple(field.name for field in fields(TextSource))
DUMP = (*TEXT, "max_length", "stride", "batch_size", "max_tokens", "knn_keytype", "key_module", "keys", "memory")
PREBUILT = ("addresses", *_options(import_datastore, "sources", "output", "copy", "pretrained"))
INDEX = _options(build_index, "datastore", "budget", "lm_microseconds", "ray", "resume", "overwrite")
INDEX_OF_DUMP = ("factory", "name", "sim_func", "parts")  # where no keys are kept
CLUSTER = {name: ("method", *_options(of, "datastore", "resume", "overwrite")) for name, of in METHODS.items()}
TUNE = ("with", *_options(tune, "model_args", "metadata", "allow_test"))
EVALUATE = ("methods", "tasks", "metadata", "batch_size", "seed", "include_path", "records")


class _Needs(TypedDict):
    disk: str
    memory: str
    hours: str


class _Sizes(TypedDict, total=False):
    entries: Positive
    dimension: Positive
    parameters: Positive
    tokens: dict[str, Positive]


class _Dump(TypedDict, total=False):
    text: str
    dataset: str
    config: str | None
    split: str
    text_column: str
    streaming: bool
    documents: Literal["line", "blank-line", "file", "wikitext", "wikitext-stream"]
    max_length: Positive
    stride: Positive
    batch_size: Positive
    max_tokens: Positive
    knn_keytype: Literal["last_ffn_input", "last_ffn_output"]
    key_module: str
    keys: Positive | Literal["all", "none"]
    memory: Positive | str


class _Index(TypedDict, total=False):
    factory: str
    sim_func: Literal["l2", "dot"]
    name: str
    train_sample: Positive
    quality_queries: Count
    k: Positive
    knn_temp: float
    seed: Count
    parts: Positive
    hardware: Literal["cpu", "gpu"]
    gpu_memory: float
    memory: Positive | str


class _Cluster(TypedDict, total=False):
    name: str
    num_clusters: Positive
    sample: Positive
    iterations: Positive
    seed: Count
    memory: Positive | str
    k: Positive
    index: str
    probe: Positive


class _Tune(TypedDict, total=False):
    tasks: list[str]
    limit: float
    adaptive: Literal["none", "buckets", "gate"]
    saved_searches: float
    seed: Count


class _Top(TypedDict, total=False):
    title: str
    notes: list[str]
    needs: _Needs
    sizes: _Sizes
    model: dict[str, Any]
    scoring: dict[str, Any]
    dump: _Dump
    index: _Index
    cluster: _Cluster
    tune: dict[str, _Tune]
    evaluate: dict[str, Any]
    device: str | None
    data_dir: str | None


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, checked.

    Attributes
    ----------
    name : what it is called, by its file.
    sections : by ``SECTIONS``; those that are left out are empty.
    fraction : of everything, that is run; 1 is all.
    """

    name: str
    sections: dict[str, Any]
    fraction: float = 1.0

    def __getitem__(self, section: str) -> Any:
        return self.sections[section]

    @property
    def entries(self) -> int | None:
        """How many the datastore will have; None where the recipe does not know."""
        known = [count for count in (self["sizes"].get("entries"), self["dump"].get("max_tokens")) if count is not None]
        return min(known, default=None)

    def filled(self, section: str, output: Path) -> Any:
        """A section with the folders in their places; raises UserError where there is no folder of local data."""
        return self._filled(self[section], output)

    def lm_args(self, output: Path) -> dict[str, Any]:
        """The arguments of the LM as the dump takes them."""
        args = {name: value for name, value in self.filled("model", output).items() if name != "package"}
        return ({"pretrained": str(output / PACKAGED_MODEL)} if "package" in self["model"] else {}) | args

    def scoring_args(self, output: Path) -> dict[str, Any]:
        """Those that evaluations and tuning take."""
        return self.lm_args(output) | self.filled("scoring", output)

    def metadata(self) -> dict[str, Any]:
        """What tasks are told."""
        folder = self["data_dir"] or os.environ.get(DATA_VARIABLE)
        return ({"data_dir": folder} if folder else {}) | mapping(self["evaluate"].get("metadata"), "metadata")

    def matrix_content(self, output: Path) -> dict[str, Any]:
        """The benchmark that the evaluations are, as its file holds it."""
        evaluate = self.filled("evaluate", output)
        return {
            "output": str(output / RESULTS),
            **({"device": self["device"]} if self["device"] else {}),
            **{name: evaluate[name] for name in EVALUATE if name in evaluate},
            "metadata": self.metadata(),
            "models": {self.name: self.scoring_args(output)},
            "datastores": {STORE: str(output / STORE)},
        }

    def matrix(self, output: Path) -> Matrix:
        """The same, read."""
        return matrix_of(copy.deepcopy(self.matrix_content(output)), Path(f"{self.name}.yaml: evaluate"))

    def figure(self, method: str, task: str) -> PublishedFigure | None:
        """The published figure that a method's result on a task (as lm-eval calls it) is held against, if any."""
        published = self["published"]
        of_method = mapping(published.get("methods"), "methods").get(method)
        model = published.get("model")
        return next(
            (one for one in PUBLISHED_FIGURES if (one.model, one.method, one.task) == (model, of_method, task)), None
        )

    def _filled(self, value: Any, output: Path) -> Any:
        if isinstance(value, dict):
            return {name: self._filled(inner, output) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._filled(inner, output) for inner in value]
        if not isinstance(value, str):
            return value
        if "{data_dir}" in value:
            folder = self.metadata().get("data_dir")
            if folder is None:
                raise UserError(
                    f"{self.name} needs a folder of local data ({value}): give it with --set data_dir=FOLDER, or by "
                    f"the environment variable {DATA_VARIABLE}."
                )
            value = value.replace("{data_dir}", str(folder))
        return value.replace("{output}", str(output))


def recipe_names() -> list[str]:
    """The recipes that the program brings."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe's file, by its path or the name of one that the program brings; raises UserError where there is none."""
    if name in recipe_names():
        return recipes_dir() / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, recipe_names(), 1)
    said = f"did you mean {near[0]}?" if near else f"there are {', '.join(recipe_names())}, or give a file (.yaml)."
    raise UserError(f"There is no recipe called {shortened(name)}; {said}")


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    name : as for ``find_recipe``.
    changes : ``SECTION.KEY=VALUE``, with more keys between where it lies deeper; VALUE is YAML, and no value takes the
        key away.

    Raises
    ------
    UserError
        Where there is no such recipe, it is no YAML, has keys that nobody reads (the nearest valid one is named), or
        lacks what it takes.
    """
    path = find_recipe(name)
    content = mapping(read_yaml(path), str(path))
    for change in changes:
        _change(content, change)
    return checked(path.stem, content, str(path))


def checked(name: str, content: dict[str, Any], where: str) -> Recipe:
    """The recipe that ``content`` is; raises UserError as ``read_recipe``."""
    refuse_unknown(content, SECTIONS, where)
    check_types(content, _Top, where)
    sections: dict[str, Any] = {section: mapping(content.get(section), f"{where}: {section}") for section in STEPS}
    sections |= {section: content.get(section) for section in SECTIONS if section not in STEPS}
    for section, known in STEPS.items():
        if known:
            refuse_unknown(sections[section], known, f"{where}: {section}")
    recipe = Recipe(name, sections)
    _check_model(recipe, where)
    _check_datastore(recipe, where)
    _check_clusters(sections["cluster"], where)
    for tuned, settings in sections["tune"].items():
        refuse_unknown(settings, TUNE, f"{where}: tune: {tuned}")
        if not settings.get("tasks"):
            raise UserError(f"{where}: tune: {tuned} has no tasks; say on which text to tune.")
    if recipe["evaluate"]:
        recipe.matrix(Path("{output}"))
    _check_published(recipe, where)
    return recipe


# The sections that are keys and values, and which there may be; none where others check them.
STEPS: dict[str, tuple[str, ...]] = {
    "needs": tuple(_Needs.__annotations__),
    "sizes": tuple(_Sizes.__annotations__),
    "model": (),
    "scoring": (),
    "dump": DUMP,
    "prebuilt": PREBUILT,
    "index": INDEX,
    "cluster": (),
    "tune": (),
    "evaluate": EVALUATE,
    "published": ("model", "methods"),
}


def _check_model(recipe: Recipe, where: str) -> None:
    if ("pretrained" in recipe["model"]) == ("package" in recipe["model"]):
        raise UserError(f"{where}: model should have `pretrained`, or else `package`, of which the model comes.")


def _check_datastore(recipe: Recipe, where: str) -> None:
    dump, prebuilt = recipe["dump"], recipe["prebuilt"]
    if bool(dump) == bool(prebuilt):
        raise UserError(f"{where} should have a dump, or else what is prebuilt: the datastore is one of them.")
    if dump and ("text" in dump) == ("dataset" in dump):
        raise UserError(f"{where}: dump should name a text, or else a dataset (--set dump.dataset= takes one away).")
    if prebuilt and not _texts(prebuilt.get("addresses")):
        raise UserError(f"{where}: prebuilt should have addresses, a list of texts.")
    if dump.get("keys") == "none":
        refuse_unknown(recipe["index"], INDEX_OF_DUMP, f"{where}: index (of a dump without keys)")


def _check_clusters(cluster: dict[str, Any], where: str) -> None:
    if not cluster:
        return
    if (method := cluster.get("method")) not in METHODS:
        raise UserError(f"{where}: cluster: method: {shortened(method)} should be {' or '.join(METHODS)}.")
    refuse_unknown(cluster, CLUSTER[method], f"{where}: cluster")


def _check_published(recipe: Recipe, where: str) -> None:
    """Raise UserError where a figure is named that is not known, or a method that there is not."""
    published = recipe["published"]
    methods = mapping(published.get("methods"), f"{where}: published: methods")
    refuse_unknown(methods, recipe["evaluate"].get("methods") or {}, f"{where}: published: methods")
    known = {(one.model, one.method) for one in PUBLISHED_FIGURES}
    if missing := [method for method in methods.values() if (published.get("model"), method) not in known]:
        raise UserError(f"{where}: published: there is no figure of {published.get('model')}, {missing[0]}.")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _change(content: dict[str, Any], change: str) -> None:
    """Set, or take away, one value of a recipe."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise UserError(f"--set {shortened(change)} should be SECTION.KEY=VALUE, such as model.dtype=bfloat16.")
    *path, last = name.split(".")
    place: Any = content
    for key in path:
        if place.get(key) is None:
            place[key] = {}
        elif isinstance(place[key], list) and all(isinstance(each, str) for each in place[key]):
            place[key] = dict.fromkeys(place[key])  # a list of names, one of which gets settings
        place = place[key]
        if not isinstance(place, dict):
            raise UserError(f"--set {shortened(change)}: {key} has no keys.")
    if not text:
        place.pop(last, None)
        return
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {shortened(change)}: {shortened(text)} is no value: {' '.join(str(error).split()):.200}"
        ) from error
