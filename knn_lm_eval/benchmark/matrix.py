"""The file that says what a benchmark consists of: models x datastores x methods x tasks, read into cells.

    output: results/benchmark
    models:
      gpt2: {pretrained: gpt2, max_length: 1024}
    datastores:
      law: stores/gpt2-law                  # or {path: ..., models: [gpt2], index: ...}
      both: {path: [stores/gpt2-law, stores/gpt2-wiki]}
    methods:
      base: {model: hf}
      knn: {k: 1024, lmbda: 0.25}
      tuned: {params: "tuned/{model}-{datastore}.json"}
    tasks:
      law: {limit: 500, metadata: {data_dir: DATA}}

Every method but those of ``model: hf`` is combined with every datastore that is for the model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from knn_lm_eval.benchmark.cell import KNN, Cell
from knn_lm_eval.benchmark.strict_yaml import check_types, mapping, read_yaml, refuse_unknown
from knn_lm_eval.benchmark.tracking import Trackers
from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.lm.loading import HF_ARGUMENTS, MISTYPED, NOT_MISTYPED
from knn_lm_eval.system.json_schema import mismatch

TOP = (
    *("output", "models", "datastores", "methods", "tasks", "metadata", "include_path", "batch_size", "device", "seed"),
    *("records", *Trackers.names()),
)
TASK = ("task", "limit", "num_fewshot", "metadata", "gen_kwargs", "apply_chat_template", "system_instruction")
NAME = re.compile(r"[\w.+=-]*\w[\w.+=-]*")  # a folder gets this name
DEFAULT_SEED = 1234


class _Top(TypedDict, total=False):
    output: str | None
    include_path: str | list[str] | None
    batch_size: int | str
    device: str | None
    seed: int
    records: bool


class _Store(TypedDict, total=False):
    path: str | int | list[str | int]  # a folder may be called 2024; several are searched together
    models: str | list[str] | None


class _Task(TypedDict, total=False):
    task: str
    num_fewshot: int | None
    gen_kwargs: str | dict[str, Any] | None
    apply_chat_template: bool | str | None
    system_instruction: str | None


@dataclass(frozen=True)
class Matrix:
    """The cells, and how to run them."""

    output: Path
    cells: list[Cell]
    batch_size: int | str
    device: str | None
    include_path: list[str]
    trackers: Trackers = field(default_factory=Trackers)


def read_matrix(path: Path) -> Matrix:
    """Read a benchmark's file.

    Raises
    ------
    UserError
        Where it is no YAML, or has keys that nobody reads; the nearest valid one is named.
    """
    return matrix_of(read_yaml(path), path)


def matrix_of(content: Any, path: Path) -> Matrix:
    """The matrix that a file holds, of which ``content`` was read; raises UserError as ``read_matrix``."""
    content = _top(content, path)
    return Matrix(
        output=Path(content.get("output") or path.with_suffix("").name + "_results"),
        cells=list(_cells(content, path)),
        batch_size=content.get("batch_size", 1),
        device=content.get("device"),
        include_path=[str(folder) for folder in _listed(content.get("include_path"))],
        trackers=Trackers.read(content, str(path)),
    )


def _cells(content: dict[str, Any], path: Path) -> Iterator[Cell]:
    models = _section(content, "models", path)
    stores = _section(content, "datastores", path, shorthand="path")
    methods = _section(content, "methods", path)
    tasks = _section(content, "tasks", path)
    seed, records = content.get("seed", DEFAULT_SEED), content.get("records", False)
    _check(path, models, stores, methods, tasks)
    metadata = mapping(content.get("metadata"), f"{path}: metadata")
    for name, task_settings in tasks.items():
        own = mapping(task_settings.get("metadata"), f"{path}: tasks: {name}: metadata")
        task_settings |= {"task": task_settings.get("task", name), "metadata": metadata | own}
    for method, settings in methods.items():
        settings.setdefault("model", _kind(method, settings))

    for model, model_args in models.items():
        of_model = [name for name, store in stores.items() if model in (_listed(store.get("models")) or models)]
        for task, task_settings in tasks.items():
            for method, settings in methods.items():
                kind = settings["model"]
                for store_name in of_model if kind == "knn-hf" else [None]:
                    own = {key: value for key, value in settings.items() if key != "model"}
                    args = model_args | (_store_args(stores[store_name]) if store_name else {}) | own
                    args = {key: _filled(value, model, store_name) for key, value in args.items()}
                    keeps = records and kind == "knn-hf"
                    yield Cell(model, store_name, method, task, kind, args, task_settings, seed, keeps)


def _kind(method: str, settings: dict[str, Any]) -> str:
    """lm-eval's model: ``base`` without another word is the LM alone."""
    return settings.get("model", "hf" if method == "base" else "knn-hf")


