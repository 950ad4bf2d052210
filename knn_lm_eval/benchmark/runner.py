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
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from knn_lm_eval._startup import tasks_dir
from knn_lm_eval.benchmark.cell import Cell
from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.benchmark.shared_pass import LoadedModel, ReadingEnds, SharedBaseLM, SharedLM, SharedPass
from knn_lm_eval.benchmark.tracking import save_as_lm_eval
from knn_lm_eval.errors import UserError
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.scoring import LMScorer
from knn_lm_eval.system.files import disk_errors_in, unfinished_folder
from knn_lm_eval.system.locks import locked

logger = logging.getLogger(__name__)

RESULTS, SAMPLES, RECORDS = "results_*.json", "samples_*.jsonl", "records"


@dataclass
class Outcome:
    """What became of a cell: ``finished`` before, ``done`` now, or ``failed`` with an error."""

    cell: Cell
    state: str
    error: Exception | None = None


class OpenedCell(NamedTuple):
    """A cell, and the LM with its settings."""

    cell: Cell
    lm: SharedLM


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


class Outcomes:
    """What became of each cell so far; ``report`` is told as soon as it is known."""

    def __init__(self, report: Callable[[Outcome], None]) -> None:
        self._report = report
        self.all: list[Outcome] = []

    def tell(self, cell: Cell, state: str, error: Exception | None = None) -> None:
        """Note a cell's outcome."""
        if error is not None:
            logger.debug("%s failed", cell, exc_info=error)
        self.all.append(Outcome(cell, state, error))
        self._report(self.all[-1])


