"""The classification tasks by which kNN-Prompt and knnlm-limits judge retrieval: rows from a local folder or the hub.

A local folder is laid out like the folder `data` of knnlm-limits. Each function returns rows of `text` (the prompt but
for its last words, which the task file has) and `label` (the number of the right choice).
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from knn_lm_eval.errors import UserError
from knn_lm_eval.tasks.corpora import HOW_TO_GIVE, data_folder

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# In order of preference, for each of the hub's splits: CB and RTE have labels in their validation files alone.
FILES = {"test": ("test", "val", "validation", "dev"), "validation": ("val", "validation", "dev", "test")}
SUFFIXES = (".jsonl", ".csv")
NEUTRAL_OF_FIVE = 3  # SST's five classes are 1 to 5
YAHOO_STEP = 20  # of 60,000 questions 3,000 are asked, as many as knnlm-limits draws


def sentences(
    folder: str, path: str | None = None, name: str | None = None, data_dir: object = None, **kwargs: Any
) -> dict[str, datasets.Dataset]:
    """Rows of a sentence and whether it is positive (or, of news, partisan)."""
    rows = _rows(folder, path, name, kwargs["split"], data_dir)
    return _dataset(kwargs["split"], _two_classes(rows, folder), folder)


def rte(folder: str, path: str, name: str, data_dir: object = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Premise, question; entailed or not."""

    def made(row: Row) -> Row:
        label = _label(row["label"], ["entailment", "not_entailment"])
        return {"text": f" {row['premise']}\nquestion: {row['hypothesis']}", "label": label}

    return _mapped(made, folder, path, name, kwargs["split"], data_dir)


def cb(folder: str, path: str, name: str, data_dir: object = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Premise, hypothesis; true, false or neither."""

    def made(row: Row) -> Row:
        label = _label(row["label"], ["entailment", "contradiction", "neutral"])
        return {"text": f"premise: {row['premise']}\nhypothesis: {row['hypothesis']}", "label": label}

    return _mapped(made, folder, path, name, kwargs["split"], data_dir)


def ag_news(folder: str, path: str, data_dir: object = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Title and summary of news; on the hub they are one text."""

    def made(row: Row) -> Row:
        if "Class Index" in row:
            text = f"title: {row['Title']}\nsummary: {row['Description']}"
            return {"text": text, "label": int(row["Class Index"]) - 1}
        return {"text": f"summary: {row['text']}", "label": int(row["label"])}

    return _mapped(made, folder, path, None, kwargs["split"], data_dir)


def yahoo(folder: str, path: str, data_dir: object = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """A question and its best answer; of the hub's test split every twentieth."""

    def made(row: Row) -> Row:
        return {"text": f"question: {row['question_title']}\nanswer: {row['best_answer']}", "label": int(row["topic"])}

    return _mapped(made, folder, path, None, kwargs["split"], data_dir, YAHOO_STEP)


def _mapped(
    made: Callable[[Row], Row], folder: str, path: str, name: str | None, split: str, data_dir: object, step: int = 1
) -> dict[str, datasets.Dataset]:
    rows = _rows(folder, path, name, split, data_dir, step)
    try:
        return _dataset(split, [made(row) for row in rows], folder)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the rows of {folder} are not what they should be: {type(error).__name__} {error}") from error


def _two_classes(rows: Sequence[Row], folder: str) -> list[Row]:
    """Of five classes the middle one is left out, as the papers do."""
    try:
        texts = [str(row.get("text", row.get("input"))).strip() for row in rows]
        labels = [_label(row.get("label", row.get("output")), ["negative", "positive"]) for row in rows]
    except (ValueError, TypeError) as error:
        raise UserError(f"a label of {folder} is not what it should be: {error}") from error
    if max(labels, default=0) <= 1:
        return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return [
        {"text": text, "label": int(label > NEUTRAL_OF_FIVE)}
        for text, label in zip(texts, labels, strict=True)
        if label != NEUTRAL_OF_FIVE
    ]


def _label(given: Any, names: Sequence[str]) -> int:
    """A class's number, from itself or its name; raises ValueError."""
    return names.index(given) if given in names else int(given)


def _dataset(split: str, rows: Sequence[Row], folder: str) -> dict[str, datasets.Dataset]:
    if not rows:
        raise UserError(f"{folder} has no rows")
    return {split: datasets.Dataset.from_list(list(rows))}


def _rows(
    folder: str, path: str | None, name: str | None, split: str, data_dir: object, step: int = 1
) -> Sequence[Row]:
    """The rows of the local folder, or of the hub's data set."""
    file = _local_file(folder, split, data_dir)
    if file is not None:
        logger.info("%s: reading %s", folder, file)
        return _read_rows(file)
    put = f"put knnlm-limits' folder data/{folder} into a folder and give that by {HOW_TO_GIVE}"
    if path is None:
        raise UserError(f"{folder} is not on the hub in a form that can be read: {put}")
    try:
        return list(datasets.load_dataset(path, name, split=split))[::step]
    except Exception as error:  # whatever the hub client raises, the way out is the same
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the data set {path} ({split}) could not be loaded ({type(error).__name__}: {reason}); without the hub, "
            f"{put}"
        ) from error


def _local_file(folder: str, split: str, data_dir: object) -> Path | None:
    """The corpus's file in the data folder; None where the hub is to be asked."""
    given = data_folder(data_dir)
    if given is None or not (given / folder).is_dir():
        return None
    for name in FILES[split]:
        for suffix in SUFFIXES:
            if (file := given / folder / f"{name}{suffix}").is_file():
                return file
    raise UserError(f"there is no test.jsonl, val.jsonl or dev.jsonl (or .csv) in {given / folder}")


def _read_rows(file: Path) -> list[Row]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                return list(csv.DictReader(lines))
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise UserError(f"{file} should have an object on each line, and has {str(wrong[0])[:60]}")
    return rows