def _check(
    path: Path,
    models: dict[str, dict[str, Any]],
    stores: dict[str, dict[str, Any]],
    methods: dict[str, dict[str, Any]],
    tasks: dict[str, dict[str, Any]],
) -> None:
    for name, args in models.items():
        if "pretrained" not in args:
            raise UserError(f"{path}: models: {name} has no `pretrained`; say which model it is.")
        # Other arguments are the model class's own, which nobody can list: those that look mistyped are refused.
        for key in set(args) - {*HF_ARGUMENTS, *NOT_MISTYPED, "context_len"}:
            if near := difflib.get_close_matches(key, HF_ARGUMENTS, 1, MISTYPED):
                raise UserError(f"{path}: models: {name}: unknown key {key!r}; did you mean {near[0]!r}?")
    for name, store in stores.items():
        refuse_unknown(store, ["path", "models", *KNN], f"{path}: datastores: {name}")
        check_types(store, _Store, f"{path}: datastores: {name}")
        _refuse_records(store, f"{path}: datastores: {name}")
        if "path" not in store:
            raise UserError(f"{path}: datastores: {name} has no `path`; say where the datastore is.")
        for model in _listed(store.get("models")):
            refuse_unknown({model: None}, models, f"{path}: datastores: {name}: models")
    for name, method in methods.items():
        kind = _kind(name, method)
        if kind not in ("hf", "knn-hf"):
            raise UserError(f"{path}: methods: {name}: model: {shortened(kind)} is unknown; use hf or knn-hf.")
        refuse_unknown(method, ["model", *(["context_len"] if kind == "hf" else KNN)], f"{path}: methods: {name}")
        _refuse_records(method, f"{path}: methods: {name}")
        if kind == "knn-hf" and not stores:
            raise UserError(f"{path}: methods: {name} needs a datastore; list some under `datastores`.")
    for name, task in tasks.items():
        where = f"{path}: tasks: {name}"
        refuse_unknown(task, TASK, where)
        limit = task.get("limit")
        if limit is not None and (mismatch(limit, float) or limit <= 0):
            raise UserError(f"{where}: limit: {shortened(limit)} is not a number above 0.")
        check_types(task, _Task, where)


def _refuse_records(settings: dict[str, Any], where: str) -> None:
    if "records" in settings:
        raise UserError(f"{where}: records is for the whole file (records: true at its top): each cell has its own.")


def _store_args(store: dict[str, Any]) -> dict[str, Any]:
    args = {key: value for key, value in store.items() if key not in ("path", "models")}
    several = isinstance(store["path"], list)
    return args | {"datastore": [str(path) for path in store["path"]] if several else str(store["path"])}


def _filled(value: Any, model: str, datastore: str | None) -> Any:
    """A setting with the cell's names in the places of ``{model}`` and ``{datastore}``."""
    if isinstance(value, list):
        return [_filled(part, model, datastore) for part in value]
    if not isinstance(value, str):
        return value
    return value.replace("{model}", model).replace("{datastore}", datastore or "")


def _top(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold keys and values: {', '.join(TOP)}.")
    refuse_unknown(content, TOP, str(path))
    check_types(content, _Top, str(path))
    for name in ("models", "methods", "tasks"):
        if not content.get(name):
            raise UserError(f"{path}: {name} is missing or empty.")
    return content


def _section(content: dict[str, Any], name: str, path: Path, shorthand: str = "") -> dict[str, dict[str, Any]]:
    """A section's entries by name: a mapping, or a list of names."""
    section = content.get(name) or {}
    if isinstance(section, list):
        if nested := [entry for entry in section if isinstance(entry, (dict, list))]:
            raise UserError(f"{path}: {name}: {shortened(nested[0])} in the list is no name.")
        section = dict.fromkeys(section)
    entries = {}
    for entry, settings in mapping(section, f"{path}: {name}").items():
        if not NAME.fullmatch(str(entry)):
            raise UserError(
                f"{path}: {name}: {shortened(entry)} cannot name a folder; use letters, digits and . + - = _ "
                "(and give the task's own name as `task:`)."
            )
        if shorthand and isinstance(settings, str):
            settings = {shorthand: settings}
        entries[str(entry)] = mapping(settings, f"{path}: {name}: {entry}")
    return entries


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
