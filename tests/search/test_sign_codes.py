"""Searches of sign codes that are laid out, beside a slow oracle and beside faiss."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers.stores import make_store
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from knn_lm_eval.search import sign_codes
from knn_lm_eval.search.faiss_index import join_parts, make_index, search, set_probe, split_parts
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.sign_codes import SignSearch, transformed

FACTORIES = ("IVF{lists},RaBitQfs", "IVF{lists},RaBitQ", "RR{d},IVF{lists},RaBitQfs", "PCAR{less},IVF{lists},RaBitQfs",
             "RR{d},IVF{lists}_HNSW8,RaBitQfs")  # fmt: skip


def make_keys(rng: np.random.Generator, count: int, dimension: int, common: float, distinct: int) -> np.ndarray:
    keys = rng.standard_normal((distinct, dimension)) + common
    return keys[rng.integers(0, distinct, count)].astype(np.float32)


def trained(factory: str, keys: np.ndarray, lists: int, sim_func: str) -> faiss.Index:
    dimension = keys.shape[1]
    index = make_index(
        factory.format(lists=lists, d=dimension, less=min(20, max(1, dimension // 2))), dimension, sim_func
    )
    index.train(keys)
    return index


def multiplier_of(residual: np.ndarray) -> float:
    """|r|^2 / |r|_1, but for what faiss makes of residuals of nearly nothing."""
    least = float(np.finfo(np.float32).eps)
    squared, absolute, root = float((residual**2).sum()), float(np.abs(residual).sum()), len(residual) ** 0.5
    cosine = absolute / root if squared < least else absolute / root / squared**0.5
    return squared**0.5 / root * (1.0 if cosine < least else 1 / cosine)


def lists_are_apart(index: faiss.Index, queries: np.ndarray, probe: int) -> bool:
    """Whether rounding cannot change which lists are the nearest."""
    quantizer = (faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index).quantizer
    distances = quantizer.search(transformed(index, queries), quantizer.ntotal)[0]  # [n, lists]
    gaps = np.abs(np.diff(distances, axis=1))[:, probe - 1 : probe]
    return bool((gaps > 1e-5 * (1 + np.abs(distances).max())).all())


def oracle(index: faiss.Index, keys: np.ndarray, queries: np.ndarray, probe: int, dot: bool) -> np.ndarray:
    """RaBitQ's estimates in float64, ``[n, keys]``; infinity where a list isn't visited."""
    ivf = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    there, asked = transformed(index, keys), transformed(index, queries)
    centroids = np.asarray(ivf.quantizer.reconstruct_n(0, ivf.nlist))
    list_of = ivf.quantizer.search(there, 1)[1][:, 0]
    visited = ivf.quantizer.search(asked, min(probe, ivf.nlist))[1]
    estimates = np.full((len(queries), len(keys)), np.inf)
    for j in range(len(keys)):
        c = centroids[list_of[j]].astype(np.float64)
        residual = there[j] - centroids[list_of[j]]
        signs, residual = np.where(residual > 0, 1.0, -1.0), residual.astype(np.float64)
        multiplier = multiplier_of(residual)
        for i in range(len(queries)):
            if list_of[j] in visited[i]:
                away = asked[i].astype(np.float64) - c
                estimate = (away**2).sum() + (residual**2).sum() - 2 * multiplier * (signs @ away)
                if dot:
                    squares = (asked[i].astype(np.float64) ** 2).sum() + (there[j].astype(np.float64) ** 2).sum()
                    estimates[i, j] = (estimate - squares) / 2
                else:
                    estimates[i, j] = max(estimate, 0.0)
    return estimates


def allowed_error(index: faiss.Index, keys: np.ndarray, queries: np.ndarray) -> float:
    """What 8 bits of a query's components can change, and rounding."""
    there, asked = transformed(index, keys), transformed(index, queries)
    spread = np.abs(asked - there.mean(0)).max() + np.abs(there - there.mean(0)).max()
    norms = np.linalg.norm(there - there.mean(0), axis=1).max() * 2
    size = max(float((there**2).sum(1).max()), float((asked**2).sum(1).max()))
    return 8 * norms * np.sqrt(there.shape[1]) * spread / 255 + 1e-5 * size + 1e-4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_estimates_are_the_oracle_s(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    dimension = data.draw(st.sampled_from([3, 8, 20, 64, 70, 130]))
    count, lists = data.draw(st.integers(40, 200)), data.draw(st.sampled_from([1, 3, 8]))
    dot, factory = data.draw(st.booleans()), data.draw(st.sampled_from(FACTORIES))
    common = data.draw(st.sampled_from([0.0, 5.0]))
    keys = make_keys(rng, count, dimension, common, data.draw(st.sampled_from([20, count])))
    queries = make_keys(rng, 6, dimension, common, 6)
    index = trained(factory, keys, lists, "dot" if dot else "l2")
    index.add(keys)
    k, probe = data.draw(st.sampled_from([1, 10, count, count + 40])), data.draw(st.sampled_from([1, 2, lists]))
    codes = SignSearch.of(index, tmp_path_factory.mktemp("codes"))
    assert codes is not None
    distances, entries, compared = codes.search(queries, k, probe)
    assume(lists_are_apart(index, queries, probe))
    wanted, error = oracle(index, keys, queries, probe, dot), allowed_error(index, keys, queries)
    assert compared == np.isfinite(wanted).sum()
    for i in range(len(queries)):
        there = int(min(k, np.isfinite(wanted[i]).sum()))
        assert (entries[i, there:] == -1).all() and np.isinf(distances[i, there:]).all()
        assert len(set(entries[i, :there].tolist())) == there
        np.testing.assert_allclose(distances[i, :there], wanted[i, entries[i, :there]], rtol=0, atol=error)
        np.testing.assert_allclose(distances[i, :there], np.sort(wanted[i])[:there], rtol=0, atol=error)
        order = np.lexsort((entries[i, :there], distances[i, :there]))
        assert (order == np.arange(there)).all()


@pytest.mark.parametrize("factory", ["RR64,IVF16,RaBitQfs", "IVF16,RaBitQ"])
def test_neighbours_are_the_same_in_any_company(tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    keys = make_keys(rng, 20_000, 64, 3.0, 9000)  # many are equally far
    queries = make_keys(rng, 301, 64, 3.0, 301)
    index = trained(factory, keys, 16, "l2")
    index.add(keys)
    codes = SignSearch.of(index, tmp_path)
    assert codes is not None
    distances, entries, _ = codes.search(queries, 500, 8)
    for start, stop in ((0, 1), (5, 12), (100, 301)):
        some = codes.search(queries[start:stop], 500, 8)
        np.testing.assert_array_equal(some[0], distances[start:stop])
        np.testing.assert_array_equal(some[1], entries[start:stop])
    for fewer in (1, 7, 499):
        np.testing.assert_array_equal(codes.search(queries[:9], fewer, 8)[1], entries[:9, :fewer])
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: 3)
    np.testing.assert_array_equal(codes.search(queries, 500, 8)[1], entries)
    assert codes.compares_lists
    prepared = codes.prepare(queries, 16)
    for probe in (1, 8, 16):
        for array, expected in zip(
            codes.search_prepared(prepared, 500, probe), codes.search(queries, 500, probe), strict=True
        ):
            np.testing.assert_array_equal(array, expected)


def test_distances_are_near_faiss_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_codes, "ENTRIES_AT_ONCE", 64)  # lists are laid out in several goes
    rng = np.random.default_rng(4)
    keys, queries = make_keys(rng, 5000, 96, 2.0, 5000), make_keys(rng, 50, 96, 2.0, 50)
    index = trained("RR96,IVF32,RaBitQfs", keys, 32, "l2")
    index.add(keys)
    codes = SignSearch.of(index, tmp_path)
    assert codes is not None
    distances, _, compared = codes.search(queries, 100, 8)
    wanted, _ = search(index, queries, 100, 8)
    assert compared == faiss.cvar.indexIVF_stats.ndis  # type: ignore[attr-defined]
    assert np.abs(distances - wanted).mean() < 0.002 * wanted.mean()


