"""A small benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.benchmarks import CHOICES, METHODS
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH

from knn_lm_eval import Datastore


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second


@pytest.fixture
def content(quick: None, store: Datastore, model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A matrix of three methods and two tasks."""
    law = tmp_path / "data" / "law"
    law.mkdir(parents=True)
    words = EVAL_TEXT.split()
    sentences = [" ".join(words[start : start + 12]) for start in range(0, len(words), 12)]
    (law / "test.en").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = yaml.safe_load((CHOICES.parent / "choose.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(CHOICES)
    (tasks / "choose.yaml").write_text(yaml.safe_dump(task))
    return {
        "output": str(tmp_path / "results"),
        "batch_size": 3,
        "device": "cpu",
        "include_path": str(tasks),
        "metadata": {"data_dir": str(tmp_path / "data")},
        "models": {"tiny": {"pretrained": str(model_folder), "max_length": MAX_LENGTH}},
        "datastores": {"topics": str(store.path)},
        "methods": METHODS,
        "tasks": {"law": {"limit": 5}, "choose": {"task": "local_choose"}},
    }
