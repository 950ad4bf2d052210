"""What the commands under torture work on: stores, models, texts, a server, all small."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.forks import Child
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.files import sha256

# What differs between two runs that did the same.
TIMES = ("created", "seconds", "date", "start_time", "end_time", "total_evaluation_time_seconds", "sha256", "bytes")
TIMES += ("versions", "quality", "machine", "cache_key", "git_hash")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder in which a command runs; always the same, for results name paths."""
    return tmp_path / "here"


@pytest.fixture
def original(
    tmp_path: Path, clustered: Datastore, keyless: Datastore, train_file: Path, model_folder: Path, address: str
) -> Path:
    """What that folder holds at first."""
    folder = tmp_path / "original"
    shutil.copytree(clustered.path, folder / "store", ignore=shutil.ignore_patterns("lm_log_probs*", "*.codes"))
    shutil.copytree(folder / "store", folder / "lessened")
    remove_documents(folder / "lessened", [1])
    shutil.copytree(keyless.path, folder / "keyless", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(train_file, folder / "train.txt")
    (folder / "more.txt").write_text(EVAL_TEXT + "\n")
    (folder / "data").mkdir()
    words = EVAL_TEXT.split()
    for file in ("dev.en", "test.en"):
        lines = (" ".join(words[start : start + 12]) for start in range(0, len(words), 12))
        (folder / "data" / file).write_text("\n".join(lines) + "\n")
    (folder / "theirs").mkdir()
    for name, array, dtype in (("keys", clustered.keys, np.float16), ("vals", clustered.values, np.int32)):
        rows = np.array(array[:1200]).astype(dtype)
        (folder / "theirs" / f"dstore_tiny_1200_{clustered.dimension}_{name}.npy").write_bytes(rows.tobytes())
    matrix = {
        "output": str(tmp_path / "here" / "results"),
        "batch_size": 3,
        "device": "cpu",
        "metadata": {"data_dir": str(tmp_path / "here" / "data")},
        "models": {"tiny": {"pretrained": str(model_folder), "max_length": MAX_LENGTH}},
        "datastores": {"topics": str(tmp_path / "here" / "store")},
        "methods": {"base": {"model": "hf"}, "knn": {"k": 20, "lmbda": 0.6, "knn_temp": 2.0}},
        "tasks": {"law": {"limit": 3}},
    }
    (folder / "matrix.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    recipe = {
        "device": "cpu",
        "data_dir": str(tmp_path / "here" / "data"),
        "model": {"pretrained": str(model_folder), "dtype": "float32"},
        "scoring": {"max_length": MAX_LENGTH},
        "dump": {"text": str(tmp_path / "here" / "train.txt"), "max_tokens": 400},
        "index": {"factory": "IVF4,SQ8", "quality_queries": 0},
        "cluster": {"method": "kmeans", "num_clusters": 9, "iterations": 3},
        "evaluate": {
            "methods": {"base": {"model": "hf"}, "walk": {"k": 20, "retomaton": True, "clusters": "kmeans"}},
            "tasks": {"law": {"limit": 3}},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "address").write_text(address)
    return folder


@pytest.fixture(scope="session")
def keyless(
    tmp_path_factory: pytest.TempPathFactory, lm: CausalHFLM, model_folder: Path, train_file: Path
) -> Datastore:
    """A store without keys."""
    return dump_datastore(
        lm,
        TextSource(train_file).pieces(),
        tmp_path_factory.mktemp("keyless") / "store",
        max_tokens=1500,
        keys="none",
        index=IndexPlan("IVF4,RaBitQfs", quality_queries=0),
        model_args={"pretrained": str(model_folder)},
    )


@pytest.fixture(scope="session")
def address(clustered: Datastore) -> Iterator[str]:
    """Where the store can be fetched."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(Quiet, directory=str(clustered.path))) as server:
        child = Child(server.serve_forever, clustered.path)
        yield f"http://127.0.0.1:{server.server_address[1]}"
        os.kill(child.pid, 9)
        child.ended()


@pytest.fixture
def anew(original: Path, here: Path) -> Callable[[], Path]:
    """Make the folder as it was at first."""

    def make() -> Path:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(original, here)
        return here

    return make


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps so small that there are many, and nothing that takes time for nothing."""
    from knn_lm_eval.make import windows
    from knn_lm_eval.search import indexing
    from knn_lm_eval.store import key_stream
    from knn_lm_eval.system import checkpoints

    monkeypatch.setattr(windows, "BATCHES_PER_CHUNK", 1)
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 1000)
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 1000)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(indexing, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
    monkeypatch.setenv("KNN_LM_EVAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def content() -> Callable[[Path], dict[str, Any]]:
    """What is in a folder, without times and without locks, which nobody holds any more."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(of) for name, of in value.items() if name not in TIMES and "time" not in name}
        return [plain(of) for of in value] if isinstance(value, list) else value

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir() or path.name.endswith(".lock"):
                continue
            if path.name.startswith(("results_", "samples_")):  # of lm-eval, whose names have the time
                name = name[: name.rindex("_20")]
            if path.suffix == ".json":
                known = json.loads(path.read_text())
                found[name] = plain(known.get("results", known))
            elif path.suffix not in (".png", ".svg", ".jsonl"):
                found[name] = sha256(path, progress=False)
            else:
                found[name] = path.stat().st_size > 100
        return found

    return read
