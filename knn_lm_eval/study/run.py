"""What studies of a text share: a ``knn-hf`` by its arguments, and lm-eval's tasks scored by a scorer of their own."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from torch import Tensor

from knn_lm_eval._startup import tasks_dir
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import Reading
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.scores import Score, sum_up
from knn_lm_eval.model.scoring import PassageScorer
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.joined import JoinedStore
from knn_lm_eval.system.files import replace_file

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BATCH_SIZE = 4  # windows
MAX_LENGTH = 1024  # tokens a window has at most, where nothing else is said and a study is of one long text


def load_knn_hf(
    model_args: dict[str, Any], most_tokens: int | None = None, excludes: bool = False, **settings: Any
) -> KNNHF:
    """``knn-hf`` with these arguments, and those that the study sets itself.

    Parameters
    ----------
    most_tokens : that a window has, unless ``model_args`` says how many; None is the model's limit.
    excludes : whether the study leaves neighbours out, too, where ``exclude_overlap`` is given; otherwise that raises
        UserError.
    """
    if not excludes and model_args.get("exclude_overlap") is not None:
        raise UserError("exclude_overlap is not for this study, which looks at all that searches find: leave it out.")
    lm = KNNHF(**{"batch_size": BATCH_SIZE} | model_args | settings)
    if most_tokens is not None and model_args.get("max_length") is None:
        lm.shorten_windows(most_tokens)
    return lm


def one_store(lm: KNNHF, study: str) -> Datastore:
    """The datastore of ``lm``; raises UserError where it has several, which ``study`` is not for."""
    store = lm.retriever.datastore
    if isinstance(store, JoinedStore):
        raise UserError(f"{study} is for one datastore, and {store.label} are several: name one of them.")
    return store


def first_tokens(lm: KNNHF, text: str, tokens: int | None) -> str:
    """The beginning of ``text`` that has so many tokens."""
    ids = lm.tok_encode(text)
    if tokens is None or len(ids) <= tokens:
        return text
    return lm.tokenizer.decode(ids[:tokens], skip_special_tokens=True)


def find_tasks(tasks: Sequence[str], model_args: dict[str, Any], metadata: dict[str, Any] | None) -> TaskManager:
    """Where lm-eval finds these tasks, which may ask for the model's arguments, and for ``metadata``.

    Its own thousands are looked through only where one is not ours: it takes seconds. (A group may have some of them.)
    """
    from lm_eval.tasks import TaskManager  # late: with it come data sets and metrics, which not every study needs

    asked = model_args | (metadata or {})
    ours = TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=asked)
    return ours if set(tasks) <= set(ours.all_subtasks) else TaskManager(metadata=asked)


def score_tasks(
    lm: KNNHF, scorer: PassageScorer, tasks: Sequence[Any], manager: TaskManager, limit: float | None = None
) -> None:
    """Have lm-eval evaluate the tasks (their names, or themselves), scored by ``scorer`` in place of ``lm``'s own."""
    with lm.scored_by(scorer):
        lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )


def scores_of_readings(readings: Sequence[Reading], log_probs: Tensor) -> list[list[Score]]:
    """The scores of what was read, from the log-probabilities of its tokens, ``[tokens]``.

    lm-eval's own report is of the base LM, whose scores a study's scorer returns; what was asked for, the study has.
    """
    parts = log_probs.split([sum(reading.lengths) for reading in readings])
    return [scores for reading, part in zip(readings, parts, strict=True) for scores in sum_up(reading, part)]


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
