"""Jobs on a Ray cluster: those that die again and again, how many are under way at once, and workers that are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ray_here import two_nodes

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all
CHILD = """
import json, os, sys, time
from pathlib import Path
import psutil
from knn_lm_eval.errors import UserError
from knn_lm_eval.system.ray_cluster import Head
from knn_lm_eval.system.ray_jobs import Needs, kept_hands, run_jobs

def work(folder, number):
    folder = Path(folder)
    (folder / f"{number}.{time.time_ns()}.try").touch()
    if number == 1:
        os._exit(3)
    under_way = folder / f"{number}.busy"
    under_way.touch()
    time.sleep(0.3)
    most = len(list(folder.glob("*.busy")))
    under_way.unlink()
    return most

def process(_):
    time.sleep(0.3)
    return os.getpid()

head, folder, needs = Head(sys.argv[1]), Path(sys.argv[2]), Needs(num_cpus=1)

def results(function, jobs, **how):
    return dict(done for done in run_jobs(head, function, jobs, needs, **how) if done is not None)

for name, how in {
    "one at a time": {"at_once": 1, "instead": str},
    "side by side": {"instead": str},
    "none ends all": {"at_once": 1},
}.items():
    (folder / name).mkdir()
    try:
        jobs = {number: (folder / name, number) for number in range(4)}
        found = results(work, jobs, retries=1, then="the end", **how)
    except UserError as error:
        found = str(error)
    Path(folder, f"{name}.json").write_text(json.dumps(found))  # what Ray prints comes between

with kept_hands(head) as kept:
    pids = [list(results(process, dict.fromkeys(range(jobs), (0,)), kept=kept).values()) for jobs in (3, 2)]
until = time.monotonic() + 60
while (left := [pid for pid in {*pids[0]} if psutil.pid_exists(pid)]) and time.monotonic() < until:
    time.sleep(0.1)
Path(folder, "kept.json").write_text(json.dumps([pids, left]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a child tells what became of the jobs that it had done."""
    pytest.importorskip("ray", reason="needs Ray")
    folder = tmp_path_factory.mktemp("jobs")
    command = [sys.executable, "-c", CHILD, two_nodes.address, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize(("name", "at_once"), [("one at a time", 1), ("side by side", 4)])
def test_a_job_that_dies_again_and_again_is_told(told: Path, name: str, at_once: int) -> None:
    found = json.loads((told / f"{name}.json").read_text())
    assert len(list((told / name).glob("1.*.try"))) == 2
    assert set(found) == {"0", "1", "2", "3"}
    assert found["1"].startswith("A Ray task died on the node ") and found["1"].endswith("; the end.")
    assert all(1 <= found[number] <= at_once for number in ("0", "2", "3"))


def test_a_job_that_dies_again_and_again_ends_all(told: Path) -> None:
    name = "none ends all"
    assert len(list((told / name).glob("1.*.try"))) == 2
    assert json.loads((told / f"{name}.json").read_text()).startswith("A Ray task died on the node ")
    assert not list((told / name).glob("3.*.try"))


def test_kept_workers_do_one_job_after_the_other_and_end_with_the_list(told: Path) -> None:
    (first, second), left = json.loads((told / "kept.json").read_text())
    assert len(first) == 3 and len(set(first)) == 2  # as many as there are places
    assert len(second) == len(set(second)) == 2 and set(second) == set(first)
    assert not left
