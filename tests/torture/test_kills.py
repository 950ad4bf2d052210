"""SIGKILL before any change of the disk, in every command that makes something: nothing is lost, and it goes on.

After each kill the store that a command works on is whole, the documented option (or the same command) finishes, and
the result is the same as undisturbed. In the ordinary run each command is killed at a few of its changes; with
KNN_LM_EVAL_KILL_STEP=1 at every one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers.forks import Child, Ended, run_verb

from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import Manifest, file_record

STEP = int(os.environ.get("KNN_LM_EVAL_KILL_STEP", "0"))
MOST_CHANGES = 500
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass
class Command:
    """A verb's arguments, in which HERE, MODEL and ADDRESS stand for what they say, and how it goes on."""

    verb: str
    arguments: str
    go_on: list[str] = field(default_factory=list)
    step: int = 1  # of the changes, every so many where each is asked for: an evaluation takes seconds
    constants: dict[str, int] = field(default_factory=dict)  # of modules, so that little data comes in several pieces

    def work(self, here: Path, model: Path, *more: str) -> Callable[[], object]:
        address = (here / "address").read_text()
        text = self.arguments.replace("HERE", str(here)).replace("MODEL", str(model)).replace("ADDRESS", address)
        return run_verb(self.verb, *text.split(), *more)


DUMP = "--model_args pretrained=MODEL,dtype=float32 --text HERE/train.txt --max_tokens 400 --output HERE/new"
INDEX = "--datastore HERE/store --factory IVF4,SQ8 --name other --quality_queries 0"
SEGMENTS = {"store.key_stream.ADD_CHUNK": 64, "search.index_memory.MOST_IN_SEGMENT": 128}
DUMPED_SEGMENTS = {"store.key_stream.ADD_CHUNK": 64, "make.index_dump.SEGMENT_ENTRIES": 128}
SUFFIXES = "--datastore HERE/store"
CLUSTERS = "--datastore HERE/store --method kmeans --num_clusters 9 --iterations 3"
PARTS = {"make.suffix_building.BASE_BYTES": 2**30 - 5000 * 12}
MODEL = "--model_args pretrained=MODEL,max_length=64,datastore=HERE/store --metadata data_dir=HERE/data"
COMMANDS = {
    "dump": Command("dump_datastore", DUMP, ["--resume"]),
    "dump into an index": Command(
        "dump_datastore", DUMP + " --keys none --factory IVF4,SQ8", ["--resume"], constants=DUMPED_SEGMENTS
    ),
    "dump of fewer numbers": Command("dump_datastore", DUMP + " --keys 8", ["--resume"]),
    "index": Command("build_index", INDEX, ["--resume"]),
    "index in parts": Command("build_index", INDEX + " --parts 3", ["--resume"]),
    "index in segments": Command("build_index", INDEX, ["--resume"], constants=SEGMENTS),
    "index in parts of segments": Command("build_index", INDEX + " --parts 2", ["--resume"], constants=SEGMENTS),
    "index again": Command("build_index", INDEX.replace("other", "index") + " --overwrite", ["--resume"]),
    "clusters": Command("cluster_datastore", f"{CLUSTERS} --name other", ["--resume"]),
    "clusters again": Command("cluster_datastore", f"{CLUSTERS} --overwrite", ["--resume"]),
    "suffixes": Command("build_suffix_array", f"{SUFFIXES} --memory 1GiB", ["--resume"], constants=PARTS),
    "suffixes again": Command("build_suffix_array", f"{SUFFIXES} --overwrite", ["--resume"]),
    "prune random": Command("prune_datastore", "--datastore HERE/store --method random --keep 0.5 --output HERE/new"),
    "prune confidence": Command(
        "prune_datastore", "--datastore HERE/store --method confidence --keep 0.5 --output HERE/new --device cpu"
    ),
    "prune merging": Command(
        "prune_datastore", "--datastore HERE/store --method greedy_merge --output HERE/new", ["--resume"]
    ),
    "import": Command("import_datastore", "HERE/theirs --output HERE/new"),
    "import copy": Command("import_datastore", "HERE/theirs --output HERE/new --copy"),
    "fetch": Command("fetch_datastore", "ADDRESS --output HERE/new"),
    "grow": Command("grow_datastore", "HERE/store --entries 6000 --output HERE/new"),
    "project": Command("project_datastore", "--datastore HERE/store --keys 8 --output HERE/new"),
    "append": Command("append_datastore", "--datastore HERE/store --text HERE/more.txt --device cpu", ["--resume"], 2),
    "append without keys": Command(
        "append_datastore",
        "--datastore HERE/keyless --text HERE/more.txt --device cpu",
        ["--resume"],
        2,
        constants=DUMPED_SEGMENTS,
    ),
    "clusters without keys": Command("cluster_datastore", CLUSTERS.replace("HERE/store", "HERE/keyless"), ["--resume"]),
    "remove": Command("remove_documents", "--datastore HERE/store --documents 0"),
    "compact": Command("compact_datastore", "--datastore HERE/lessened", step=2),
    "tune": Command(
        "tune",
        MODEL + " --tasks law_valid --limit 2 --k 4,8 --knn_temp 1,4 --lmbda 0.2,0.5 --output HERE/new/tuned.json",
        step=5,
    ),
    "benchmark": Command("benchmark", "HERE/matrix.yaml"),
    "reproduce": Command("reproduce", "HERE/recipe.yaml --output HERE/new", step=9),
}


STORES = ("store", "lessened", "keyless")
CHANGES = ("append", "remove")  # what a store itself has


def store_is_whole(store: Path) -> None:
    """The store's own files are what its manifest says, and so are those derived from it that it names."""
    manifest = Manifest.read(store)
    for name, record in (manifest.files | manifest.derived).items():
        assert file_record(store / name) == record, name
    Datastore.open(store)


def finished(ended: Ended) -> None:
    assert ended.status == 0 and "Traceback" not in ended.said, ended.said[-3000:]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed(
    name: str,
    anew: Callable[[], Path],
    content: Callable[[Path], dict[str, Any]],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, here = COMMANDS[name], anew()
    for constant, value in command.constants.items():
        monkeypatch.setattr(f"knn_lm_eval.{constant}", value)  # the children are forks
    own = {path.name: path.read_bytes() for path in (here / "store").glob("*.npy")}
    finished(Child(command.work(here, model_folder), here).ended())
    expected, kills, at = content(here), 0, STEP * command.step or 4
    while True:
        anew()
        ended = Child(command.work(here, model_folder), here, at).ended()
        for store in STORES:
            store_is_whole(here / store)
        if ended.status != -9:
            finished(ended)
            assert content(here) == expected
            break
        kills += 1
        again = Child(command.work(here, model_folder, *command.go_on), here).ended()
        if again.status != 0:  # it was finished
            assert (
                "exist already" in again.complaint
                or "exists already" in again.complaint
                or ("already holds a finished" in again.complaint)
            ), f"killed at {at}: {again.said[-3000:]}"
        now = content(here)
        assert now == expected, f"killed at {at}: {difference(now, expected)}"
        if name not in CHANGES:
            assert {path: (here / "store" / path).read_bytes() for path in own} == own
        for store in STORES:
            store_is_whole(here / store)
        at += STEP * command.step or 6 + at
        assert at < MOST_CHANGES
    if report := os.environ.get("KNN_LM_EVAL_TORTURE_REPORT"):
        with open(report, "a") as file:
            file.write(json.dumps({"command": name, "kills": kills}) + "\n")
    assert kills >= 1


def difference(now: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {path: (now.get(path), expected.get(path)) for path in now | expected if now.get(path) != expected.get(path)}
