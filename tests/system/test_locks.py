"""An output has one maker at a time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.locks import locked

# Adds 1 to a number in a file, again and again, each time by reading, pausing and writing.
COUNT = """
import sys, time
from pathlib import Path
from knn_lm_eval.system.locks import locked
folder = Path(sys.argv[1])
number = folder / "number"
for _ in range(20):
    with locked(folder / ".number.lock", "the number", seconds=60):
        was = int(number.read_text())
        time.sleep(0.002)
        number.write_text(str(was + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from knn_lm_eval.system.locks import locked
with locked(Path(sys.argv[1]) / ".lock", "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_at_a_time_and_no_file_is_left(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "60"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_who_waits_says_for_whom_and_not_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        began = time.monotonic()
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(UserError, match=rf"Process {holder.pid} on .* is at work on it, and was not done within"),
            locked(tmp_path / ".lock", "it", seconds=0.3),
        ):
            pass
        assert 0.3 <= time.monotonic() - began < 10
        assert f"Waiting for it: process {holder.pid} on " in caplog.text
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / ".lock").exists()  # a killed process holds nothing, whatever it left
    with locked(tmp_path / ".lock", "it", seconds=0):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / ".lock").exists()
