"""The script for large datastores, at a thousandth of their size."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers.places import SCRIPTS
from helpers.programs import ready_command
from helpers.tiny_model import EVAL_TEXT

from knn_lm_eval.make.projecting import project_datastore
from knn_lm_eval.store.datastore import Datastore

STEPS = [
    "grow",
    "build_index",
    "verify",
    "kNN-LM, laying out codes",
    "kNN-LM",
    "cluster",
    "RetoMaton, laying out codes",
    "RetoMaton",
    "check",
]


@pytest.mark.parametrize(
    "entries, numbers, settings",
    [
        (100_000, 16, {}),
        # What has more than 2^31 entries at full size: tiny keys, an index in parts.
        (2_200_000, 1, {"FACTORY": "IVF256,PQ1", "PARTS": "3", "CLUSTERS": "300"}),
    ],
    ids=["large", "beyond-2^31"],
)
def test_all_that_is_done_with_a_large_store(
    store: Datastore, tmp_path: Path, entries: int, numbers: int, settings: dict[str, str]
) -> None:
    source = project_datastore(store, tmp_path / "source", numbers)
    text = tmp_path / "text.txt"
    text.write_text(EVAL_TEXT, encoding="utf-8")
    sizes = {"ENTRIES": str(entries), "MEMORY": "1GiB", "QUERIES": "64"}
    sizes |= {"TOKENS": "60", "REPEATS": "1", "MODEL_ARGS": "k=64"}
    command = ["bash", str(SCRIPTS / "large.sh"), str(tmp_path / "large"), str(text), str(source.path)]
    with ready_command() as folder:
        environment = os.environ | sizes | settings | {"PATH": f"{folder}:{os.environ['PATH']}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "large" / "large.md").read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == STEPS
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.splitlines() == table, "what is done is not done again"
