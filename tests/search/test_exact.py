"""Exact search without an index, against a float64 oracle: any offset of the keys, any sizes of blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pretended_gpu import MEMORY, pretended_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.search import exact, key_blocks, nearest
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.nearest import pair_distances


def oracle(keys: np.ndarray, queries: np.ndarray, sim_func: str) -> np.ndarray:
    """Distances ``[n, count]`` in double precision."""
    keys, queries = keys.astype(np.float64), queries.astype(np.float64)
    if sim_func == "dot":
        return -queries @ keys.T
    return np.stack([((keys - query) ** 2).sum(1) for query in queries])


def tensors_everywhere(patch: pytest.MonkeyPatch) -> None:
    """What GPUs do, done here: candidates by tensors, products by halves."""

    def by_halves(factors: torch.Tensor, keys: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        return nearest.scores_by_halves(factors, keys, halves, lambda some, others: some.float() @ others.float().T)

    patch.setattr(exact, "nearest_on", lambda device, compared, k: nearest.TensorNearest(compared, k, device))
    patch.setattr(nearest, "scores_of", by_halves)


def check(keys: np.ndarray, queries: np.ndarray, k: int, sim_func: str) -> None:
    distances, entries = ExactSearch(keys, sim_func).search(queries, k)
    with pytest.MonkeyPatch.context() as patch:
        tensors_everywhere(patch)
        by_tensors = ExactSearch(keys, sim_func, ["cpu", "cpu", "cpu"]).search(queries, k)
    check_found(keys, queries, k, sim_func, distances, entries)
    check_found(keys, queries, k, sim_func, *by_tensors)


def check_found(
    keys: np.ndarray, queries: np.ndarray, k: int, sim_func: str, distances: np.ndarray, entries: np.ndarray
) -> None:
    of_all = oracle(keys, queries, sim_func)
    expected = np.sort(of_all, axis=1)[:, :k]
    assert distances.dtype == np.float32 and entries.dtype == np.int64 and distances.shape == (len(queries), k)
    assert all(len(set(row)) == k for row in entries.tolist())
    spread = of_all.std(axis=1, keepdims=True) + 1e-6
    of_found = np.take_along_axis(of_all, entries, 1)
    # What float32 can hold of an inner product, which may lie near a large number, and of a sum of squares.
    rounding = np.abs(expected) * (1.2e-7 if sim_func == "dot" else 1e-6)
    assert (np.abs(of_found - expected) <= 1e-5 * spread + rounding).all()  # those found are the nearest
    assert (np.abs(distances - of_found) <= 1e-5 * spread + rounding).all()
    assert (np.diff(distances, axis=1) >= 0).all()


@settings(deadline=None)  # compiles when it is first called
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from(["l2", "dot"]),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 2**32 - 1),
)
def test_it_is_the_oracle(
    count: int, dimension: int, queries: int, k: int, sim_func: str, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((count, dimension)).astype(dtype)
    keys[rng.integers(0, count, count // 3)] = keys[0]  # ties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_blocks, "BLOCK_BYTES", 4 * dimension * int(rng.integers(1, 90)))
        patch.setattr(exact, "SCORE_BYTES", int(rng.integers(4, 4000)))
        check(keys, rng.standard_normal((queries, dimension)).astype(np.float32), min(k, count), sim_func)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("norm", [0, 30, 1414, 20_000])
def test_a_large_common_part_of_the_keys_costs_nothing(norm: float, sim_func: str) -> None:
    """Where it is asked 1,000 at once, faiss expands the square, and loses the spread at a norm of 1,414."""
    rng = np.random.default_rng(0)
    common = norm * rng.standard_normal(96) / np.sqrt(96)
    keys = (rng.standard_normal((6000, 96)) + common).astype(np.float32)
    queries = (rng.standard_normal((1100, 96)) + (common if sim_func == "l2" else 0)).astype(np.float32)
    check(keys, queries, 50, sim_func)


def test_of_equally_near_keys_the_first_come_first() -> None:
    keys = np.zeros((500, 4), dtype=np.float16)
    _, entries = ExactSearch(keys, "l2").search(np.ones((2, 4), dtype=np.float32), 500)
    assert (entries == np.arange(500)).all()


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("by_tensors", [False, True])
def test_results_are_the_same_whatever_blocks_batches_and_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sim_func: str, by_tensors: bool
) -> None:
    """Also where far more keys are equally near than are asked for; the keys kept or mapped from a file."""
    rng = np.random.default_rng(0)
    keys = (rng.standard_normal((3000, 24)) + 5).astype(np.float16)
    keys[rng.integers(0, 3000, 1500)] = keys[7]
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    queries = np.concatenate([keys[7:8], keys[:20] + rng.standard_normal((20, 24))]).astype(np.float32)
    if by_tensors:
        tensors_everywhere(monkeypatch)
    search = ExactSearch(keys, sim_func)
    expected = search.search(queries, 100)
    distances = oracle(keys, queries, sim_func).astype(np.float32)
    nearest_entries = np.argsort(distances[0], kind="stable")[:100]
    if sim_func == "l2":
        assert (expected[1][0] == nearest_entries).all()
    for block, batch, devices in ((24 * 4 * 17, 999, 1), (24 * 4 * 400, 20_000, 2), (2**23, 4, 5)):
        monkeypatch.setattr(key_blocks, "BLOCK_BYTES", block)
        monkeypatch.setattr(exact, "SCORE_BYTES", batch)
        other = ExactSearch(mapped, sim_func, ["cpu"] * devices)
        for _ in range(3):  # the second has the keys kept, the third finds them there
            for found, as_expected in zip(other.search(queries, 100), expected, strict=True):
                np.testing.assert_array_equal(found, as_expected)
    for row, query in enumerate(queries):
        np.testing.assert_array_equal(search.search(query[None], 100)[1][0], expected[1][row])


@pytest.mark.parametrize(("room", "looked_at"), [(4 * 500 * 4, 2), (4 * 500 * 4 - 1, 4)])
def test_keys_that_do_not_fit_are_not_kept(monkeypatch: pytest.MonkeyPatch, room: int, looked_at: int) -> None:
    keys = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float16)
    monkeypatch.setattr(key_blocks, "KEPT_BYTES", room)
    search, centred = ExactSearch(keys, "l2"), key_blocks.KeyBlocks._centred
    passes: list[int] = []
    monkeypatch.setattr(key_blocks.KeyBlocks, "_centred", lambda *given: passes.append(1) or centred(*given))
    found = [search.search(keys[:9].astype(np.float32), 3)[0] for _ in range(4)]
    assert len(passes) == looked_at and all((distances == found[0]).all() for distances in found)


def test_keys_stream_where_half_of_memory_does_not_hold_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float16)
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    for available, streams in ((2 * keys.nbytes, False), (2 * keys.nbytes - 1, True), (None, False)):
        monkeypatch.setattr(key_blocks, "available_bytes", lambda available=available: available)
        assert ExactSearch(mapped, "l2").streams == streams
        assert not ExactSearch(keys, "l2").streams  # they are in memory


def test_a_query_that_is_not_finite_finds_nothing() -> None:
    keys = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float16)
    queries = np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], dtype=np.float32)
    distances, entries = ExactSearch(keys, "l2").search(queries, 3)
    assert (entries[0] >= 0).all() and (entries[1] == -1).all() and (distances[1] == np.inf).all()


def test_several_threads_share_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((900, 8)).astype(np.float16), rng.standard_normal((50, 8)).astype(np.float32)
    alone = ExactSearch(keys, "l2").search(queries, 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for found, expected in zip(ExactSearch(keys, "l2").search(queries, 30), alone, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_key_that_is_not_finite_is_said() -> None:
    keys = np.zeros((500, 4), dtype=np.float16)
    keys[400, 2] = np.inf
    with pytest.raises(UserError, match="hold NaN or infinity"):
        ExactSearch(keys, "l2").search(np.ones((2, 4), dtype=np.float32), 5)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_keys_stay_on_a_gpu_or_stream_to_it(fits: bool, sim_func: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU, which keeps watch over pinned buffers that are written before their copy is done."""
    rng = np.random.default_rng(2)
    keys, queries = rng.standard_normal((700, 12)).astype(np.float16), rng.standard_normal((20, 12)).astype(np.float32)
    expected = ExactSearch(keys, sim_func).search(queries, 30)
    monkeypatch.setattr(key_blocks, "GPU_BLOCK_BYTES", 4 * 12 * 64)
    monkeypatch.setattr(key_blocks, "GPU_ROOM", 0 if fits else MEMORY)
    with pretended_gpu() as gpu:
        search = ExactSearch(keys, sim_func, "cuda")
        copies = []
        for _ in range(2):
            before = gpu.ran["copy to the GPU"]
            found = search.search(queries, 30)
            copies.append(gpu.ran["copy to the GPU"] - before)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert copies[0] >= 11 and (copies[1] >= 11) == (not fits)


