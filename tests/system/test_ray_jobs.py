"""Jobs on a Ray cluster: those that die again and again, and how many are under way at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, os, sys, time
from pathlib import Path
from knn_lm_eval.errors import UserError
from knn_lm_eval.system.ray_cluster import Head
from knn_lm_eval.system.ray_jobs import Needs, run_jobs

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

for case in sys.argv[2:]:  # all in one Ray
    at_once, instead = int(case[0]) or None, str if case.endswith("instead") else None
    folder = Path(sys.argv[1]) / case
    folder.mkdir()
    jobs = {number: (folder, number) for number in range(4)}
    needs = Needs(num_cpus=1)
    try:
        found = run_jobs(Head("local"), work, jobs, needs, retries=1, then="the end", at_once=at_once, instead=instead)
        found = dict(done for done in found if done is not None)
    except UserError as error:
        found = str(error)
    (folder / "found.json").write_text(json.dumps(found))  # what Ray prints comes between
"""
CASES = ["1 instead", "0 instead", "1 none"]  # how many at once, and what becomes of the one that dies


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What became of each case, in a folder of its name."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("jobs")
    run = subprocess.run([sys.executable, "-c", CHILD, folder, *CASES], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.xdist_group("ray")  # one Ray at a time
@pytest.mark.parametrize("case", CASES)
def test_a_job_that_dies_again_and_again_is_told_or_ends_all(done: Path, case: str) -> None:
    assert len(list((done / case).glob("1.*.try"))) == 2
    found = json.loads((done / case / "found.json").read_text())
    if case.endswith("none"):
        assert found.startswith("A Ray task died on the node ")
        return
    assert set(found) == {"0", "1", "2", "3"}
    assert found["1"].startswith("A Ray task died on the node ") and found["1"].endswith("; the end.")
    assert all(1 <= found[number] <= (int(case[0]) or 4) for number in ("0", "2", "3"))
