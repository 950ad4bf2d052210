"""What is installed, where caches are, and what follows from what is missing."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.places import TASKS

from knn_lm_eval.cli.doctor import report
from knn_lm_eval.errors import EXTRAS, FEATURES, REQUIRED, missing_package
from knn_lm_eval.system import diagnosis, installation
from knn_lm_eval.system.caches import cache_folders, folder_bytes
from knn_lm_eval.system.diagnosis import faults
from knn_lm_eval.system.files import CACHE_VARIABLE
from knn_lm_eval.system.installation import ask, packages
from knn_lm_eval.system.machine import machine

GOOD: dict[str, dict[str, Any]] = {
    "torch": {"cuda": None, "hip": None, "threads": 2, "gpus": [], "mps": False},
    "faiss": {"options": ["OPTIMIZE", "AVX2"], "for_gpus": False, "gpus": 0, "threads": 2},
    "lm_eval": {"model": "knn_lm_eval.model.knn_hf.KNNHF", "tasks": True},
}


# --- Asking libraries ---------------------------------------------------------------------------------------


def answer_of(source: str) -> dict[str, Any]:
    """What a question says, asked within this process, which has imported the libraries already."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(source, {})
    return json.loads(said.getvalue())


def test_each_question_has_an_answer_of_the_form_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    only_ours = functools.partial(lm_eval.tasks.TaskManager, include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only_ours)  # all of lm-eval's own take seconds
    for name, source in diagnosis.QUESTIONS.items():
        assert answer_of(source).keys() == GOOD[name].keys()
    assert answer_of(installation.DISCOVERY) == GOOD["lm_eval"]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.abort()", f"died of {signal.SIGABRT.name} when it was imported"),
        ("raise SystemExit(3)", "exit status 3"),
        ("print('no JSON')", "exit status 0"),
        ("import sys; sys.exit('\\x1b[31m' + 400 * 'x')", "\\x1b[31m" + 292 * "x"),
    ],
)
def test_a_library_that_cannot_answer_is_told(source: str, fault: str) -> None:
    assert ask(source) == {"fault": fault}


def test_what_is_printed_before_the_answer_is_passed_over() -> None:
    assert ask("print('hello'); print('{\"a\": 1}')") == {"a": 1}


def test_a_library_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "SECONDS", 0.2)
    assert ask("import time; time.sleep(60)") == {"fault": "no answer in 0.2 seconds"}


# --- Packages -----------------------------------------------------------------------------------------------


def test_versions_are_those_installed() -> None:
    found = {package.module: package for package in packages()}
    assert found.keys() == EXTRAS.keys() | REQUIRED.keys()
    for module, name in REQUIRED.items():
        assert found[module].version == importlib.metadata.version(name)
        assert not found[module].fault and not found[module].extra
    assert found["faiss"].extra == "cpu or gpu" and found["faiss"].version is not None


def test_a_version_that_is_not_admitted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "lm_eval<0.1", "rich>=1", 'scipy>=999; extra == "test"', 'ray>=999; extra == "ray"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted if name == "knn-lm-eval" else None)
    found = {package.module: package.fault for package in packages()}
    assert {module: fault for module, fault in found.items() if fault} == {
        "numpy": "needs >=999",
        "lm_eval": "needs <0.1",
        "ray": "needs >=999",
    }


def test_without_a_record_of_this_package_any_version_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert not any(package.fault or package.needed for package in packages())


def test_a_package_whose_record_outlived_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    (peft,) = (package for package in packages() if package.module == "peft")
    assert (peft.version, peft.fault) == (None, "not installed")


def test_each_extra_has_what_it_is_for() -> None:
    assert FEATURES.keys() == EXTRAS.keys()


# --- Caches and the machine ---------------------------------------------------------------------------------


def test_caches_are_where_their_libraries_have_them() -> None:
    import datasets.config
    import lm_eval.caching.cache
    from huggingface_hub import constants

    ours, models, data, requests = cache_folders().values()
    assert str(ours) == os.environ[CACHE_VARIABLE]
    assert str(models) == constants.HF_HUB_CACHE
    assert data == Path(datasets.config.HF_DATASETS_CACHE)
    assert str(requests) == lm_eval.caching.cache.PATH


