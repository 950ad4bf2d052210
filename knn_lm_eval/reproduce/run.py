"""Running a recipe: what is finished is skipped, what was interrupted goes on, what changed is made anew.

``steps.json`` in the output's folder says with which settings each step was begun, and whether it is finished. A
datastore is never replaced: where its settings changed, the user is told.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from knn_lm_eval.benchmark.cell import Cell
from knn_lm_eval.benchmark.runner import Outcome, finished_results
from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.reproduce.recipe import Recipe
from knn_lm_eval.reproduce.steps import Step, steps_of
from knn_lm_eval.system.files import held_output, read_json, write_json, write_text
from knn_lm_eval.system.json_schema import check_json

MARKS = "steps.json"


class _Mark(TypedDict):
    settings: dict[str, Any]
    finished: bool


class _Marks(TypedDict):
    steps: dict[str, _Mark]


class Measured(NamedTuple):
    """An evaluation of the recipe, and lm-eval's results of it."""

    cell: Cell
    results: dict[str, Any]


class Marks:
    """What was noted of the steps in an output's folder."""

    def __init__(self, output: Path) -> None:
        self._file = output / MARKS
        self.steps: dict[str, _Mark] = {}
        if self._file.exists():
            content = read_json(self._file)
            check_json(content, _Marks, self._file, "delete it to begin anew, or give another --output")
            self.steps = content["steps"]

    def is_finished(self, step: Step) -> bool:
        """Whether there is nothing left to do.

        Raises UserError where there is what the step does not replace, with other settings.
        """
        there = step.product is not None and step.product.exists()
        if step.product is None:
            return False
        mark = self.steps.get(step.name)
        if step.remakes:
            return there and mark is not None and mark["finished"] and self.was_begun(step)
        if mark is not None and not self.was_begun(step) and step.product.parent.exists():
            was, now = _differences(mark["settings"], _plain(step.settings))
            raise UserError(
                f"{step.product.parent} was begun with {was}, and the recipe now has {now}: delete that folder, or "
                f"give another --output."
            )
        return there

    def was_begun(self, step: Step) -> bool:
        """Whether it was begun with the settings that it has."""
        mark = self.steps.get(step.name)
        return mark is not None and mark["settings"] == _plain(step.settings)

    def note(self, step: Step, finished: bool) -> None:
        """Note that a step is begun, or finished."""
        self.steps[step.name] = {"settings": _plain(step.settings), "finished": finished}
        write_json(self._file, {"steps": self.steps})


def run_recipe(
    recipe: Recipe,
    output: Path,
    begins: Callable[[Step, bool], None],
    ends: Callable[[Step], None],
    evaluated: Callable[[Outcome], None],
) -> list[Measured]:
    """Do all steps that are not finished.

    Parameters
    ----------
    output : the folder for all that is made; nothing in it is for a repository.
    begins : is told each step, and whether it is finished already.
    ends : is told each step that was done now.
    evaluated : is told each evaluation's outcome.

    Returns
    -------
    The evaluations, in the order of the recipe.

    Raises
    ------
    UserError
        Where a step or an evaluation fails, or the folder has a datastore of other settings.
    """
    with held_output(output, is_folder=True):
        write_text(output / ".gitignore", "*\n")
        marks = Marks(output)
        for step in steps_of(recipe, output, evaluated):
            finished = marks.is_finished(step)
            begins(step, finished)
            if finished:
                if not marks.was_begun(step):
                    marks.note(step, True)
                continue
            begun = marks.was_begun(step)
            if step.product is not None:
                marks.note(step, False)
            step.run(begun)
            gc.collect()  # a model, an index
            if step.product is not None:
                marks.note(step, True)
            ends(step)
        return measured(recipe, output)


def measured(recipe: Recipe, output: Path) -> list[Measured]:
    """The evaluations that are finished."""
    if not recipe["evaluate"]:
        return []
    matrix = recipe.matrix(output)
    found = [(cell, finished_results(matrix.output / cell.folder, cell.checksum())) for cell in matrix.cells]
    return [Measured(cell, results) for cell, results in found if results is not None]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come out of a file."""
    return json.loads(json.dumps(settings, default=str))


def _differences(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    """What differs in the settings, for a sentence: as they were, and as they are."""
    flat = [_flat(settings) for settings in (was, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    first, second = (", ".join(f"{name}={shortened(of.get(name))}" for name in names) for of in flat)
    return first, second


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat
