"""Two commands at once on one output or one store: each ends well or with one sentence, and nothing is damaged.

In the ordinary run each cheap pair starts once, and with KNN_LM_EVAL_PAIRS=10 every pair ten times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.forks import Child, Ended, run_verb
from lm_eval.api.instance import Instance

from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.search.faiss_index import open_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import index_names
from knn_lm_eval.store.manifest import Manifest, file_record

TIMES = int(os.environ.get("KNN_LM_EVAL_PAIRS", "0"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

DUMP = "dump_datastore --model_args pretrained=MODEL,dtype=float32 --text HERE/train.txt --max_tokens 400"
DUMP += " --output HERE/new"
INDEX = "build_index --datastore HERE/store --factory IVF4,SQ8 --quality_queries 0 --name"
CLUSTERS = "cluster_datastore --datastore HERE/store --method kmeans --num_clusters 9 --iterations 3 --name"
SUFFIXES = "build_suffix_array --datastore HERE/store"
PRUNE = "prune_datastore --datastore HERE/store --output HERE/new --method"
FETCH = "fetch_datastore ADDRESS --output HERE/new"
TUNE = "tune --model_args pretrained=MODEL,max_length=64,datastore=HERE/store --metadata data_dir=HERE/data --limit 2"
TUNE += " --tasks law_valid --k 4,8 --knn_temp 1,4 --lmbda 0.2,0.5 --output HERE/new/tuned.json --save_default"
APPEND = "append_datastore --datastore HERE/store --text HERE/more.txt --device cpu"
EVALUATE = "pretrained=MODEL,max_length=64,datastore=HERE/store,k=20,lmbda=0.5"
# Two commands, and whether both must end well: they do not make the same thing, or the second finds it made.
PAIRS: dict[str, tuple[str, str, bool]] = {
    "dump, dump": (DUMP, f"{DUMP} --resume", False),
    "dumps resumed": (f"{DUMP} --resume", f"{DUMP} --resume", False),
    "import, import": ("import_datastore HERE/theirs --output HERE/new",) * 2 + (False,),
    "prune, prune": (f"{PRUNE} random --keep 0.5",) * 2 + (False,),
    "merge, merge": (f"{PRUNE} greedy_merge",) * 2 + (False,),
    "confidence twice": (
        f"{PRUNE} confidence --keep 0.5 --device cpu",
        f"{PRUNE} confidence --keep 0.5 --device cpu".replace("HERE/new", "HERE/two"),
        True,
    ),
    "index a, index b": (f"{INDEX} a", f"{INDEX} b", True),
    "index a, index a": (f"{INDEX} a", f"{INDEX} a", False),
    "clusters a, clusters b": (f"{CLUSTERS} a", f"{CLUSTERS} b", True),
    "clusters a, index b": (f"{CLUSTERS} a", f"{INDEX} b", True),
    "suffixes, suffixes": (SUFFIXES, SUFFIXES, False),
    "suffixes, index b": (SUFFIXES, f"{INDEX} b", True),
    "fetch, fetch": (FETCH, FETCH, True),
    "benchmark, benchmark": ("benchmark HERE/matrix.yaml",) * 2 + (True,),
    "tune, tune": (TUNE, TUNE, False),
    "codes, codes": (f"EVALUATE {EVALUATE},retomaton=True",) * 2 + (True,),
    "remove, remove": ("remove_documents --datastore HERE/store --documents 0",) * 2 + (True,),
    "remove, compact": (
        "remove_documents --datastore HERE/lessened --documents 1",
        "compact_datastore --datastore HERE/lessened",
        False,
    ),
    "compact, compact": ("compact_datastore --datastore HERE/lessened",) * 2 + (True,),
    "append, append": (APPEND, f"{APPEND} --resume", False),
    "append, index b": (APPEND, f"{INDEX} b", False),
    "index replaced, evaluation": (f"{INDEX} index --overwrite", f"EVALUATE {EVALUATE}", False),
}
# Which of them is first decides what there is in the end: of the others that is always the same.
EITHER = ("append, index b", "remove, compact")
SLOW = ("append, append", "append, index b", "benchmark, benchmark", "tune, tune", "confidence twice")


@pytest.fixture
def start(model_folder: Path) -> Callable[[str, Path], Child]:
    def begin(command: str, here: Path) -> Child:
        text = command.replace("HERE", str(here)).replace("MODEL", str(model_folder))
        name, *arguments = text.replace("ADDRESS", (here / "address").read_text()).split()
        if name == "EVALUATE":
            return Child(lambda: evaluate(arguments[0]), here)
        return Child(run_verb(name, *arguments), here)

    return begin


def evaluate(model_args: str) -> None:
    """Score a text as lm-eval does, and print what comes of it."""
    lm = KNNHF.create_from_arg_string(model_args, {"batch_size": 2, "device": "cpu"})
    text = "The assert statement is a way to insert debugging assertions. " * 8
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    print("\nscore", lm.loglikelihood_rolling([request])[0])


def whole(folder: Path) -> None:
    """A store and all that its manifest names."""
    manifest = Manifest.read(folder)
    for name, record in (manifest.files | manifest.derived).items():
        assert file_record(folder / name) == record, name
    store = Datastore.open(folder)
    for name in index_names(store):
        open_index(store, name)
    for metadata in folder.glob("clusters/*/clusters.json"):
        Clusters.open(store, metadata.parent.name)


def well_or_one_sentence(ended: Ended) -> None:
    assert "Traceback" not in ended.said, ended.said[-3000:]
    assert ended.status == 0 or (ended.status == 1 and ended.complaint), (ended.status, ended.said[-2000:])


@pytest.mark.parametrize("name", PAIRS)
def test_at_once(
    name: str,
    start: Callable[[str, Path], Child],
    anew: Callable[[], Path],
    content: Callable[[Path], dict[str, Any]],
) -> None:
    if name in SLOW and not TIMES:
        pytest.skip("KNN_LM_EVAL_PAIRS asks for it")
    first, second, both = PAIRS[name]
    here = anew()
    alone = [start(command, here).ended() for command in (first, second)]
    assert alone[0].status == 0, alone[0].said[-2000:]
    expected, statuses = content(here), []
    for _ in range(max(TIMES, 1)):
        anew()
        ended = [child.ended() for child in [start(command, here) for command in (first, second)]]
        for one in ended:
            well_or_one_sentence(one)
        statuses.append([one.status for one in ended])
        assert 0 in statuses[-1] and (not both or statuses[-1] == [0, 0]), [one.said[-1000:] for one in ended]
        now = content(here)
        assert name in EITHER or now == expected, {path: (now.get(path), expected.get(path)) for path in now | expected}
        whole(here / "store")
        for output in ("new", "two", "lessened"):
            if (here / output / "manifest.json").exists():
                whole(here / output)
        scores = {one.said.split("\nscore")[1] for one in (*alone[:1], *ended) if "\nscore" in one.said}
        assert len(scores) <= (2 if "replaced" in name else 1), scores
    if report := os.environ.get("KNN_LM_EVAL_TORTURE_REPORT"):
        with open(report, "a") as file:
            file.write(json.dumps({"pair": name, "times": len(statuses), "statuses": statuses}) + "\n")
