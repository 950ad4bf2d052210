"""Building an index within a stated memory: under a control group, and refused with what would be enough."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.control_groups import needs_groups, run_within
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.growing import grow_datastore
from knn_lm_eval.search import index_memory
from knn_lm_eval.search.faiss_index import make_index, open_index, search
from knn_lm_eval.search.index_memory import Allowance
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store import key_stream
from knn_lm_eval.system.memory import parse_bytes
from knn_lm_eval.system.sampling import draw_entries

LIMIT = 2**29
FOR_FILES = 2**26  # of it, for pages of files while they are read and written
CHILD = """
import json, sys
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.memory import resident_bytes

build_index(Datastore.open(sys.argv[1], verify="never"), sys.argv[2], memory=int(sys.argv[3]), quality_queries=4, k=99)
print(json.dumps(resident_bytes()))
"""


@needs_groups
def test_an_index_larger_than_a_memory_limit(tmp_path: Path) -> None:
    """All of the process is within it, and pages of files as well.

    Few queries, for each list that they look into is read from the disk anew.
    """
    store = grow_datastore([make_store(tmp_path / "s", 20_000, 32)], tmp_path / "store", 4_000_000)
    command = [sys.executable, "-c", CHILD, str(store.path), "IVF1024,Flat", str(LIMIT - FOR_FILES)]
    process, most = run_within(LIMIT, command)
    assert process.returncode == 0, process.stderr[-3000:]
    index = store.path / "index.faiss"
    assert json.loads(process.stdout)["anonymous"] < LIMIT < index.stat().st_size and most <= LIMIT
    assert sorted(path.name for path in store.path.glob("index*")) == ["index.faiss", "index.json"]
    opened, _ = open_index(store)
    entries = draw_entries(len(store), 20, 1)
    found = search(opened, store.keys[entries].astype(np.float32), 1)
    np.testing.assert_array_equal(found[1][:, 0], entries)


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("IVF16,SQ8", "Training IVF16,SQ8 on 3,000 keys of 16 numbers"),
        ("RR16,IVF16,RaBitQfs", "Training RR16"),
        ("Flat", "IndexFlat is filled in memory: 3,000 entries at a time"),
        ("HNSW8", "IndexHNSWFlat is filled in memory"),
    ],
)
def test_what_is_said_to_be_enough_is(tmp_path: Path, factory: str, what: str) -> None:
    store, memory, refused = make_store(tmp_path / "s"), 2**20, []
    while True:
        try:
            build_index(store, factory, memory=memory, quality_queries=0)
        except UserError as error:
            refused.append(str(error))
            enough = re.search(
                "takes about .* of memory, and .* may be taken: give --memory ([0-9.]+[MG]iB) or more", refused[-1]
            )
            assert enough is not None and not list(store.path.glob("index*"))
            memory = parse_bytes(enough[1]) + 2**24  # what this test itself takes meanwhile
        else:
            break
    assert what in refused[0] and len(refused) <= 2  # training, then segments


def test_the_index_does_not_depend_on_the_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 64)
    store, sizes = make_store(tmp_path / "s"), []
    trained = make_index("IVF16,SQ8", store.dimension, "l2")
    trained.train(store.keys[:].astype(np.float32))
    for name, free in (("much", 2**40), ("little", 2**17), ("less", 2**16 + 2**15)):
        sizes.append(Allowance(free, 0).entries_in_segment(trained))
        with monkeypatch.context() as patch:
            patch.setattr(index_memory, "MOST_IN_SEGMENT", sizes[-1])
            build_index(store, "IVF16,SQ8", name=name, quality_queries=0)
        assert (store.path / f"{name}.faiss").read_bytes() == (store.path / "much.faiss").read_bytes()
    assert sizes[0] == index_memory.MOST_IN_SEGMENT and len(store) > sizes[1] > sizes[2] >= 64
    assert all(size % 64 == 0 for size in sizes)