def test_variables_move_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert [str(folder) for folder in cache_folders().values()][:3] == [
        "/home/me/.cache/knn_lm_eval",
        "/home/me/.cache/huggingface/hub",
        "/home/me/.cache/huggingface/datasets",
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert str(list(cache_folders().values())[1]) == "/fast/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "~/hf")
    monkeypatch.setenv("HF_DATASETS_CACHE", "$HOME/data")
    assert [str(folder) for folder in cache_folders().values()][1:3] == ["/home/me/hf/hub", "/home/me/data"]


def test_a_file_counts_once(tmp_path: Path) -> None:
    assert folder_bytes(tmp_path / "nowhere") is None
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(b"a" * 1000)
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    os.link(tmp_path / "blobs" / "a", tmp_path / "snapshots" / "main" / "hard")
    target = "../../blobs/a"
    (tmp_path / "snapshots" / "main" / "soft").symlink_to(target)
    (tmp_path / "snapshots" / "loop").symlink_to("..")
    assert folder_bytes(tmp_path) == 1000 + len(target) + len("..")


def test_the_machine() -> None:
    found = machine()
    assert found["cpus"] and found["memory"] and found["available"]
    assert 0 < found["available"] <= found["memory"]


# --- What follows -------------------------------------------------------------------------------------------


def package(module: str, version: str | None = "1", extra: str = "", fault: str = "") -> dict[str, Any]:
    return {"module": module, "version": version, "needed": "", "extra": extra, "fault": fault}


ALL = [package("torch"), package("faiss", extra="cpu or gpu"), package("ray", extra="ray")]


def gone(module: str) -> list[dict[str, Any]]:
    return [one | {"version": None, "fault": "not installed"} if one["module"] == module else one for one in ALL]


@pytest.mark.parametrize(
    ("packages", "answers", "said"),
    [
        (ALL, GOOD, []),
        (gone("ray"), GOOD, []),
        (gone("faiss"), {"lm_eval": {"fault": "error: faiss, ..."}}, [str(missing_package("faiss"))]),
        (gone("torch"), {"lm_eval": {"fault": "No module named torch"}}, [str(missing_package("torch"))]),
        (
            [package("ray", "1.0", "ray", "needs >=2.40")],
            GOOD,
            ["ray 1.0 does not suit this version, which needs >=2.40."],
        ),
        (ALL, GOOD | {"faiss": {"fault": "died"}}, ["faiss is installed and cannot be used: died"]),
        (ALL, GOOD | {"lm_eval": {"fault": "KeyError"}}, ["lm_eval is installed and cannot be used: KeyError"]),
    ],
)
def test_what_keeps_an_evaluation_from_running(packages: list, answers: dict, said: list[str]) -> None:
    assert faults(packages, answers) == said


def test_tasks_that_are_not_found_are_a_fault() -> None:
    (said,) = faults(ALL, GOOD | {"lm_eval": GOOD["lm_eval"] | {"tasks": False}})
    assert said.startswith("lm-eval does not find the tasks, for which KNN_LM_EVAL_NO_HOOK=1 would be a reason")


@pytest.mark.parametrize("torch_fault", [False, True])
def test_the_report_shows_it(torch_fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "Tiny", "capability": "9.0", "free": 2**33, "total": 2**34}
    answers = {**GOOD, "torch": {"fault": "broken"} if torch_fault else GOOD["torch"] | {"cuda": "13.0", "gpus": [gpu]}}
    names = {source: name for name, source in diagnosis.QUESTIONS.items()}
    monkeypatch.setattr(installation, "ask", lambda source: answers[names[source]])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = diagnosis.examine()
    assert json.loads(json.dumps(found)) == found
    lines = report(found)
    assert "HF_HUB_OFFLINE=1" in lines
    if torch_fault:
        assert "  torch: broken" in lines
        assert lines[-1] == "FAULT: torch is installed and cannot be used: broken"
    else:
        assert "    cuda:0  Tiny, 16GiB (8GiB free), compute capability 9.0" in lines
        assert lines[-1] == "An evaluation with knn-hf can run."
