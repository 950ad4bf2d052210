"""Running the cells of a benchmark: what is finished is skipped, what fails is reported, what can be shared is.

A cell's folder appears all at once when its evaluation is done, so whatever interrupts a benchmark, the same command
goes on with the cells that are missing.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from knn_lm_eval._startup import tasks_dir
from knn_lm_eval.benchmark.matrix import Cell, Matrix
from knn_lm_eval.benchmark.shared_pass import LoadedModel, ReadingEnds, SharedBaseLM, SharedLM, SharedPass
from knn_lm_eval.errors import UserError
from knn_lm_eval.model.scoring import LMScorer
from knn_lm_eval.system.files import disk_errors_in, fsync

logger = logging.getLogger(__name__)

RESULTS, SAMPLES = "results_*.json", "samples_*.jsonl"


@dataclass
class Outcome:
    """What became of a cell: ``finished`` before, ``done`` now, or ``failed`` with an error."""

    cell: Cell
    state: str
    error: Exception | None = None


def finished_results(folder: Path, checksum: str) -> dict[str, Any] | None:
    """The results in a cell's folder; None unless they are whole and those of this configuration."""
    files = list(folder.glob(f"*/{RESULTS}"))
    if len(files) != 1:
        return None
    try:
        results = json.loads(files[0].read_text(encoding="utf-8"))
        if results["config"]["benchmark"]["sha256"] != checksum:
            return None
        date = files[0].stem.removeprefix("results")
        for task, count in results["n-samples"].items():
            with open(files[0].with_name(f"samples_{task}{date}.jsonl"), encoding="utf-8") as lines:
                if len({json.loads(line)["doc_id"] for line in lines}) != count["effective"]:
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return results


