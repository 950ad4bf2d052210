"""Ctrl-C and SIGTERM end a verb with one sentence, and with the status that shells expect."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A verb that is at work until it is interrupted.
WAITS = """
import argparse, time
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.system.files import finished_folder
from pathlib import Path
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
@verb(argparse.Namespace, kept=WITH_RESUME)
def main(arguments):
    with finished_folder(Path(sys.argv[1]) / "new") as folder:
        (folder / "half").write_text("half")
        print("at work", flush=True)
        time.sleep(60)
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_sentence_and_nothing_half(tmp_path: Path, number: int, status: int) -> None:
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    verb = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert verb.stdout is not None and verb.stdout.readline() == "at work\n"
    time.sleep(0.2)
    verb.send_signal(number)
    said = verb.communicate(timeout=60)[1]
    assert verb.returncode == status
    assert said.strip() == "interrupted: what is done is kept; go on with the same command and --resume."
    assert not list(tmp_path.iterdir())
