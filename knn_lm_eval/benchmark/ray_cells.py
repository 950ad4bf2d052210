"""A benchmark's cells as Ray tasks: one for those of a model and a task, which may share a pass over its texts.

All nodes must see the models, datastores, texts and the output under the same paths, and have this package.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.benchmark.runner import Outcome, Outcomes, finished_results, run_matrix
from knn_lm_eval.benchmark.spreading import passes
from knn_lm_eval.errors import UserError
from knn_lm_eval.system.files import disk_errors_in
from knn_lm_eval.system.ray_cluster import Head
from knn_lm_eval.system.ray_jobs import Needs, run_jobs

SAME_PATHS = "all nodes must see the models, datastores, texts and the output under the same paths"


def run_on_ray(
    address: str, matrix: Matrix, report: Callable[[Outcome], None], workers: int | None = None
) -> list[Outcome]:
    """As ``run_matrix``, by tasks of a Ray cluster. A task that dies is begun again elsewhere, up to three times, and
    goes on with the cells that are missing; where it dies each time its cells fail, and the others go on.

    Parameters
    ----------
    address : see ``knn_lm_eval.system.ray_cluster.connect``.
    report : is told each cell's outcome when its task is done.
    workers : tasks side by side, each with a GPU where the cluster has any, else with its part of the CPUs; None is
        one for each GPU, else one for each node.

    Raises
    ------
    UserError
        Where there is no cluster, its head is lost or none of its nodes answers, or the output cannot be written.
    """
    outcomes = Outcomes(report)
    with disk_errors_in(matrix.output):
        matrix.output.mkdir(parents=True, exist_ok=True)
    todo = []
    for cells in passes(matrix.cells):
        pending = []
        for cell in cells:
            if finished_results(matrix.output / cell.folder, cell.checksum()) is None:
                pending.append(cell)
            else:
                outcomes.tell(cell, "finished")
        if pending:
            todo.append(replace(matrix, cells=pending))
    if not todo:
        return outcomes.all
    with tqdm(total=len(matrix.cells), initial=len(outcomes.all), desc="Cells", unit=" cells") as bar:
        for part, became in _run_parts(Head(address), todo, workers):
            for cell, (state, error) in zip(part.cells, became, strict=True):
                if state != "failed" and finished_results(matrix.output / cell.folder, cell.checksum()) is None:
                    state, error = "failed", UserError(f"Its results are not in {matrix.output} here: {SAME_PATHS}.")
                outcomes.tell(cell, state, error)
            bar.update(len(part.cells))
    return outcomes.all


Became = list[tuple[str, Exception | None]]  # each cell's state and error, in the cells' order


def _run_parts(head: Head, parts: list[Matrix], workers: int | None) -> Iterator[tuple[Matrix, Became]]:
    """Each part and what became of its cells, as they come; no more than ``workers`` are under way at a time."""
    needs, most = _needs(head, workers)
    jobs = {number: (part, os.getcwd(), _named_paths(part)) for number, part in enumerate(parts)}
    died = "so did those in its place: the same command tries it again"
    go_on = "go on with the same command"
    for done in run_jobs(head, _run_part, jobs, needs, then=died, go_on=go_on, at_once=most, instead=_Dead):
        if done is not None:
            part, became = parts[done[0]], done[1]
            yield part, [("failed", became.error)] * len(part.cells) if isinstance(became, _Dead) else became


class _Dead(NamedTuple):
    """What becomes of a part whose task died again and again."""

    error: UserError


def _needs(head: Head, workers: int | None) -> tuple[Needs, int]:
    """What a task takes of its node, and how many may be under way."""
    if gpus := int(sum(node.resources.get("GPU", 0) for node in head.nodes)):
        return Needs(gpus=1), workers or gpus
    of_nodes = [int(node.resources["CPU"]) for node in head.workers]
    workers = workers or max(1, len(of_nodes))
    return Needs(num_cpus=max(1, min(min(of_nodes, default=1), sum(of_nodes) // workers))), workers


def _run_part(matrix: Matrix, folder: str, named: list[str]) -> Became:
    """What a task does: the cells of a part of the matrix, run in the folder that its relative paths are of."""
    try:
        return _run_cells(matrix, folder, named)
    except Exception as error:  # in which no cell's own was told
        return [("failed", _portable(error))] * len(matrix.cells)


def _run_cells(matrix: Matrix, folder: str, named: list[str]) -> Became:
    logging.getLogger("knn_lm_eval").setLevel(logging.WARNING)
    if missing := [path for path in named if not os.path.exists(path)]:
        raise UserError(f"The node {socket.gethostname()} does not see {missing[0]}: {SAME_PATHS}.")
    os.chdir(folder)
    became: dict[Path, tuple[str, Exception | None]] = {}
    for outcome in run_matrix(matrix, lambda _: None):
        became[outcome.cell.folder] = (outcome.state, _portable(outcome.error))
    return [became[cell.folder] for cell in matrix.cells]


def _named_paths(matrix: Matrix) -> list[str]:
    """The files and folders here that the nodes must see: where this runs, the output, and what the cells name."""
    values = [
        value for cell in matrix.cells for value in (*cell.args.values(), *cell.task_settings["metadata"].values())
    ]
    named = {os.path.abspath(value) for value in (*values, *matrix.include_path) if isinstance(value, str)}
    there = sorted(path for path in named if os.path.exists(path))
    return [os.getcwd(), os.path.abspath(matrix.output), *there]


def _portable(error: Exception | None) -> Exception | None:
    """An error that can be sent: itself, or its kind and its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever it holds
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
