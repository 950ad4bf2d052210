"""A benchmark's cells spread: over shares for array jobs, and over the tasks of a Ray cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.benchmarks import METHODS, figures, matrix_of
from helpers.places import SCRIPTS
from helpers.ready import Ready, script
from hypothesis import given
from hypothesis import strategies as st

from knn_lm_eval.benchmark.cell import Cell
from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.benchmark.runner import run_matrix
from knn_lm_eval.benchmark.spreading import Share, parse_share, passes, share_of
from knn_lm_eval.errors import UserError

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])}


def some_cells(sizes: list[int]) -> Matrix:
    """A matrix of that many methods for each of several tasks."""
    cells = [
        Cell("m", None, f"method{number}", f"task{task}", "hf", {}, {"task": "t", "metadata": {}}, 0)
        for task, size in enumerate(sizes)
        for number in range(size)
    ]
    return Matrix(Path("output"), cells, 1, None, [])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 40))
def test_each_cell_is_in_one_share_and_passes_are_cut_only_where_they_must_be(sizes: list[int], shares: int) -> None:
    matrix = some_cells(sizes)
    parts = [share_of(matrix, Share(number, shares)).cells for number in range(1, shares + 1)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, matrix.cells))
    assert all(part == [cell for cell in matrix.cells if cell in part] for part in parts)  # in the matrix's order
    assert sum(bool(part) for part in parts) == min(shares, len(matrix.cells))
    if shares <= len(sizes):
        assert sum(len(passes(part)) for part in parts) == len(sizes)
        largest = sorted(map(len, parts))
        assert largest[-1] - largest[0] <= max(sizes)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "-1/4", "1/0", "a/b", "1/4/5", "1.5/4", "٣/٤", "1/9999999999"])
def test_what_is_no_share_is_said(text: str) -> None:
    with pytest.raises(UserError, match="is no share of the cells; give its number and how many there are: 3/16"):
        parse_share(text)
    assert parse_share(" 3/16 ") == Share(3, 16) and str(Share(3, 16)) == "3/16"


@pytest.fixture
def plain(content: dict, tmp_path: Path) -> Matrix:
    """The matrix, run by one process elsewhere."""
    content["tasks"] = {"law": {"limit": 3}, "choose": {"task": "local_choose"}}
    matrix = matrix_of(content | {"output": str(tmp_path / "plain")}, tmp_path)
    assert {outcome.state for outcome in run_matrix(matrix, lambda _: None)} == {"done"}
    matrix_of(content, tmp_path)  # the file that commands read
    return replace(matrix, output=Path(content["output"]))


def settled(folder: Path) -> dict:
    """A cell's results without times, dates, and what the process had to do and held."""
    (file,) = folder.glob("*/results_*.json")
    results = json.loads(file.read_text())
    for name in [name for name in results if name not in ("results", "configs", "versions", "n-samples", "config")]:
        del results[name]
    knn = results["config"].get("knn", {})
    for name in ("seconds", "memory"):
        knn.pop(name, None)
    knn.get("datastore", {}).pop("verified", None)  # by this process, or one before
    return results


def assert_equals_plain(matrix: Matrix, plain: Path) -> None:
    for cell in matrix.cells:
        assert figures(matrix.output / cell.folder) == figures(plain / cell.folder), cell
        ours, theirs = settled(matrix.output / cell.folder), settled(plain / cell.folder)
        assert ours == theirs, cell
    assert not list(matrix.output.rglob(".*"))


def started(folder: Path, *arguments: str) -> Ready:
    return Ready(script("benchmark", folder / "benchmark.yaml", *arguments), ENVIRONMENT)


def test_shares_side_by_side_give_what_one_process_gives(plain: Matrix, tmp_path: Path) -> None:
    jobs = [started(tmp_path, "--cells", f"{number}/3") for number in (1, 2, 3)]
    jobs.append(started(tmp_path, "--cells", "2/3"))  # a share twice at once does no harm
    ended = [job.completed() for job in jobs]
    assert [job.returncode for job in ended] == [0] * 4, ended
    assert sum(int(job.stdout.partition(": ")[2].partition(" of 6")[0]) for job in ended[:3]) == 6
    assert_equals_plain(plain, tmp_path / "plain")
    after = started(tmp_path, "--cells", "9/9").completed()
    assert after.returncode == 0 and "Share 9/9: 0 of 6 cells." in after.stdout, after.stderr
    assert "Of all shares' cells, 6 of 6 are there." in after.stdout
    assert {outcome.state for outcome in run_matrix(plain, lambda _: None)} == {"finished"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cells", "4/3"), "'4/3' is no share of the cells"),
        (("--workers", "2"), "--workers is for --ray"),
        (("--ray", "local", "--workers", "0"), "--workers 0 must be at least 1"),
    ],
)
def test_mistakes_are_said_in_one_sentence(content: dict, tmp_path: Path, arguments: tuple, message: str) -> None:
    matrix_of(content, tmp_path)
    run = started(tmp_path, *arguments).completed()
    assert run.returncode == 1 and message in run.stderr and run.stderr.count("\n") == 1, run.stderr


def is_at_work(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())  # before the job begins, and then
        return ("ray::Worker" in title or "_run_part" in title) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def killed_worker(driver: Ready, when: Callable[[], bool]) -> psutil.Process | None:
    while driver.poll() is None:
        children = psutil.Process(driver.pid).children(recursive=True) if when() else []
        if workers := [child for child in children if is_at_work(child)]:
            workers[0].send_signal(signal.SIGKILL)
            return workers[0]
        time.sleep(0.01)
    return None


@pytest.mark.xdist_group("ray")  # one Ray at a time
@pytest.mark.slow
def test_tasks_of_a_cluster_give_what_one_process_gives_also_where_one_is_killed(
    plain: Matrix, content: dict, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    file = tmp_path / "benchmark.yaml"
    methods = METHODS | {"greedy": {"k": 10**9}}
    file.write_text(yaml.safe_dump(content | {"methods": methods}, sort_keys=False))
    driver = started(tmp_path, "--ray", "local", "--workers", "2")
    assert killed_worker(driver, lambda: len(list(plain.output.rglob("results_*.json"))) > 0) is not None
    run = driver.completed()
    assert run.returncode == 1, run
    assert "6 of 8 cells are in" in run.stdout
    assert run.stdout.count(": done\n") + run.stdout.count(": finished\n") == 6
    failed = [line for line in run.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("greedy" in line and "does not fit the datastore" in line for line in failed)
    assert_equals_plain(plain, tmp_path / "plain")
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    again = started(tmp_path, "--ray", "local").completed()
    assert again.returncode == 0 and again.stdout.count(": finished\n") == 6, again.stderr


def test_a_node_that_does_not_see_a_path_says_which(plain: Matrix, tmp_path: Path) -> None:
    from knn_lm_eval.benchmark.ray_cells import _named_paths, _run_part

    plain.output.mkdir()
    named = _named_paths(plain)
    (datastore,) = {cell.args["datastore"] for cell in plain.cells if cell.datastore}
    assert {str(Path.cwd()), str(plain.output), datastore, str(tmp_path / "tasks")} <= set(named)
    became = _run_part(plain, os.getcwd(), [*named, "/elsewhere/store"])
    assert len(became) == len(plain.cells) and {state for state, _ in became} == {"failed"}
    sentence = "The node .* does not see /elsewhere/store: all nodes must see .* same paths"
    assert all(re.search(sentence, str(error)) for _, error in became)
