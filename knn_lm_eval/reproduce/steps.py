"""The steps of a recipe: what each is called, the command that does it by hand, and the library's function for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from knn_lm_eval.benchmark.runner import Outcome, run_matrix
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.importing import import_datastore
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.text import PYTHON_DOCS, TextSource, python_docs_split
from knn_lm_eval.reproduce.commands import command_line, model_args_text
from knn_lm_eval.reproduce.packaged_model import convert_model, find_gguf
from knn_lm_eval.reproduce.recipe import METHODS, PACKAGED_MODEL, STORE, TEXT, TUNED, Recipe
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import METADATA
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.fetching import PUBLISHED_SUFFIXES, fetch_datastore, fetch_files
from knn_lm_eval.store.index_files import DEFAULT_INDEX, IndexFiles
from knn_lm_eval.store.manifest import MANIFEST
from knn_lm_eval.study.tuning import tune
from knn_lm_eval.system.files import write_text
from knn_lm_eval.system.memory import parse_bytes

MATRIX, PUBLISHED = "evaluate.yaml", "published"  # below the output's folder


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes
    ----------
    name : ``dump``, ``index``, ``tune knn``, ...
    title : what comes of it, for people.
    command : how one would type it; none where no verb does it.
    settings : what its product depends on, ready for JSON.
    product : the file that it writes last; None where it knows itself what is finished.
    run : does it; its argument says whether it was begun before with the same settings.
    remakes : whether with other settings it takes the place of what there is, which else stays.
    """

    name: str
    title: str
    command: str
    settings: dict[str, Any]
    product: Path | None
    run: Callable[[bool], None]
    remakes: bool = True


def steps_of(recipe: Recipe, output: Path, report: Callable[[Outcome], None]) -> list[Step]:
    """The steps in their order.

    Parameters
    ----------
    output : the folder for all that is made.
    report : is told each evaluation's outcome as soon as it is known.

    Raises
    ------
    UserError
        Where the recipe needs a folder of local data and there is none.
    """
    steps = []
    if "package" in recipe["model"]:
        steps.append(_model_step(recipe, output))
    steps += _prebuilt_steps(recipe, output) if recipe["prebuilt"] else [_dump_step(recipe, output)]
    if recipe["index"] and recipe["dump"].get("keys") != "none":
        steps.append(_index_step(recipe, output))
    if recipe["cluster"]:
        steps.append(_cluster_step(recipe, output))
    steps += [_tune_step(recipe, output, name) for name in recipe["tune"]]
    if recipe["evaluate"]:
        steps.append(_evaluate_step(recipe, output, report))
    return steps


def _model_step(recipe: Recipe, output: Path) -> Step:
    folder, package = output / PACKAGED_MODEL, recipe["model"]["package"]
    return Step(
        "model",
        "The model, from GGUF to safetensors",
        "",
        {"package": package},
        folder / "config.json",
        lambda begun: convert_model(find_gguf(package), folder),
        remakes=False,
    )


def _prebuilt_steps(recipe: Recipe, output: Path) -> list[Step]:
    """Fetching what is published, and importing it where another program made it."""
    store, files = output / STORE, output / PUBLISHED
    prebuilt = recipe.filled("prebuilt", output)
    addresses, how = prebuilt["addresses"], _settings(prebuilt, "addresses")
    settings = {"prebuilt": recipe["prebuilt"], "model": recipe["model"]}
    if not all(address.partition("?")[0].endswith(PUBLISHED_SUFFIXES) for address in addresses):
        if len(addresses) > 1:
            raise UserError(f"{recipe.name}: several addresses of what is prebuilt should each be a file.")
        command = command_line("fetch_datastore", addresses, output=store)
        fetch = partial(fetch_datastore, addresses[0], store)
        return [
            Step("fetch", "The datastore", command, settings, store / MANIFEST, lambda begun: _done(fetch()), False)
        ]
    pretrained = recipe.lm_args(output)["pretrained"]
    return [
        Step(
            "fetch",
            "The published files",
            command_line("fetch_datastore", addresses, output=files),
            {"addresses": addresses},
            files / addresses[-1].rsplit("/", 1)[-1],
            lambda begun: _done(fetch_files(addresses, files)),
            remakes=False,
        ),
        Step(
            "import",
            "The datastore, of the published files",
            command_line("import_datastore", [str(files)], output=store, pretrained=pretrained, **how),
            settings,
            store / MANIFEST,
            lambda begun: _done(import_datastore([files], store, pretrained=pretrained, **how)),
            remakes=False,
        ),
    ]


