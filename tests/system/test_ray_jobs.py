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

folder, at_once = sys.argv[1], int(sys.argv[2]) or None
instead = str if sys.argv[3] == "instead" else None
jobs = {number: (folder, number) for number in range(4)}
needs = Needs(num_cpus=1)
found = run_jobs(Head("local"), work, jobs, needs, retries=1, then="the end", at_once=at_once, instead=instead)
found = dict(done for done in found if done is not None)
Path(folder, "found.json").write_text(json.dumps(found))  # what Ray prints comes between
"""


@pytest.mark.xdist_group("ray")  # one Ray at a time
@pytest.mark.parametrize(("at_once", "instead"), [(1, "instead"), (0, "instead"), (1, "none")])
def test_a_job_that_dies_again_and_again_is_told_or_ends_all(tmp_path: Path, at_once: int, instead: str) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(at_once), instead]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert len(list(tmp_path.glob("1.*.try"))) == 2, run.stderr
    if instead == "none":
        assert run.returncode == 1 and "UserError: A Ray task died on the node " in run.stderr, run.stderr
        return
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"0", "1", "2", "3"}
    assert found["1"].startswith("A Ray task died on the node ") and found["1"].endswith("; the end.")
    assert all(1 <= found[number] <= (at_once or 4) for number in ("0", "2", "3"))