def test_all_equal_keys_and_queries_that_are_no_numbers(tmp_path: Path) -> None:
    keys = np.ones((9000, 16), dtype=np.float32)
    index = trained("IVF1,RaBitQfs", keys, 1, "l2")
    index.add(keys)
    codes = SignSearch.of(index, tmp_path)
    assert codes is not None
    queries = np.stack([np.full(16, value, dtype=np.float32) for value in (1.5, np.nan, np.inf, 1e30)])
    distances, entries, _ = codes.search(queries, 50, 1)
    assert entries[0].tolist() == list(range(50))
    np.testing.assert_allclose(distances[0], 4.0, rtol=1e-4)
    assert (entries[1:3] == -1).all()


def test_parts_are_searched_as_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    keys, queries = make_keys(rng, 3000, 32, 1.0, 1500), make_keys(rng, 20, 32, 1.0, 20)
    first = trained("RR32,IVF8,RaBitQfs", keys, 8, "l2")
    second = faiss.clone_index(first)
    first.add(keys[:1000])
    second.add(keys[1000:])
    found = []
    for number, index in enumerate((join_parts([first, second], True), first, second)):
        (tmp_path / f"{number}").mkdir()
        codes = SignSearch.of(index, tmp_path / f"{number}")
        assert codes is not None
        found.append(codes.search(queries, 200, 4))
    (distances, entries, compared), *of_parts = found
    assert compared == sum(part[2] for part in of_parts)
    both = np.concatenate([part[0] for part in of_parts], axis=1)  # [n, 2 * k]
    numbers = np.concatenate([of_parts[0][1], of_parts[1][1] + 1000], axis=1)  # [n, 2 * k]
    for i in range(len(queries)):
        order = np.lexsort((numbers[i], both[i]))[:200]
        np.testing.assert_array_equal(entries[i], numbers[i, order])
        np.testing.assert_array_equal(distances[i], both[i, order])


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,RaBitQfs4", "IVF8,PQ4x4fs", "IVF8,PQ4"])
def test_other_indexes_are_left_to_faiss(tmp_path: Path, factory: str) -> None:
    keys = make_keys(np.random.default_rng(6), 1000, 16, 0.0, 1000)
    index = trained(factory, keys, 8, "l2")
    index.add(keys)
    assert SignSearch.of(index, tmp_path) is None


