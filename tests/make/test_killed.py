"""A command that is killed at any of its changes of the disk goes on by its documented option, to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import find_parts
from knn_lm_eval.store.manifest import file_record

EVENTS = ("replace", "fsync", "unlink")
# Of the events, every one, or every third where there is little time.
STEP = int(os.environ.get("KNN_LM_EVAL_KILL_STEP", "3"))


def killed_at(event: int, work: Callable[[], Any]) -> bool:
    """Do the work in a child process that is killed before that change of the disk; False where it ended before."""
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def counted(original: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **more: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == event:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **more)

                return call

            for name in EVENTS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def derived_is_true(store: Path) -> None:
    """What the manifest says of derived files holds: who fetches the store at this moment gets it."""
    for name, record in json.loads((store / "manifest.json").read_text()).get("derived", {}).items():
        assert (store / name).is_file() and file_record(store / name) == record, name


def content(store: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob(pattern) if path.suffix in (".faiss", ".npy")}


def left(store: Path) -> set[str]:
    """All files but locks, which nobody holds any more."""
    return {
        str(path.relative_to(store)) for path in store.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    }


def each_kill(original: Path, work: Callable[..., Any], check: Callable[[Path], None], tmp_path: Path) -> int:
    """Kill the work on a copy of a store at one change after the other; go on each time, and check what comes of it."""
    event = 1
    while True:
        folder = tmp_path / f"killed at {event}"
        shutil.copytree(original, folder)
        killed = killed_at(event, lambda folder=folder: work(Datastore.open(folder)))
        derived_is_true(folder)
        if killed:
            try:
                work(Datastore.open(folder), resume=True)
            except UserError as error:
                assert "exist already" in str(error) or "exists already" in str(error)  # it was finished
        check(folder)
        derived_is_true(folder)
        shutil.rmtree(folder)
        if not killed:
            return event - 1
        event += STEP


@pytest.mark.parametrize("parts", [None, 2])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_an_index(tmp_path: Path, parts: int | None, overwrite: bool) -> None:
    store = make_store(tmp_path / "s", count=800)
    if overwrite:
        build_index(store, "IVF8,SQ8", quality_queries=0, parts=3)

    def work(datastore: Datastore, **more: Any) -> None:
        build_index(datastore, "IVF4,SQ8", quality_queries=0, parts=parts, overwrite=overwrite, **more)

    shutil.copytree(store.path, tmp_path / "alone")
    work(Datastore.open(tmp_path / "alone"))
    expected, names = content(tmp_path / "alone", "index*"), left(tmp_path / "alone")

    def check(folder: Path) -> None:
        assert content(folder, "index*") == expected
        assert find_parts(Datastore.open(folder))[0]["factory"] == "IVF4,SQ8"
        assert left(folder) == names

    assert each_kill(store.path, work, check, tmp_path) > 5


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_a_clustering(tmp_path: Path, overwrite: bool) -> None:
    store = make_store(tmp_path / "s", count=800)
    if overwrite:
        cluster_kmeans(store, num_clusters=5, iterations=2)

    def work(datastore: Datastore, **more: Any) -> None:
        cluster_kmeans(datastore, num_clusters=9, iterations=2, overwrite=overwrite, **more)

    shutil.copytree(store.path, tmp_path / "alone")
    work(Datastore.open(tmp_path / "alone"))
    expected, names = content(tmp_path / "alone", "clusters/kmeans/*"), left(tmp_path / "alone")

    def check(folder: Path) -> None:
        assert content(folder, "clusters/kmeans/*") == expected
        assert len(Clusters.open(Datastore.open(folder))) == 9
        assert left(folder) == names

    assert each_kill(store.path, work, check, tmp_path) > 5
