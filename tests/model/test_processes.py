"""Several processes share an evaluation's requests and give what one process gives."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.places import LOCAL_TASKS
from helpers.programs import lm_eval_command
from helpers.ready import Ready, launch
from helpers.tiny_model import TRAIN_TEXT

from knn_lm_eval import Datastore
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.search.indexing import build_index


def evaluate(processes: int, store: Datastore, data: Path, output: Path) -> tuple[dict, dict[str, list]]:
    """The results and, by task, each document's responses."""
    model_args = f"datastore={store.path},k=40,lmbda=0.5,retomaton=True,min_knns=2"
    arguments = ["--model", "knn-hf", "--model_args", model_args, "--metadata", f"data_dir={data}"]
    arguments += ["--tasks", "law,local_choose,local_go_on", "--batch_size", "2", "--include_path", LOCAL_TASKS]
    command = lm_eval_command(*arguments, "--output_path", output, "--log_samples")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = [Ready(command, environment)] if processes == 1 else launch(command, processes, environment)
    for process in started:
        done = process.completed()
        assert done.returncode == 0, done.stderr
    (results,) = output.rglob("results_*.json")
    samples: dict[str, list] = {}
    for file in output.rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[file.name.rpartition("_")[0]] = [(row["doc_id"], row["filtered_resps"]) for row in rows]
    return json.loads(results.read_text()), samples


@pytest.fixture
def stores_without_codes(store: Datastore, tmp_path: Path) -> list[Datastore]:
    """Two alike, on which RetoMaton has not run yet: the first to do so lays codes out, each process it might be."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(store.path, first, ignore=shutil.ignore_patterns("*.codes"))
    build_index(Datastore.open(first), "IVF16,PQ8", overwrite=True, quality_queries=0)
    shutil.copytree(first, second)
    return [Datastore.open(first), Datastore.open(second)]


def test_two_processes_give_what_one_gives(
    stores_without_codes: list[Datastore], lm: CausalHFLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(LOCAL_TASKS)  # the task files name their data by relative paths
    # Five texts and four questions: the processes have different numbers of them.
    (tmp_path / "law").mkdir()
    lines = [TRAIN_TEXT[start : start + 90 + start // 10].replace("\n", " ") for start in range(0, 2500, 500)]
    (tmp_path / "law" / "test.en").write_text("\n".join(lines) + "\n", encoding="utf-8")
    alone, samples_alone = evaluate(1, stores_without_codes[0], tmp_path, tmp_path / "one")
    together, samples_together = evaluate(2, stores_without_codes[1], tmp_path, tmp_path / "two")
    assert all((store.path / "index.codes").is_dir() for store in stores_without_codes)
    assert set(samples_alone) == set(samples_together)
    for task, rows in samples_alone.items():
        assert [number for number, _ in rows] == [number for number, _ in samples_together[task]]
    assert alone["n-samples"] == together["n-samples"]
    for task, metrics in alone["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert together["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    one, two = alone["config"]["knn"], together["config"]["knn"]
    assert two["processes"] == 2
    # lm-eval has the second process, with two texts of the five, score its last one again.
    assert two["tokens_scored"] == one["tokens_scored"] + len(lm.tok_encode(lines[3]))
    for count in ("searches", "entries_compared", "positions_generated"):
        assert one[count] <= two[count] < 1.5 * one[count], count
    assert two["saved_searches"] == pytest.approx(one["saved_searches"], rel=0.2)
    assert two["seconds"].keys() == one["seconds"].keys()