MISTAKES = {
    "the next key": lambda own, constant, keys, rows, columns, is_dot: pair_distances(
        own, constant, keys, rows, (columns + 1) % len(keys), is_dot
    ),
    "single precision": lambda own, constant, keys, rows, columns, is_dot: (
        -(own[rows] * keys[columns].float()).sum(1) if is_dot else (own.half()[rows] - keys[columns]).square().sum(1)
    ),
    "queries on the CPU": lambda own, *others: pair_distances(own.cpu(), *others),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("devices", [["cuda"], ["cpu", "cuda"], ["cuda", "cuda"]])
def test_distances_are_gathered_where_the_keys_are(
    devices: list[str], sim_func: str, mistake: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    keys = (rng.standard_normal((700, 12)) + 300).astype(np.float16)
    queries = keys[:20].astype(np.float32) + rng.standard_normal((20, 12)).astype(np.float32)
    entries = rng.integers(-1, 700, (20, 60))
    expected = np.take_along_axis(oracle(keys, queries, sim_func), entries, 1)
    expected[entries < 0] = np.inf
    monkeypatch.setattr(nearest, "GATHERED_BYTES", 16 * 12 * 100)  # several blocks of pairs
    with pretended_gpu() as gpu:
        search = ExactSearch(keys, sim_func, devices)
        before = gpu.ran["copy to the GPU"]
        from_the_file = search.distances(queries, entries)
        assert gpu.ran["copy to the GPU"] == before
        search.search(queries, 5)  # leaves the keys there
        if "cpu" not in devices:
            monkeypatch.setattr(exact, "exact_distances", lambda *_: pytest.fail("the file was read"))
        if mistake is not None:
            monkeypatch.setattr(exact, "pair_distances", MISTAKES[mistake])

        def gathered() -> None:
            before = gpu.ran["aten::index"]
            found = search.distances(queries, entries)
            assert gpu.ran["aten::index"] > before and found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1.2e-7 if sim_func == "dot" else 1e-6)

        np.testing.assert_allclose(from_the_file, expected, rtol=1.2e-7 if sim_func == "dot" else 1e-6)
        if mistake is None:
            gathered()
        else:
            with pytest.raises((AssertionError, RuntimeError)):
                gathered()