def _dump_step(recipe: Recipe, output: Path) -> Step:
    """The dump; without keys it makes the index, too."""
    store, dump, args = output / STORE, recipe.filled("dump", output), recipe.lm_args(output)
    without_keys = dump.get("keys") == "none"
    index = recipe["index"] if without_keys else {}
    text: dict[str, Any] = {name: dump[name] for name in TEXT if name in dump}
    source = TextSource(**text | ({"text": Path(dump["text"])} if "text" in dump else {}))
    settings = {"model": recipe["model"], "dump": recipe["dump"], **({"index": index} if without_keys else {})}
    if source.dataset == PYTHON_DOCS:  # which another Python has otherwise, with what is held out here
        topics = "\n".join(python_docs_split(source.split))
        settings["text_sha256"] = hashlib.sha256(topics.encode()).hexdigest()

    def run(begun: bool) -> None:
        how = _settings(dump, *TEXT, "knn_keytype")
        key_type = {"key_type": dump["knn_keytype"]} if "knn_keytype" in dump else {}
        dump_datastore(
            CausalHFLM(**args, device=recipe["device"]),
            source.pieces(),
            store,
            **how,
            **key_type,
            index=IndexPlan(**index) if without_keys else None,
            resume=True,
            source=source.description(),
            model_args=args,
        )

    options = {
        "model_args": model_args_text(args),
        **dump,
        **_renamed(index),
        "output": store,
        "device": recipe["device"],
    }
    command = command_line("dump_datastore", [], **options)
    return Step("dump", "The datastore", command, settings, store / MANIFEST, run, remakes=False)


def _renamed(index: dict[str, Any]) -> dict[str, Any]:
    """The options of an index as those of a dump without keys."""
    return {"index" if name == "name" else name: value for name, value in index.items()}


def _index_step(recipe: Recipe, output: Path) -> Step:
    store, index = output / STORE, recipe["index"]

    def run(begun: bool) -> None:
        build_index(Datastore.open(store), **_settings(index), resume=begun, overwrite=True)

    return Step(
        "index",
        "The index",
        command_line(
            "build_index", [], datastore=store, **{"for" if k == "hardware" else k: v for k, v in index.items()}
        ),
        {"index": index, "store": _datastore_settings(recipe)},
        IndexFiles(store, index.get("name", DEFAULT_INDEX)).metadata,
        run,
    )


def _cluster_step(recipe: Recipe, output: Path) -> Step:
    store, cluster = output / STORE, recipe["cluster"]
    name = cluster.get("name", cluster["method"])
    needs_index = cluster["method"] == "greedy_merge" or recipe["dump"].get("keys") == "none"

    def run(begun: bool) -> None:
        how = _settings(cluster, "method")
        METHODS[cluster["method"]](Datastore.open(store), **how, resume=begun, overwrite=True)

    return Step(
        "cluster",
        "The clusters",
        command_line("cluster_datastore", [], datastore=store, **cluster),
        {
            "cluster": cluster,
            "store": _datastore_settings(recipe),
            **({"index": recipe["index"]} if needs_index else {}),
        },
        store / "clusters" / name / METADATA,
        run,
    )


def _tune_step(recipe: Recipe, output: Path, name: str) -> Step:
    own = recipe["tune"][name]
    args = recipe.scoring_args(output) | {"datastore": str(output / STORE)} | own.get("with", {})
    if recipe["device"]:
        args["device"] = recipe["device"]
    file = output / TUNED / f"{name}.json"
    how = {key: value for key, value in own.items() if key not in ("with", "tasks")}
    metadata = recipe.metadata()

    def run(begun: bool) -> None:
        file.parent.mkdir(exist_ok=True)
        found = tune(args, own["tasks"], metadata=metadata, **how)
        found.write_grid(file.with_suffix(".csv"))
        found.params.write(file)

    options = {"model_args": model_args_text(args), "tasks": ",".join(own["tasks"]), "output": file, **how}
    command = command_line("tune", [], **options, metadata=model_args_text(metadata) or None)
    settings = {"tune": own, "scoring": recipe["scoring"], "metadata": metadata}
    made_with = {section: recipe[section] for section in ("index", "cluster")}
    settings |= {"store": _datastore_settings(recipe) | made_with}
    return Step(f"tune {name}", f"The best settings of {name}", command, settings, file, run)


def _evaluate_step(recipe: Recipe, output: Path, report: Callable[[Outcome], None]) -> Step:
    """The evaluations, each of which knows itself whether it is finished."""
    file = output / MATRIX

    def run(begun: bool) -> None:
        write_text(file, yaml.safe_dump(recipe.matrix_content(output), sort_keys=False, allow_unicode=True))
        outcomes = run_matrix(recipe.matrix(output), report)
        for outcome in outcomes:
            if outcome.error is not None:
                raise UserError(f"{outcome.cell} failed: {outcome.error}") from outcome.error

    return Step("evaluate", "The evaluations", command_line("benchmark", [str(file)]), {}, None, run)


def _datastore_settings(recipe: Recipe) -> dict[str, Any]:
    """What the datastore depends on."""
    return {section: recipe[section] for section in ("model", "dump", "prebuilt")}


def _settings(section: dict[str, Any], *others: str) -> dict[str, Any]:
    """The settings of a section, but ``others``, as a function takes them."""
    read = {"memory": lambda value: parse_bytes(value) if isinstance(value, str) else value}
    return {name: read.get(name, lambda value: value)(value) for name, value in section.items() if name not in others}


def _done(made: object) -> None:
    """Leaves out what a function returns."""
