"""Distances by codes against their formula in float64, one entry and one code byte at a time."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.search.code_distances import CodeDistances


def random_codes(
    rng: np.random.Generator, is_rabitq: bool, code_bytes: int, width: int, rotated: bool, scale: float = 1.0
) -> CodeDistances:
    """Codes of 50 entries in 6 lists, which no index made."""
    width = 8 if is_rabitq else width
    dimension, count, lists = code_bytes * width, 50, 6
    index: faiss.Index = faiss.IndexFlatL2(dimension)
    if rotated:
        rotation = faiss.RandomRotationMatrix(dimension, dimension)
        rotation.init(int(rng.integers(1000)))
        index = faiss.IndexPreTransform(rotation, index)
    if is_rabitq:
        signs = np.unpackbits(np.arange(256, dtype=np.uint8)[None], axis=0, bitorder="little") * 2.0 - 1  # [8, 256]
        codebooks = np.broadcast_to(signs, (code_bytes, 8, 256))
    else:
        codebooks = rng.standard_normal((code_bytes, width, 256)) * scale

    def floats(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return CodeDistances(
        index,
        floats(lists, dimension),
        floats(lists),
        np.ascontiguousarray(codebooks, dtype=np.float32),
        is_rabitq,
        rng.integers(0, lists, count).astype(np.int32),
        floats(count),
        floats(count),
        rng.integers(0, 256, (count, code_bytes)).astype(np.uint8),
    )


def slow_distances(codes: CodeDistances, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """base(query, list) + offset + scale * (the sum over code bytes of <part of the query, what the byte stands for>);
    beyond the counts NaN."""
    width = codes.codebooks.shape[1]
    distances = np.full(entries.shape, np.nan)
    for i, query in enumerate(codes.transformed(queries).astype(np.float64)):
        for j in range(counts[i]):
            entry = entries[i, j]
            number, total = codes.lists[entry], 0.0
            for m, byte in enumerate(codes.codes[entry]):
                total += query[m * width : (m + 1) * width] @ codes.codebooks[m, :, byte].astype(np.float64)
            base = query @ query - 2 * query @ codes.centroids[number].astype(np.float64) + codes.base_offsets[number]
            distances[i, j] = base + float(codes.offsets[entry]) + float(codes.scales[entry]) * total
    return distances


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    is_rabitq=st.booleans(),
    code_bytes=st.integers(1, 9),
    width=st.integers(1, 5),
    rotated=st.booleans(),
    counts=st.lists(st.integers(0, 13), min_size=1, max_size=4),
    spare=st.integers(0, 3),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_they_equal_their_formula(seed, is_rabitq, code_bytes, width, rotated, counts, spare, scale) -> None:
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, is_rabitq, code_bytes, width, rotated, scale)
    queries = (rng.standard_normal((len(counts), codes.centroids.shape[1])) * scale).astype(np.float32)
    entries = rng.integers(0, 50, (len(counts), max(counts) + spare))
    found = codes(queries, entries, np.array(counts))
    expected = slow_distances(codes, queries, entries, np.array(counts))
    there = np.arange(entries.shape[1]) < np.array(counts)[:, None]
    # Of sums that may cancel each other: rounding is of the size of what is added.
    added = code_bytes * (8 if is_rabitq else width) * max(scale, scale**3)
    np.testing.assert_allclose(found[there], expected[there], rtol=1e-5, atol=1e-5 * added)


@pytest.mark.parametrize("is_rabitq", [False, True])
def test_an_entry_s_distance_depends_on_no_other_entry(is_rabitq: bool) -> None:
    """Neither on how many there are, nor on where among them it stands: searches elsewhere give the same numbers."""
    rng = np.random.default_rng(3)
    codes = random_codes(rng, is_rabitq, 9, 4, rotated=False)
    queries = rng.standard_normal((1, codes.centroids.shape[1])).astype(np.float32)
    entries = rng.permutation(50)[None, :11]
    together = codes(queries, entries, np.array([11]))
    for j in range(11):
        assert codes(queries, entries[:, j:].copy(), np.array([11 - j]))[0, 0] == together[0, j]
