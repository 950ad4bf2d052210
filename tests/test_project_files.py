"""What stands beside the code for those who contribute, release and cite: workflows, pre-commit, CITATION.cff."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers.places import REPO

from knn_lm_eval.version import __version__

WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
CITATION = REPO / "CITATION.cff"
# What a command names of the repository: a path with a slash, or a file at its top.
PATHS = re.compile(r"(?<![\w./*-])(?:(?:scripts|tests|docs|knn_lm_eval)/[\w./-]+|[\w-]+\.(?:txt|toml|yml|cff|md))")
LOCAL_WORKFLOW = re.compile(r"^\./(.+)$")


def read(path: Any) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            yield f"{path.name}: {name}", job


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, job in jobs():
        for step in job.get("steps", ()):
            yield name, step


def missing_files(text: str) -> list[str]:
    """What a command names of the repository and is not there."""
    return [name for name in PATHS.findall(text) if not (REPO / name).exists()]


def test_the_workflows_are_there_and_have_steps() -> None:
    assert [path.name for path in WORKFLOWS] == ["package.yml", "release.yml", "tests.yml"]
    for name, job in jobs():
        if "uses" in job:
            assert (REPO / LOCAL_WORKFLOW.match(job["uses"])[1]).is_file(), name
        else:
            assert job["runs-on"] and job["timeout-minutes"] and job["steps"], name
    for name, step in steps():
        assert ("run" in step) != ("uses" in step), name
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"]), name


def test_the_commands_name_files_that_are_there() -> None:
    named = 0
    for name, step in steps():
        text = step.get("run", "") + "\n" + str(step.get("with", {}).get("cache-dependency-path", ""))
        assert not missing_files(text), name
        named += len(PATHS.findall(text))
    assert named >= 8


def test_files_that_are_gone_are_found() -> None:
    text = (
        "bash scripts/run_tests.sh && pip install -c constraints.txt; pytest tests/test_gone.py -c gone.txt dist/*.whl"
    )
    assert missing_files(text) == ["tests/test_gone.py", "gone.txt"]


def test_all_pythons_that_are_admitted_are_tested() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = dict(jobs())["tests.yml: tests"]["strategy"]["matrix"]["python"]
    assert pythons == dict(jobs())["package.yml: install"]["strategy"]["matrix"]["python"]
    assert f">={pythons[0]}" == project["requires-python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    named = [one.removeprefix("Programming Language :: Python :: ") for one in project["classifiers"]]
    assert [one for one in named if one.startswith("3.")] == pythons


def test_only_publishing_may_ask_for_a_token() -> None:
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}, path
    asking = {name: job["permissions"] for name, job in jobs() if "permissions" in job}
    assert asking == {"release.yml: publish": {"id-token": "write"}}
    publish = dict(jobs())["release.yml: publish"]
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "password" not in str(publish) and publish["environment"]["name"] == "pypi"


def test_pre_commit_runs_the_checks_of_the_tests_run() -> None:
    script = (REPO / "scripts" / "run_tests.sh").read_text(encoding="utf-8")
    checks = re.findall(r"^ *((?:ruff|mypy|lint-imports).*)$", script, flags=re.MULTILINE)
    (repo,) = read(REPO / ".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == checks
    assert len(checks) == 4 and all(hook["language"] == "system" for hook in repo["hooks"])


def test_the_citation_is_of_this_version_and_of_the_papers_that_the_docs_name() -> None:
    citation = read(CITATION)
    assert citation["version"] == __version__ and citation["license"] == "MIT"
    page = (REPO / "docs" / "reference" / "citing.md").read_text(encoding="utf-8")
    assert f"version={{{__version__}}}" in page
    named = re.findall(r"url=\{(.*?)\}", page)
    assert [paper["url"] for paper in citation["references"]] == named
    arguments = (REPO / "docs" / "reference" / "arguments.md").read_text(encoding="utf-8")
    assert len(named) == 3 and all(f"<{url}>" in arguments for url in named)
