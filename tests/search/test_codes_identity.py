"""Codes in text order are those of the index that is there, not of one before it of the same size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore


def wrong_by(store: Datastore) -> float:
    """How far distances by the codes are from those of a search, at most."""
    retriever = LocalRetriever(store, k=20, probe=16)
    queries = np.asarray(store.require_keys("this test")[:30], dtype=np.float32) + 0.1
    distances, entries = retriever.find(queries)
    codes = CodeDistances.open(store, retriever.cpu_index, "index")
    assert codes is not None
    return float(np.abs(codes(queries, entries, np.full(30, 20)) - distances).max())


def build(store: Datastore, seed: int) -> None:
    build_index(store, "IVF16,PQ4", quality_queries=0, seed=seed, train_sample=700, overwrite=True)


def test_an_index_that_takes_another_s_place_gets_codes_of_its_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    build(store, 1)
    size = (store.path / "index.faiss").stat().st_size
    assert wrong_by(store) < 1e-3
    build(store, 2)
    assert (store.path / "index.faiss").stat().st_size == size
    assert not (store.path / "index.codes").exists()
    assert wrong_by(store) < 1e-3


def test_codes_of_another_index_that_were_left_are_laid_out_anew(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    build(store, 1)
    assert wrong_by(store) < 1e-3
    (store.path / "index.codes").rename(tmp_path / "left")
    build(store, 2)
    (tmp_path / "left").rename(store.path / "index.codes")
    assert wrong_by(store) < 1e-3


def test_codes_name_lists_that_exist(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    build(store, 1)
    assert wrong_by(store) < 1e-3
    lists = np.load(store.path / "index.codes" / "lists.npy", mmap_mode="r+")
    lists[5] = 10**6
    lists.flush()
    with pytest.raises(UserError, match=r"lists.npy is damaged"):
        wrong_by(store)
