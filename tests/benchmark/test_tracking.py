"""wandb, trackio and the hub are told of cells as lm_eval tells them of its results; the results come first."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.benchmarks import matrix_of
from helpers.hub_server import TOKEN, Hub
from helpers.places import REPO
from lm_eval.config.evaluate_config import EvaluatorConfig

from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.benchmark.runner import finished_results, run_matrix
from knn_lm_eval.benchmark.tracking import Trackers
from knn_lm_eval.errors import UserError
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.settings import RetrievalSettings

PUSH = {"hub_results_org": "me", "push_results_to_hub": True, "push_samples_to_hub": True}


def run(matrix: Matrix) -> dict[str, str]:
    """What became of each cell."""
    return {str(outcome.cell): outcome.state for outcome in run_matrix(matrix, lambda outcome: None)}


class Told:
    """Stands for lm-eval's WandbLogger and TrackioLogger: notes what it is told, or fails."""

    calls: list[tuple[str, Any]] = []
    fails = False

    def __init__(self, init_args: dict[str, Any], config_args: dict[str, Any] | None = None) -> None:
        self.run = self
        self.calls.append(("init", (init_args, config_args)))

    def post_init(self, results: dict[str, Any]) -> None:
        if self.fails:
            raise RuntimeError("no network")
        self.calls.append(("results", results["results"]))

    def log_eval_result(self) -> None:
        self.calls.append(("log", None))

    def log_eval_samples(self, samples: dict[str, Any]) -> None:
        # In the form that lm-eval's loggers read.
        self.calls.append(("samples", {task: [one["arguments"][0] for one in of] for task, of in samples.items()}))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    import lm_eval.loggers

    monkeypatch.setattr(Told, "calls", [])
    for name in ("WandbLogger", "TrackioLogger"):
        monkeypatch.setattr(lm_eval.loggers, name, Told)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in ("wandb", "trackio") or found(name))
    return Told


@pytest.fixture
def one_cell(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"methods": {"base": {"model": "hf"}}, "tasks": {"law": {"limit": 2}}}


@pytest.mark.parametrize("tracker", ["wandb_args", "trackio_args"])
def test_a_cell_is_told_once_it_is_saved(one_cell, tracker: str, told: type[Told], tmp_path: Path) -> None:
    matrix = matrix_of(one_cell | {tracker: "project=knn,step=3"}, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    names, values = zip(*told.calls, strict=True)
    assert names == ("init", "results", "log", "samples", "finish")
    assert values[0][0] == {"name": "tiny x base x law", "project": "knn", "step": 3}
    assert values[1]["law"]["alias"] == "law" and len(values[3]["law"]) == 2
    assert set(run(matrix).values()) == {"finished"} and len(told.calls) == 5


def test_results_load_in_pandas_by_the_line_in_the_docs(
    one_cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = matrix_of(one_cell | {"methods": {"base": {"model": "hf"}, "knn": {"k": 8}}}, tmp_path)
    assert set(run(matrix).values()) == {"done"} and matrix.output == tmp_path / "results"
    page = (REPO / "docs" / "how-to" / "benchmark.md").read_text(encoding="utf-8")
    shown = page.partition("### In pandas\n\n```python\n")[2].partition("\n```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(shown, names)
    table = names["results"].set_index("config.benchmark.method")
    assert sorted(table.index) == ["base", "knn"] and table["config.knn.k"]["knn"] == 8
    files = {cell.method: next((matrix.output / cell.folder).glob("*/results_*.json")) for cell in matrix.cells}
    for method, file in files.items():
        expected = json.loads(file.read_text())["results"]["law"]["token_perplexity,none"]
        assert table["results.law.token_perplexity,none"][method] == expected


def test_the_file_for_lm_eval_in_the_docs_is_one_that_it_takes() -> None:
    page = (REPO / "docs" / "how-to" / "evaluate.md").read_text(encoding="utf-8")
    content = yaml.safe_load(page.partition('```yaml title="evaluation.yaml"\n')[2].partition("```")[0])
    config = EvaluatorConfig(**content)
    assert config.model == "knn-hf" and config.log_samples
    KNNHF.refuse_mistyped(config.model_args)
    settings, others = RetrievalSettings.take_from(config.model_args)
    assert settings.k == 1024 and others == {"max_length": 1024}


def test_where_telling_fails_the_results_are_kept(one_cell, told, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(told, "fails", True)
    matrix = matrix_of(one_cell | {"wandb_args": {"project": "knn", "name": "mine"}}, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    (cell,) = matrix.cells
    assert finished_results(matrix.output / cell.folder, cell.checksum()) is not None
    assert "tiny x base x law is saved, but wandb could not be told: RuntimeError: no network" in caplog.text
    assert [name for name, _ in told.calls] == ["init", "finish"] and told.calls[0][1][0]["name"] == "mine"


def test_who_is_told_is_none_of_the_results_business(one_cell, tmp_path: Path) -> None:
    first, second = (matrix_of(one_cell | more, tmp_path).cells for more in ({}, {"trackio_args": {"project": "x"}}))
    assert [cell.checksum() for cell in first] == [cell.checksum() for cell in second]


def test_the_hub_gets_results_and_samples(one_cell, hub: Hub, tmp_path: Path) -> None:
    matrix = matrix_of(one_cell | {"hf_hub_log_args": PUSH}, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    on_hub = hub.files("me/lm-eval-results-private")
    samples, results = (
        next(content for path, content in on_hub.items() if Path(path).name.startswith(name))
        for name in ("samples_law_", "results_")
    )
    assert json.loads(results)["config"]["benchmark"]["method"] == "base"
    assert len(samples.splitlines()) == 2 and b"law" in on_hub["README.md"]
    assert TOKEN.encode() not in b"".join(on_hub.values())


def test_why_the_hub_refuses_is_said(one_cell, hub: Hub, tmp_path: Path, caplog) -> None:
    hub.read_only.add(TOKEN)
    matrix = matrix_of(one_cell | {"hf_hub_log_args": PUSH}, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    said = "is saved, but the hub could not be told: HfHubHTTPError: 403 Forbidden: You don't have the rights to create"
    assert said in caplog.text


def test_what_the_hub_misses_is_said_though_it_has_the_rest(one_cell, hub: Hub, tmp_path: Path, caplog) -> None:
    hub.fail("hub POST .*/commit/main", status=500, times=1)
    matrix = matrix_of(one_cell | {"hf_hub_log_args": PUSH}, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    assert "is saved, but the hub could not be told: HfHubHTTPError: Server error '500" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wandb_args": 3}, "benchmark.yaml: wandb_args: 3 should be keys and values, or key=value,key=value."),
        ({"trackio_args": "project"}, "trackio_args: 'project' should be keys and values"),
        ({"hf_hub_log_args": {"token": "x"}}, "a token does not belong in a file; set HF_TOKEN."),
        ({"hf_hub_log_args": "hub_result_org=me"}, "unknown key 'hub_result_org'; did you mean hub_results_org?"),
        ({"wandb_arg": "project=x"}, "unknown key 'wandb_arg'; did you mean 'wandb_args'?"),
    ],
)
def test_mistakes_are_named(one_cell, tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        matrix_of(one_cell | given, tmp_path)
    assert message in str(error.value)


def test_what_is_missing_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^wandb_args needs the package wandb, which is not installed: pip install wan"):
        Trackers(wandb_args={"project": "x"}).check()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="for which HF_TOKEN has to be set"):
        Trackers(hf_hub_log_args=PUSH).check()
    monkeypatch.setenv("HF_TOKEN", "x")
    Trackers(hf_hub_log_args=PUSH).check()
    Trackers().check()
