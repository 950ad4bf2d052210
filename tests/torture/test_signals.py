"""Ctrl-C and SIGTERM in each verb and in lm_eval: one sentence of what is kept; no half file, no process left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.forks import Child, run_verb
from helpers.tiny_model import EVAL_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval.cli.main import NOTHING_KEPT, SAME_COMMAND, WITH_RESUME, verbs
from knn_lm_eval.errors import NO_RESULTS
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.store.manifest import Manifest, file_record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

LM = "--model_args pretrained=MODEL,max_length=64,datastore=HERE/store"
LAW = "--metadata data_dir=HERE/data --limit 2"
# A verb's arguments, what it says that is kept, and before which change of the disk or reading of the LM it is ended.
VERBS: dict[str, tuple[str, str, int]] = {
    "dump_datastore": (
        "--model_args pretrained=MODEL --text HERE/train.txt --max_tokens 400 --output HERE/new",
        WITH_RESUME,
        20,
    ),
    "build_index": ("--datastore HERE/store --factory IVF4,SQ8 --quality_queries 0 --name other", WITH_RESUME, 8),
    "cluster_datastore": ("--datastore HERE/store --method kmeans --num_clusters 9 --name other", WITH_RESUME, 12),
    "build_suffix_array": ("--datastore HERE/store", WITH_RESUME, 5),
    "prune_datastore random": (
        "--datastore HERE/store --method random --keep 0.5 --output HERE/new",
        NOTHING_KEPT,
        8,
    ),
    "prune_datastore confidence": (
        "--datastore HERE/store --method confidence --keep 0.5 --output HERE/new --device cpu",
        SAME_COMMAND,
        30,
    ),
    "prune_datastore greedy_merge": ("--datastore HERE/store --method greedy_merge --output HERE/new", WITH_RESUME, 14),
    "import_datastore": ("HERE/theirs --output HERE/new", NOTHING_KEPT, 6),
    "fetch_datastore": ("ADDRESS --output HERE/new", SAME_COMMAND, 15),
    "push_datastore": ("HERE/store me/store --license mit", SAME_COMMAND, 1),  # when it holds the store
    "grow_datastore": ("HERE/store --entries 6000 --output HERE/new", NOTHING_KEPT, 5),
    "project_datastore": ("--datastore HERE/store --keys 8 --output HERE/new", NOTHING_KEPT, 5),
    "append_datastore": ("--datastore HERE/store --text HERE/more.txt --device cpu", WITH_RESUME, 20),
    "remove_documents": ("--datastore HERE/store --documents 0", SAME_COMMAND, 4),
    "compact_datastore": ("--datastore HERE/lessened", SAME_COMMAND, 8),
    "tune": (f"{LM} {LAW} --tasks law_valid --output HERE/new/tuned.json", NOTHING_KEPT, 4),
    "foss_curve": (f"{LM} {LAW} --tasks law --output HERE/new", NOTHING_KEPT, 6),
    "store_sizes": (f"{LM},k=8,lmbda=0.5 {LAW} --tasks law --output HERE/new", NOTHING_KEPT, 4),
    "benchmark": ("HERE/matrix.yaml", SAME_COMMAND, 12),
    "reproduce": ("HERE/recipe.yaml --output HERE/new", SAME_COMMAND, 40),
    "inspect_neighbours": (f"{LM},k=8 --file HERE/train.txt --html HERE/new/page.html", NOTHING_KEPT, 3),
    "speed": (f"{LM},k=8 --text HERE/train.txt --tokens 200 --no_memory --json HERE/new.json", NOTHING_KEPT, 2),
    "compare_indexes": (
        f"{LM},k=8,lmbda=0.5 --text HERE/train.txt --tokens 200 --indexes index --k 8 --output HERE/new",
        NOTHING_KEPT,
        3,
    ),
    "analyse": ("HERE/records --resamples 10 --output HERE/new.json", NOTHING_KEPT, 2),
    "compare": ("HERE/results --format csv --output HERE/new.csv", NOTHING_KEPT, 2),
}
WITHOUT = {"first_run", "verify_datastore", "doctor"}  # the first starts the others, the other two only read


def test_no_verb_is_forgotten() -> None:
    assert {name.split()[0] for name in VERBS} == verbs().keys() - WITHOUT


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", VERBS)
def test_a_verb(
    name: str, number: int, status: int, anew: Callable[[], Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, kept, at = VERBS[name]
    here = anew()
    if name == "push_datastore":  # to where nobody answers
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    text = arguments.replace("HERE", str(here)).replace("MODEL", str(model_folder))
    work = run_verb(name.split()[0], *text.replace("ADDRESS", (here / "address").read_text()).split())
    if name == "compare":
        benchmark = Child(run_verb("benchmark", here / "matrix.yaml"), here).ended()
        assert benchmark.status == 0, benchmark.said[-2000:]
    if name == "analyse":
        recorded = Child(lambda: record(here, model_folder), here).ended()
        assert recorded.status == 0, recorded.said[-2000:]
    child = Child(work, here, at, number)
    ended = child.ended()
    assert not child.left()
    assert ended.status == status, ended.said[-3000:]
    assert "Traceback" not in ended.said and "Exception ignored" not in ended.said, ended.said[-3000:]
    assert ended.complaint == f"interrupted: {kept}", ended.said[-3000:]
    assert ended.said.count("interrupted:") == 1
    nothing_half(here)


def record(here: Path, model_folder: Path) -> None:
    """Score a text, and leave records of its tokens."""
    model_args = f"pretrained={model_folder},max_length=64,datastore={here}/store,k=8,lmbda=0.5,records={here}/records"
    lm = KNNHF.create_from_arg_string(model_args, {"batch_size": 2, "device": "cpu"})
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (EVAL_TEXT,), 0, metadata=("text", 0, 1))])


def nothing_half(here: Path) -> None:
    """Stores are what their manifests say, and no output that nobody goes on with is there."""
    manifest = Manifest.read(here / "store")
    for name, record in (manifest.files | manifest.derived).items():
        assert file_record(here / "store" / name) == record, name
    assert not list(here.glob(".*.unfinished"))


LM_EVAL = "--model knn-hf --tasks law --limit 2 --batch_size 2 --device cpu --output_path HERE/results"


@pytest.mark.slow  # lm-eval looks through its thousands of tasks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_lm_eval(number: int, anew: Callable[[], Path], model_folder: Path, monkeypatch: Any) -> None:
    from lm_eval.__main__ import cli_evaluate

    here = anew()
    model_args = f"pretrained={model_folder},max_length=64,datastore={here}/store,k=8,lmbda=0.5"
    command = [*LM_EVAL.replace("HERE", str(here)).split(), "--model_args", model_args]
    monkeypatch.setattr("sys.argv", ["lm_eval", *command, "--metadata", f'{{"data_dir": "{here}/data"}}'])
    child = Child(cli_evaluate, here, 2, number)
    ended = child.ended()
    assert not child.left()
    assert ended.status != 0 and "Traceback" not in ended.said, ended.said[-3000:]
    assert ended.complaint == f"interrupted: {NO_RESULTS}", ended.said[-3000:]
    assert not (here / "results").exists()