def run_matrix(matrix: Matrix, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run all cells that are not finished; an LM is loaded once for all of its cells.

    Parameters
    ----------
    report : is told each cell's outcome as soon as it is known.
    """
    outcomes: list[Outcome] = []

    def tell(cell: Cell, state: str, error: Exception | None = None) -> None:
        outcomes.append(Outcome(cell, state, error))
        report(outcomes[-1])

    with disk_errors_in(matrix.output):
        matrix.output.mkdir(parents=True, exist_ok=True)
    for _, of_model in groupby(matrix.cells, lambda cell: cell.model):
        loaded = LoadedModel()
        for _, of_task in groupby(of_model, lambda cell: cell.task):
            pending = []
            for cell in of_task:
                if finished_results(matrix.output / cell.folder, cell.checksum()) is None:
                    pending.append(cell)
                else:
                    tell(cell, "finished")
            if pending:
                _run_task(matrix, pending, loaded, tell)
        del loaded
        gc.collect()
    return outcomes


def _run_task(matrix: Matrix, cells: Sequence[Cell], loaded: LoadedModel, tell: Callable[..., None]) -> None:
    """Run cells of one model and one task."""
    opened: list[tuple[Cell, SharedLM]] = []
    for cell in cells:
        try:
            opened.append((cell, _open(matrix, cell, loaded)))
        except Exception as error:
            tell(cell, "failed", error)
    for group in _sharing(opened):
        failure: Exception | None = None
        if len(group) > 1:
            shared = SharedPass([lm for _, lm in group])
            reader = next(cell for cell, lm in group if lm is shared.reader)
            logger.info("Reading %s once for %d cells", reader.task, len(group))
            try:
                with suppress(ReadingEnds):
                    _evaluate(matrix, reader, shared.reader, bootstrap_iters=0, log_samples=False)
            except Exception as error:
                failure = error
            shared.reading = False
        for cell, lm in group:
            try:
                if failure is not None:
                    raise failure
                _write(matrix, cell, _evaluate(matrix, cell, lm))
                tell(cell, "done")
            except Exception as error:
                logger.debug("%s failed", cell, exc_info=error)
                tell(cell, "failed", error)


def _open(matrix: Matrix, cell: Cell, loaded: LoadedModel) -> SharedLM:
    kind = SharedBaseLM if cell.kind == "hf" else SharedLM
    return kind(loaded, **cell.args, batch_size=matrix.batch_size, device=matrix.device)


def _sharing(opened: Sequence[tuple[Cell, SharedLM]]) -> Iterator[list[tuple[Cell, SharedLM]]]:
    """Those that read the same windows, and the same keys or none."""
    groups: dict[Any, list[tuple[Cell, SharedLM]]] = {}
    keys: dict[int, Any] = {}
    # Cells without retrieval come last, to join one that reads keys.
    for cell, lm in sorted(opened, key=lambda one: isinstance(one[1].scorer, LMScorer)):
        if lm.carry_state:
            groups[str(cell)] = [(cell, lm)]  # it reads in an order of its own
            continue
        if isinstance(lm.scorer, LMScorer):
            key = keys.get(lm.context_len)
        else:
            # The module itself: it may go by several names.
            key = lm.language_model.key_type, lm.language_model.key_module
            keys.setdefault(lm.context_len, key)
        groups.setdefault((lm.context_len, key), []).append((cell, lm))
    yield from groups.values()


def task_manager(cell: Cell, include_path: Sequence[str]) -> TaskManager:
    """Where lm-eval finds the cell's task; its own thousands of tasks are looked through only where they must be."""
    task = cell.task_settings["task"]
    metadata = json.dumps(cell.lm_args | cell.task_settings["metadata"], sort_keys=True)
    for everywhere in (False, True):
        manager = _task_manager(metadata, tuple(include_path), everywhere)
        if task in manager.all_tasks:
            return manager
    raise UserError(f"lm-eval has no task called {task!r}; `lm_eval ls tasks` shows what there is.")


@functools.lru_cache(maxsize=4)
def _task_manager(metadata: str, include_path: tuple[str, ...], everywhere: bool) -> TaskManager:
    folders = [str(tasks_dir()), *include_path]
    return TaskManager(include_path=folders, include_defaults=everywhere, metadata=json.loads(metadata))


def _evaluate(matrix: Matrix, cell: Cell, lm: SharedLM, **changes: Any) -> dict[str, Any]:
    settings = {key: value for key, value in cell.task_settings.items() if key not in ("task", "metadata")}
    return lm_eval.simple_evaluate(
        model=lm,
        model_args=cell.args,
        tasks=[cell.task_settings["task"]],
        task_manager=task_manager(cell, matrix.include_path),
        batch_size=matrix.batch_size,
        device=matrix.device,
        random_seed=cell.seed,
        numpy_random_seed=cell.seed,
        torch_random_seed=cell.seed,
        fewshot_random_seed=cell.seed,
        **settings | changes,
    )


def _write(matrix: Matrix, cell: Cell, results: dict[str, Any]) -> None:
    """Write what ``lm_eval --output_path FOLDER --log_samples`` writes, all at once."""
    folder = matrix.output / cell.folder
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    samples = results.pop("samples")
    results["config"] |= {
        "model": cell.kind,
        "benchmark": {
            "model": cell.model,
            "datastore": cell.datastore,
            "method": cell.method,
            "task": cell.task,
            "sha256": cell.checksum(),
            "configuration": cell.identity(),
        },
    }
    tracker = EvaluationTracker(output_path=str(unfinished))
    tracker.general_config_tracker.log_experiment_args(
        model_source=cell.kind,
        model_args=cell.args,
        system_instruction=cell.task_settings.get("system_instruction"),
        chat_template=None,
        fewshot_as_multiturn=True,
    )
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    if finished_results(unfinished, cell.checksum()) is None:  # lm-eval only warns
        raise UserError(f"The results of {cell} could not be written below {matrix.output}; is the disk full?")
    for file in unfinished.glob("*/*"):
        fsync(file)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)
    fsync(folder.parent)
