"""A small benchmark's methods, its file, and what its results must not depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from helpers.places import LOCAL_TASKS

from knn_lm_eval.benchmark.matrix import Matrix, read_matrix

CHOICES = LOCAL_TASKS / "choose.jsonl"
METHODS: dict[str, Any] = {
    "base": {"model": "hf"},
    "knn": {"k": 40, "lmbda": 0.6, "knn_temp": 2.0},
    "retomaton": {"k": 40, "lmbda": 0.6, "knn_temp": 2.0, "retomaton": True},
}


def matrix_of(content: dict[str, Any], folder: Path) -> Matrix:
    file = folder / "benchmark.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_matrix(file)


def figures(folder: Path) -> tuple[dict, list[dict]]:
    """What must not depend on how an evaluation came about: metrics, and the samples by document."""
    (file,) = folder.glob("*/results_*.json")
    results = json.loads(file.read_text())
    (samples,) = file.parent.glob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return results["results"], sorted(lines, key=lambda sample: sample["doc_id"])
