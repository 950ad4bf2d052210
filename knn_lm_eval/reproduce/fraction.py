"""A recipe made small, to see all of it run: less text, fewer lists and clusters, no more neighbours than entries."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.reproduce.recipe import Recipe, checked
from knn_lm_eval.search.kmeans import LEAST_PER_CLUSTER

LEAST_ENTRIES = 1000  # fewer do not train a quantizer
INVERTED_LISTS = re.compile(r"(?<=IVF)\d+")


def fraction_of(recipe: Recipe, fraction: float) -> Recipe:
    """The same recipe with a fraction of the datastore's text and of what is scored.

    Lists, clusters and their samples, and k become smaller as far as so few entries ask for it.

    Raises
    ------
    UserError
        Where it is no fraction, the recipe does not say how many entries there are, or they are prebuilt.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g} must be above 0 and at most 1.")
    if fraction == 1:
        return recipe
    if recipe["prebuilt"]:
        raise UserError(f"The datastore of {recipe.name} is prebuilt, of which there is no fraction; leave it out.")
    if recipe.entries is None:
        raise UserError(f"{recipe.name} does not say how many entries there are: --set sizes.entries=NUMBER.")
    entries = min(recipe.entries, max(LEAST_ENTRIES, math.ceil(recipe.entries * fraction)))
    sections = copy.deepcopy(recipe.sections)
    sections["dump"]["max_tokens"] = sections["sizes"]["entries"] = entries
    tokens = sections["sizes"].get("tokens", {})
    sections["sizes"]["tokens"] = {task: math.ceil(count * fraction) for task, count in tokens.items()}
    if "factory" in (index := sections["index"]):
        index["factory"] = INVERTED_LISTS.sub(lambda lists: _lists(int(lists[0]), entries), index["factory"])
    _shrink_clusters(sections["cluster"], fraction, entries)
    for settings in sections["tune"].values():
        settings["limit"] = _limit(settings.get("limit"), fraction)
        _cap(settings, entries)
        _cap(settings.get("with", {}), entries)
    _shrink_evaluation(sections["evaluate"], fraction, entries)
    present = {name: section for name, section in sections.items() if section}
    return Recipe(recipe.name, checked(recipe.name, present, recipe.name).sections, fraction)


def _lists(lists: int, entries: int) -> str:
    """As many inverted lists as can be trained."""
    return str(max(1, min(lists, entries // LEAST_PER_CLUSTER)))


def _shrink_clusters(cluster: dict[str, Any], fraction: float, entries: int) -> None:
    if "num_clusters" in cluster:
        cluster["num_clusters"] = max(1, min(entries, round(cluster["num_clusters"] * fraction)))
    if "sample" in cluster:
        cluster["sample"] = max(cluster.get("num_clusters", 1), min(entries, round(cluster["sample"] * fraction)))
    _cap(cluster, entries - 2)  # greedy merging: an entry's other neighbours


def _shrink_evaluation(evaluate: dict[str, Any], fraction: float, entries: int) -> None:
    evaluate["metadata"] = {**(evaluate.get("metadata") or {}), "text_fraction": fraction}
    tasks = evaluate.get("tasks") or {}
    tasks = dict.fromkeys(tasks) if isinstance(tasks, list) else tasks
    evaluate["tasks"] = {
        name: {**(settings or {}), "limit": _limit((settings or {}).get("limit"), fraction)}
        for name, settings in tasks.items()
    }
    methods = evaluate.get("methods") or {}
    for settings in methods.values() if isinstance(methods, dict) else ():
        _cap(settings or {}, entries)


def _limit(limit: float | None, fraction: float) -> float:
    """So many documents, or such a fraction of them, as lm-eval's ``limit`` is."""
    return fraction if limit is None else limit * fraction if limit < 1 else max(1, math.ceil(limit * fraction))


def _cap(settings: dict[str, Any], entries: int) -> None:
    """Look for no more neighbours than there are entries."""
    k = settings.get("k")
    if isinstance(k, int) and k > entries:
        settings["k"] = entries
    elif isinstance(k, str) and ":" not in k:
        settings["k"] = ",".join(str(min(int(number), entries)) for number in k.split(","))
