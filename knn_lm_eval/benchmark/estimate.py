"""What a benchmark will take: tokens to score, memory, and time, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import transformers
from accelerate import init_empty_weights

from knn_lm_eval.benchmark.cell import Cell
from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.benchmark.runner import finished_results, task_manager
from knn_lm_eval.errors import UserError
from knn_lm_eval.store.index_files import IndexFiles, searched_index
from knn_lm_eval.store.manifest import KEYS, Manifest
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.json_schema import Count, check_json


@dataclass
class Estimate:
    """One cell's share; None is unknown.

    Attributes
    ----------
    state : ``finished``, or ``to do``.
    tokens_read : of the task's texts (without the context that windows repeat); counted for each cell that shares
        the pass over them.
    seconds : for the cell alone.
    memory : bytes of the LM, and of index and values where there are some, in memory or mapped.
    measured : whether the seconds follow from finished cells of the same LM and method.
    """

    cell: Cell
    state: str
    tokens_read: int | None = None
    seconds: float | None = None
    memory: int | None = None
    measured: bool = False


class ModelSize(NamedTuple):
    """An LM's parameters, and their bytes."""

    parameters: int
    bytes: int


def estimate(matrix: Matrix) -> list[Estimate]:
    """An estimate of each cell.

    Time comes from finished cells of the same model and method where there are some, otherwise from the speed at
    which this machine multiplies matrices: two operations per parameter and token, searches left out.
    """
    estimator = _Estimator(matrix)
    return [estimator.estimate(cell) for cell in matrix.cells]


class _Estimator:
    """Looks at what several cells have in common once: their LM, their task, finished cells' speed."""

    def __init__(self, matrix: Matrix) -> None:
        self._include_path = matrix.include_path
        self._token_counts: dict[str, int | None] = {}  # by LM and task
        self._model_sizes: dict[str, ModelSize | None] = {}  # by LM
        self._speeds: dict[tuple[str, str], float] = {}  # tokens a second, by model and method
        self._finished: set[Path] = set()  # cells' folders
        for cell in matrix.cells:
            results = finished_results(matrix.output / cell.folder, cell.checksum())
            if results is None:
                continue
            self._finished.add(cell.folder)
            done = results["config"].get("knn", {})
            if done.get("tokens_scored") and (seconds := sum(done["seconds"].values())):
                self._speeds[cell.model, cell.method] = done["tokens_scored"] / seconds
        self._operations_a_second = matrix_product_speed()

    def estimate(self, cell: Cell) -> Estimate:
        """One cell's share."""
        size = self._model_size(cell)
        memory = _memory(cell, size)
        if cell.folder in self._finished:
            return Estimate(cell, "finished", memory=memory)
        tokens = self._tokens(cell)
        speed = self._speeds.get((cell.model, cell.method))
        seconds = None
        if tokens is not None and speed:
            seconds = tokens / speed
        elif tokens is not None and size is not None:
            seconds = 2 * size.parameters * tokens / self._operations_a_second
        measured = seconds is not None and bool(speed)
        return Estimate(cell, "to do", tokens, seconds, memory, measured)

    def _model_size(self, cell: Cell) -> ModelSize | None:
        lm = repr(cell.lm_args)
        if lm not in self._model_sizes:
            self._model_sizes[lm] = _model_size(cell.lm_args)
        return self._model_sizes[lm]

    def _tokens(self, cell: Cell) -> int | None:
        lm_and_task = repr((cell.lm_args, cell.task_settings))
        if lm_and_task not in self._token_counts:
            self._token_counts[lm_and_task] = _count_tokens(cell, self._include_path)
        return self._token_counts[lm_and_task]


def _count_tokens(cell: Cell, include_path: Sequence[str]) -> int | None:
    """Tokens that the LM reads for the task's requests; None where they cannot be counted."""
    settings = cell.task_settings
    try:
        args = cell.lm_args
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            args.get("tokenizer", args["pretrained"]),
            trust_remote_code=bool(args.get("trust_remote_code")),
            **{k: args[k] for k in ("gguf_file", "revision") if k in args},
        )
        tasks = task_manager(cell, include_path).load([settings["task"]])["tasks"].values()
        total = 0
        for task in tasks:
            if settings.get("num_fewshot") is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=settings["num_fewshot"])
            limit = settings.get("limit")
            if limit is not None and limit < 1:
                limit = int(len(task.eval_docs) * limit) or 1
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            for request in task.instances:
                texts = request.args[:2] if request.request_type == "loglikelihood" else request.args[:1]
                total += sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        return total
    except Exception:  # whatever is wrong with the task or the model, running the cell will say it better
        return None


def _model_size(args: dict[str, Any]) -> ModelSize | None:
    """From the model's configuration alone; None where that does not tell."""
    try:
        trust = bool(args.get("trust_remote_code"))
        config = transformers.AutoConfig.from_pretrained(
            args["pretrained"],
            revision=str(args.get("revision", "main")),
            gguf_file=args.get("gguf_file"),
            trust_remote_code=trust,
        )
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        dtype = args.get("dtype", "auto")
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        parameters = model.num_parameters()
        itemsize = (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)).itemsize
        return ModelSize(parameters, parameters * itemsize)
    except Exception:  # another kind of model, none at all, or no such dtype
        return None


class _Bytes(TypedDict):
    bytes: Count


class _IndexSizes(_Bytes, total=False):
    bytes_held: Count


def _memory(cell: Cell, size: ModelSize | None) -> int | None:
    """Bytes of the LM, the index and the values; None where one is unknown."""
    if size is None:
        return None
    total = size.bytes
    if "datastore" in cell.args:
        try:
            total += sum(_bytes_of_store(folder, cell.args.get("index")) for folder in cell.store_folders())
        except (UserError, OSError):
            return None
    return total


def _bytes_of_store(folder: Path, index: str | None) -> int:
    """Of values and index, or of the keys that are searched without one."""
    manifest = Manifest.read(folder)
    name = searched_index(folder, manifest.derived, index)
    if name is None:
        return 4 * manifest.count + (folder / KEYS).stat().st_size
    metadata = read_json(IndexFiles(folder, name).metadata)
    check_json(metadata, _IndexSizes, folder, "build the index again")
    return 4 * manifest.count + metadata["bytes"] + metadata.get("bytes_held", 0)


def matrix_product_speed() -> float:
    """Floating-point operations a second of this machine, or of its GPU, when it multiplies matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 768
    matrix = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
