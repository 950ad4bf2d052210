"""What a benchmark will take: tokens to score, memory, and time, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from knn_lm_eval.benchmark.matrix import Cell, Matrix
from knn_lm_eval.benchmark.runner import finished_results, task_manager
from knn_lm_eval.errors import UserError
from knn_lm_eval.store.index_files import DEFAULT_INDEX, IndexFiles
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.system.files import read_json


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


def estimate(matrix: Matrix) -> list[Estimate]:
    """An estimate of each cell.

    Time comes from finished cells of the same model and method where there are some, otherwise from the speed at
    which this machine multiplies matrices: two operations per parameter and token, searches left out.
    """
    counts: dict[str, int | None] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    speeds: dict[tuple[str, str], float] = {}
    finished = {}
    for cell in matrix.cells:
        results = finished_results(matrix.output / cell.folder, cell.checksum())
        if results is not None:
            finished[cell.folder] = results
            done = results["config"].get("knn", {})
            if done.get("tokens_scored") and (spent := sum(done["seconds"].values())):
                speeds[cell.model, cell.method] = done["tokens_scored"] / spent
    flops = _matrix_product_speed()
    estimates = []
    for cell in matrix.cells:
        lm, of_task = repr(cell.lm_args), repr((cell.lm_args, cell.task_settings))
        if lm not in sizes:
            sizes[lm] = _model_size(cell.lm_args)
        one = Estimate(cell, "finished" if cell.folder in finished else "to do", memory=_memory(cell, sizes[lm]))
        if cell.folder not in finished:
            if of_task not in counts:
                counts[of_task] = _count_tokens(cell, matrix.include_path)
            one.tokens_read, size = counts[of_task], sizes[lm]
            if one.tokens_read is not None and (speed := speeds.get((cell.model, cell.method))):
                one.seconds, one.measured = one.tokens_read / speed, True
            elif one.tokens_read is not None and size is not None:
                one.seconds = 2 * size[0] * one.tokens_read / flops
        estimates.append(one)
    return estimates


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


def _model_size(args: dict[str, Any]) -> tuple[int, int] | None:
    """The model's parameters and their bytes, from its configuration alone; None where that does not tell."""
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
        return parameters, parameters * (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)).itemsize
    except Exception:  # another kind of model, none at all, or no such dtype
        return None


def _memory(cell: Cell, size: tuple[int, int] | None) -> int | None:
    if size is None:
        return None
    total = size[1]
    if "datastore" in cell.args:
        folder = Path(cell.args["datastore"])
        try:
            index = read_json(IndexFiles(folder, cell.args.get("index", DEFAULT_INDEX)).metadata)
            total += int(index["bytes"]) + int(index.get("bytes_held", 0)) + 4 * Manifest.read(folder).count
        except (UserError, OSError, KeyError):
            return None
    return total


def _matrix_product_speed() -> float:
    """Floating-point operations a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 768
    matrix = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
