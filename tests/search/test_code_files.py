"""Where the codes in text order are laid out, and by whom."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import make_store

from knn_lm_eval.search.code_distances import ARRAYS, CodeDistances
from knn_lm_eval.search.faiss_index import open_index
from knn_lm_eval.search.indexing import build_index

# Waits for the others to be ready, and opens the codes.
OPEN = """
import sys, time
from pathlib import Path
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.faiss_index import open_index
from knn_lm_eval.store.datastore import Datastore
folder, me, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = Datastore.open(folder / "s")
index, _ = open_index(store)
(folder / f"ready.{me}").touch()
while len(list(folder.glob("ready.*"))) < count:
    time.sleep(0.001)
codes = CodeDistances.open(store, index, "index")
print(sum(int(codes.lists[i]) for i in range(len(store))), float(codes.offsets.astype("float64").sum()))
"""


@pytest.mark.parametrize("factory", ["IVF16,PQ8", "IVF16,RaBitQ"])
def test_of_several_processes_one_lays_out_the_codes(tmp_path: Path, factory: str) -> None:
    store = make_store(tmp_path / "s", count=150_000, dimension=16)
    build_index(store, factory, quality_queries=0, train_sample=5000)
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    runs = [
        subprocess.Popen([*command, str(number), "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({printed for printed, _ in outputs}) == 1
    assert sum("Laying out" in said for _, said in outputs) == 1
    assert {path.name for path in (store.path / "index.codes").iterdir()} == {
        "codes.json",
        *(f"{a}.npy" for a in ARRAYS),
    }
    assert not list(store.path.glob(".*"))
    (store.path / "index.codes").rename(tmp_path / "made by three")
    alone = CodeDistances.open(store, open_index(store)[0], "index")
    assert alone is not None
    for name in ARRAYS:
        one = (store.path / "index.codes" / f"{name}.npy").read_bytes()
        assert one == (tmp_path / "made by three" / f"{name}.npy").read_bytes()


@contextmanager
def nobody() -> Iterator[None]:
    """Who may not write where others have not allowed it; root may everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_of_a_store_that_cannot_be_written_to_they_go_to_the_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        store = make_store(Path(folder) / "s", count=3000)
        build_index(store, "IVF16,PQ8", quality_queries=0)
        index, cache = open_index(store)[0], Path(folder) / "cache"
        cache.mkdir()
        cache.chmod(0o777)
        monkeypatch.setenv("KNN_LM_EVAL_CACHE", str(cache))
        store.path.chmod(0o555)
        try:
            with nobody():
                codes = CodeDistances.open(store, index, "index")
                again = CodeDistances.open(store, index, "index")
                read = CodeDistances.read(store, index, "index")
        finally:
            store.path.chmod(0o755)
        assert codes is not None and again is not None
        assert not (store.path / "index.codes").exists()
        assert caplog.text.count("cannot be written to") == 1
        assert len(list((cache / "codes").iterdir())) == 1
        beside = CodeDistances.open(store, index, "index")  # found in the cache
        assert beside is not None and not (store.path / "index.codes").exists()
        for one in (again, read, beside):
            np.testing.assert_array_equal(one.offsets, codes.offsets)
