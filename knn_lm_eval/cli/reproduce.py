"""Run a recipe from text to table: dump, index, cluster, tune and evaluate, beside the published figures.

What is finished is kept, so that an interrupted run goes on where it was, and a second one only reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.cli.arguments import add_output
from knn_lm_eval.cli.benchmark import duration, size
from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

if TYPE_CHECKING:
    from knn_lm_eval.benchmark.runner import Outcome
    from knn_lm_eval.report.measured import Measurement
    from knn_lm_eval.reproduce.plan import PlannedStep
    from knn_lm_eval.reproduce.recipe import Recipe
    from knn_lm_eval.reproduce.steps import Step

EXAMPLE = "knn-lm-eval reproduce python_docs --fraction 0.1"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("recipe", nargs="?", help="its name, or a file (.yaml); without one, the recipes are listed")
    add_output(parser, "the folder for all that is made (default: reproduced/RECIPE)", required=False)
    parser.add_argument("--dry_run", action="store_true", help="print the plan, with time and disk, and stop")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="run so much of it, such as 0.001, to see all of it work"
    )
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change the recipe: model.dtype=bfloat16, data_dir=FOLDER, device=cuda; may be given several times",
    )
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    from knn_lm_eval.reproduce.fraction import fraction_of
    from knn_lm_eval.reproduce.recipe import read_recipe

    if arguments.recipe is None:
        print_recipes()
        return
    recipe = fraction_of(read_recipe(arguments.recipe, arguments.changes), arguments.fraction)
    if (output := arguments.output) is None:
        of_fraction = "" if recipe.fraction == 1 else f"-{recipe.fraction:g}"
        output = Path("reproduced", f"{recipe.name}{of_fraction}")
    check_folder(output, "--output")
    if arguments.dry_run:
        from knn_lm_eval.reproduce.plan import plan

        print_plan(recipe, plan(recipe, output))
        return
    print_measured(reproduce(recipe, output), recipe.fraction)


def check_folder(folder: Path, option: str) -> None:
    """Raise UserError where model arguments cannot name a folder."""
    if "," in str(folder):
        raise UserError(f"{option} {folder} has a comma, which separates model arguments.")


def reproduce(recipe: Recipe, output: Path) -> list[Measurement]:
    """Run a recipe, and print how it goes; the measurements in its order."""
    from knn_lm_eval.report.measured import Measurement
    from knn_lm_eval.reproduce.run import run_recipe
    from knn_lm_eval.system.files import disk_errors_in

    start = time.perf_counter()

    def begins(step: Step, finished: bool) -> None:
        nonlocal start
        start = time.perf_counter()
        print(f"\n== {step.title}", flush=True)
        if finished:
            print(f"{step.product} is there", flush=True)
        elif step.command:
            print(f"$ {step.command}", flush=True)

    def ends(step: Step) -> None:
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)

    def evaluated(outcome: Outcome) -> None:
        print(f"{outcome.cell.method} on {outcome.cell.task}: {outcome.state}", flush=True)

    with disk_errors_in(output):
        found = run_recipe(recipe, output, begins, ends, evaluated)
    return [
        Measurement(cell.method, task, results, recipe.figure(cell.method, task))
        for cell, results in found
        for task in [cell.task_settings["task"]]
    ]


def print_measured(measurements: Sequence[Measurement], fraction: float) -> None:
    """Print what was measured beside what is published."""
    from knn_lm_eval.report.measured import measured_tables
    from knn_lm_eval.report.tables import print_table

    for table in measured_tables(measurements, fraction):
        print()
        print_table(table.title, table.columns, table.rows, table.notes)


def print_recipes() -> None:
    """Print the recipes that there are."""
    from knn_lm_eval.report.tables import print_table
    from knn_lm_eval.reproduce.recipe import read_recipe, recipe_names

    rows = [[name, read_recipe(name)["title"]] for name in recipe_names()]
    print_table("", {"recipe": "", "what it is": ""}, rows)


def print_plan(recipe: Recipe, steps: Sequence[PlannedStep]) -> None:
    """Print what a recipe is and takes, step by step, and the commands that do its steps by hand."""
    from knn_lm_eval.report.tables import print_table

    print(recipe["title"] or recipe.name)
    for note in recipe["notes"] or []:
        print(f"- {note}")
    for what, needs in recipe["needs"].items():
        print(f"{what}: {needs}")
    print()
    rows = []
    for one in steps:
        state = "finished" if one.finished else "to do"
        spent = None if one.finished else duration(one.costs.seconds)
        rows.append([one.step.name, state, shown_size(one.costs.disk), shown_size(one.costs.memory), spent])
    print_table("", {"step": "", "state": "", "disk": ">", "memory": ">", "time here": ">"}, rows)
    disk = sum(one.costs.disk or 0 for one in steps)
    seconds = sum(one.costs.seconds or 0 for one in steps if not one.finished)
    print(
        f"{size(disk)} of disk, computed; {duration(seconds)} to go on this machine, estimated from the speed of a "
        f"matrix product here, searches left out."
    )
    if any(None in (one.costs.disk, one.costs.seconds) for one in steps):
        print("? is unknown and left out: the recipe does not say how large that is.")
    print()
    for one in steps:
        if one.step.command:
            print(f"$ {one.step.command}")


def shown_size(number: int | None) -> str | None:
    """Bytes for people; nothing where there are none."""
    return None if number == 0 else "?" if number is None else size(number)
