"""What studies of a text share: a ``knn-hf`` by its arguments, and lm-eval's tasks scored by a scorer of their own."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.scoring import Scorer
from knn_lm_eval.system.files import replace_file

BATCH_SIZE = 4  # windows
MAX_LENGTH = 1024  # tokens a window has at most, where nothing else is said and a study is of one long text


def load_knn_hf(model_args: dict[str, Any], **settings: Any) -> KNNHF:
    """``knn-hf`` with these arguments, and those that the study sets itself."""
    return KNNHF(**{"batch_size": BATCH_SIZE} | model_args | settings)


def find_tasks(model_args: dict[str, Any], metadata: dict[str, Any] | None) -> TaskManager:
    """Where lm-eval finds its tasks; they may ask for the model's arguments, and for ``metadata``."""
    return TaskManager(metadata=model_args | (metadata or {}))


def score_tasks(
    lm: KNNHF, scorer: Scorer, tasks: Sequence[Any], manager: TaskManager, limit: float | None = None
) -> None:
    """Have lm-eval evaluate the tasks (their names, or themselves), scored by ``scorer`` in place of ``lm``'s own."""
    lm.scorer = scorer
    lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )


def perplexity(log_prob: float, tokens: int) -> float:
    """Per token, from the sum of their log-probabilities."""
    return math.exp(-log_prob / tokens)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same columns, all at once."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    replace_file(temporary, path)
