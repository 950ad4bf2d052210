"""``lm_eval --hf_hub_log_args`` with knn-hf, as a command: what the hub has of the results afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers.forks import Child, Ended
from helpers.hub_server import TOKEN, Hub
from helpers.places import TASKS
from helpers.tiny_model import EVAL_TEXT
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

from knn_lm_eval.store.datastore import Datastore

PUSH = "hub_results_org=me,push_results_to_hub=True,push_samples_to_hub=True"
REPO = "me/lm-eval-results-private"


@pytest.fixture
def evaluate(
    hub: Hub, store: Datastore, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Ended]:
    """Runs the command on two sentences, with a model and a token that are the hub's."""
    hub.add_model("org/tiny", model_folder)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # seconds
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "test.en").write_text(f"{EVAL_TEXT[:200]}\n{EVAL_TEXT[200:400]}\n", encoding="utf-8")
    command = [
        *("lm_eval", "run", "--model", "knn-hf", "--tasks", "law", "--device", "cpu", "--batch_size", "2"),
        *("--model_args", f"pretrained=org/tiny,datastore={store.path},k=8,max_length=64,dtype=float32"),
        *("--include_path", str(TASKS), "--metadata", json.dumps({"data_dir": str(tmp_path)})),
        *("--output_path", str(tmp_path / "results"), "--log_samples", "--hf_hub_log_args", PUSH),
    ]

    def run() -> Ended:
        monkeypatch.setattr("sys.argv", command)
        return Child(cli_evaluate, tmp_path).ended()

    return run


def test_the_hub_gets_results_and_samples(evaluate: Callable[[], Ended], hub: Hub, tmp_path: Path) -> None:
    ended = evaluate()
    assert ended.status == 0, ended.said
    assert hub.dataset(REPO).private
    on_hub, here = hub.files(REPO), tmp_path / "results" / "org__tiny"
    (results,), (samples,) = here.glob("results_*.json"), here.glob("samples_law_*.jsonl")
    # Results stand under the model's name, samples under what a folder here can be called.
    assert results.read_bytes() == on_hub[f"org/tiny/{results.name}"] == on_hub[f"org__tiny/{results.name}"]
    assert samples.read_bytes() == on_hub[f"org__tiny/{samples.name}"]
    assert json.loads(results.read_bytes())["config"]["knn"]["k"] == 8 and len(samples.read_text().splitlines()) == 2
    card = yaml.safe_load(on_hub["README.md"].decode().split("---\n")[1])
    assert [one["config_name"] for one in card["configs"]] == ["org__tiny__law"]
    assert TOKEN.encode() not in b"".join(on_hub.values())


def test_a_token_that_may_not_write_leaves_the_results_here(
    evaluate: Callable[[], Ended], hub: Hub, tmp_path: Path
) -> None:
    hub.read_only.add(TOKEN)
    ended = evaluate()
    assert ended.status == 1 and ("datasets", REPO) not in hub.repos
    assert "403 Forbidden: You don't have the rights to create a dataset under the namespace 'me'" in ended.said
    assert "Make sure your token has the correct permissions." in ended.said
    here = tmp_path / "results" / "org__tiny"
    assert [*here.glob("results_*.json")] and [*here.glob("samples_law_*.jsonl")]
