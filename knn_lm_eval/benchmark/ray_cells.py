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
from typing import Any

from tqdm import tqdm

from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.benchmark.runner import Outcome, Outcomes, finished_results, run_matrix
from knn_lm_eval.benchmark.spreading import passes
from knn_lm_eval.errors import UserError
from knn_lm_eval.system.files import disk_errors_in
from knn_lm_eval.system.ray_cluster import connect

RETRIES = 3  # of a task whose process or node died
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
        Where there is no cluster, or the output cannot be written.
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
        for part, became in _run_tasks(connect(address), todo, workers):
            for cell, (state, error) in zip(part.cells, became, strict=True):
                if state != "failed" and finished_results(matrix.output / cell.folder, cell.checksum()) is None:
                    state, error = "failed", UserError(f"Its results are not in {matrix.output} here: {SAME_PATHS}.")
                outcomes.tell(cell, state, error)
            bar.update(len(part.cells))
    return outcomes.all


Became = list[tuple[str, Exception | None]]  # each cell's state and error, in the cells' order


def _run_tasks(ray: Any, parts: list[Matrix], workers: int | None) -> Iterator[tuple[Matrix, Became]]:
    """Each part and what became of its cells, as they come; no more than ``workers`` are under way at a time."""
    needs, most = _resources(ray, workers)
    task = ray.remote(_run_part).options(max_retries=RETRIES, scheduling_strategy="SPREAD", **needs)
    waiting = list(reversed(parts))
    running: dict[Any, Matrix] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                running[task.remote(waiting[-1], os.getcwd(), _named_paths(waiting[-1]))] = waiting[-1]
                waiting.pop()
            (done,), _ = ray.wait(list(running), num_returns=1)
            part = running.pop(done)
            try:
                yield part, ray.get(done)
            except ray.exceptions.RayError as error:
                yield part, [("failed", _said(ray, error))] * len(part.cells)
    finally:
        for left in running:
            ray.cancel(left)


def _resources(ray: Any, workers: int | None) -> tuple[dict[str, float], int]:
    """What a task takes of the cluster, and how many may be under way."""
    resources = ray.cluster_resources()
    if gpus := int(resources.get("GPU", 0)):
        return {"num_cpus": 1, "num_gpus": 1}, workers or gpus
    of_nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    least = min((cpus for cpus in of_nodes if cpus), default=1)
    workers = workers or max(1, sum(cpus > 0 for cpus in of_nodes))
    return {"num_cpus": max(1, min(least, sum(of_nodes) // workers))}, workers


def _said(ray: Any, error: Exception) -> Exception:
    """The error of a task in which no cell's own error was told."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, UserError) else error
    first_line = str(error).strip().splitlines()[0]
    return UserError(f"A Ray task died ({first_line}); so did those in its place: the same command tries it again.")


def _run_part(matrix: Matrix, folder: str, named: list[str]) -> Became:
    """What a task does: the cells of a part of the matrix, run in the folder that its relative paths are of."""
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