@pytest.mark.parametrize("parts", [None, 2])
def test_a_retriever_searches_them_from_files(tmp_path: Path, parts: int | None) -> None:
    store = make_store(tmp_path / "store", dimension=32)
    build_index(store, "RR32,IVF16,RaBitQfs", quality_queries=0, parts=parts)
    queries = np.asarray(store.require_keys("this")[:40], dtype=np.float32)
    retriever = LocalRetriever(store, k=20, probe=8)
    distances, entries = retriever.find(queries)
    folders = sorted(path.name for path in store.path.glob("*.scan"))
    assert folders == (["index.scan"] if parts is None else ["index.000.scan", "index.001.scan"])
    set_probe(retriever.cpu_index, 8)
    (tmp_path / "anew").mkdir()
    anew = SignSearch.of(retriever.cpu_index, tmp_path / "anew")
    assert anew is not None
    np.testing.assert_array_equal(anew.search(queries, 20, 8)[1], entries)
    assert len(split_parts(retriever.cpu_index)) == (parts or 1)
    made = {path: path.stat().st_mtime_ns for folder in folders for path in (store.path / folder).iterdir()}
    np.testing.assert_array_equal(LocalRetriever(store, k=20, probe=8).find(queries)[0], distances)
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())
    build_index(store, "IVF8,Flat", quality_queries=0, overwrite=True)
    assert not list(store.path.glob("*.scan"))