def run_matrix(matrix: Matrix, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run all cells that are not finished; an LM is loaded once for all of its cells.

    Parameters
    ----------
    report : is told each cell's outcome as soon as it is known.
    """
    matrix.trackers.check()
    outcomes = Outcomes(report)
    with disk_errors_in(matrix.output):
        matrix.output.mkdir(parents=True, exist_ok=True)
    for _, cells_of_model in groupby(matrix.cells, lambda cell: cell.model):
        loaded = LoadedModel()
        for _, cells_of_task in groupby(cells_of_model, lambda cell: cell.task):
            pending = []
            for cell in cells_of_task:
                if finished_results(matrix.output / cell.folder, cell.checksum()) is None:
                    pending.append(cell)
                else:
                    outcomes.tell(cell, "finished")
            opened = _open_cells(matrix, pending, loaded, outcomes)
            _warn_of_distances(opened)
            for group in _sharing(opened):
                _run_group(matrix, group, outcomes)
        del loaded
        gc.collect()
    return outcomes.all


def _open_cells(matrix: Matrix, cells: Sequence[Cell], loaded: LoadedModel, outcomes: Outcomes) -> list[OpenedCell]:
    """Those cells of one model and one task that can be opened."""
    opened = []
    for cell in cells:
        try:
            opened.append(OpenedCell(cell, _open(matrix, cell, loaded)))
        except Exception as error:
            outcomes.tell(cell, "failed", error)
    return opened


def _warn_of_distances(opened: Sequence[OpenedCell]) -> None:
    """Warn where RetoMaton has other distances than kNN-LM over the same datastore."""
    kinds: dict[tuple[str | None, bool], dict[str, OpenedCell]] = {}
    for one in opened:
        if isinstance(one.lm, KNNHF) and one.lm.settings["lmbda"] != 0:
            walks = one.lm.augmentation.automaton is not None
            kinds.setdefault((one.cell.datastore, walks), {})[one.lm.retriever.kind_of_distances] = one
    for (datastore, walks), of_walks in kinds.items():
        of_searches = kinds.get((datastore, False), {})
        if walks and of_searches and of_walks.keys() != of_searches.keys():
            logger.warning(
                "%s has %s distances and %s %s ones: to compare them give both methods recompute_dists: true.",
                next(iter(of_walks.values())).cell,
                " and ".join(sorted(of_walks)),
                next(iter(of_searches.values())).cell,
                " and ".join(sorted(of_searches)),
            )


def _run_group(matrix: Matrix, group: Sequence[OpenedCell], outcomes: Outcomes) -> None:
    """Run cells that share the reading."""
    failure = _read_once(matrix, group) if len(group) > 1 else None
    for cell, lm in group:
        try:
            if failure is not None:
                raise failure
            _write(matrix, cell, _evaluate(matrix, cell, lm))
            outcomes.tell(cell, "done")
        except Exception as error:
            outcomes.tell(cell, "failed", error)
        finally:
            if cell.records:
                shutil.rmtree(_unfinished_records(matrix, cell), ignore_errors=True)


def _read_once(matrix: Matrix, group: Sequence[OpenedCell]) -> Exception | None:
    """Have one LM read the task's texts, and all keep their scores of them; the error that ended that, if any did."""
    shared = SharedPass([lm for _, lm in group])
    reader = next(cell for cell, lm in group if lm is shared.reader)
    logger.info("Reading %s once for %d cells", reader.task, len(group))
    try:
        with suppress(ReadingEnds):
            _evaluate(matrix, reader, shared.reader, bootstrap_iters=0, log_samples=False)
    except Exception as error:
        return error
    finally:
        shared.reading = False
    return None


def _open(matrix: Matrix, cell: Cell, loaded: LoadedModel) -> SharedLM:
    kind = SharedBaseLM if cell.kind == "hf" else SharedLM
    args = dict(cell.args)
    if cell.records:
        folder = _unfinished_records(matrix, cell)
        _remove_left_records(folder)
        args["records"] = str(folder)
    return kind(loaded, **args, batch_size=matrix.batch_size, device=matrix.device)


def _unfinished_records(matrix: Matrix, cell: Cell) -> Path:
    """Where this process's records of a cell are until its results are there."""
    folder = matrix.output / cell.folder
    return folder.with_name(f".{folder.name}.{RECORDS}-{socket.gethostname()}-{os.getpid()}")


def _remove_left_records(ours: Path) -> None:
    """Remove what earlier processes on this machine left: this one's, and those of processes that are no more."""
    stem = ours.name.rpartition("-")[0]
    for left in ours.parent.glob(f"{stem}-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):  # of another user; of another name
            continue
    shutil.rmtree(ours, ignore_errors=True)


def _sharing(opened: Sequence[OpenedCell]) -> Iterator[list[OpenedCell]]:
    """Those that read the same windows, and the same keys or none."""
    groups: dict[Any, list[OpenedCell]] = {}
    keys: dict[int, Any] = {}
    # Cells without retrieval come last, to join one that reads keys.
    for cell, lm in sorted(opened, key=lambda one: isinstance(one.lm.scorer, LMScorer)):
        if lm.carry_state or lm.scorer.reads_all_first:
            yield [OpenedCell(cell, lm)]  # it reads in an order of its own, or all before it scores
            continue
        if isinstance(lm.scorer, LMScorer):
            key = keys.get(lm.context_len)
        else:
            # The module itself: it may go by several names.
            key = lm.language_model.key_type, lm.language_model.key_module
            keys.setdefault(lm.context_len, key)
        groups.setdefault((lm.context_len, key), []).append(OpenedCell(cell, lm))
    yield from groups.values()


def task_manager(cell: Cell, include_path: Sequence[str]) -> TaskManager:
    """Where lm-eval finds the cell's task; its own thousands of tasks are looked through only where they must be.

    For a group they must: its members may be among them.
    """
    task = cell.task_settings["task"]
    metadata = json.dumps(cell.lm_args | cell.task_settings["metadata"], sort_keys=True)
    for everywhere in (False, True):
        manager = _task_manager(metadata, tuple(include_path), everywhere)
        if task in (manager.all_tasks if everywhere else manager.all_subtasks):
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
    """Write what ``lm_eval --output_path FOLDER --log_samples`` writes, all at once, and tell of it."""
    folder = matrix.output / cell.folder
    samples = results.pop("samples")
    results["config"] |= _description(cell)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), str(folder)) as is_left:
        if finished_results(folder, cell.checksum()) is not None:
            return  # another benchmark of the same cell was faster
        with unfinished_folder(folder, is_left) as unfinished:
            save_as_lm_eval(EvaluationTracker(str(unfinished)), cell, results, samples)
            if (records := _unfinished_records(matrix, cell)).is_dir():
                os.replace(records, unfinished / RECORDS)
            if finished_results(unfinished, cell.checksum()) is None:  # lm-eval only warns
                raise UserError(f"The results of {cell} could not be written below {matrix.output}; is the disk full?")
    matrix.trackers.tell(cell, results, samples)


def _description(cell: Cell) -> dict[str, Any]:
    """What results say of their cell, in their configuration."""
    return {
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
