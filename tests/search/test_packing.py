"""What goes between machines comes out as it went in, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from knn_lm_eval.search.packing import narrowed, packed_queries, unpacked_queries

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)


@given(arrays(np.float32, SHAPES, elements=st.floats(width=32)))
def test_queries_come_out_bit_for_bit(queries: np.ndarray) -> None:
    unpacked = unpacked_queries(packed_queries(queries))
    assert unpacked.dtype == np.float32 and unpacked.tobytes() == queries.tobytes()


@given(arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False)))
def test_what_an_lm_computes_in_bfloat16_takes_two_bytes(queries: np.ndarray) -> None:
    queries = (queries.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    packed = packed_queries(queries)
    assert packed.itemsize == 2
    assert unpacked_queries(packed).tobytes() == queries.tobytes()


@given(arrays(np.float16, SHAPES, elements=st.floats(width=16, allow_nan=False)))
def test_what_an_lm_computes_in_float16_takes_two_bytes(queries: np.ndarray) -> None:
    packed = packed_queries(queries.astype(np.float32))
    assert packed.itemsize == 2
    assert unpacked_queries(packed).tobytes() == queries.astype(np.float32).tobytes()


def test_other_queries_stay_as_they_are() -> None:
    queries = np.array([[1 / 3, 0.5]], dtype=np.float32)
    assert packed_queries(queries) is queries


def test_queries_that_lie_apart_are_packed_as_well() -> None:
    queries = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(unpacked_queries(packed_queries(queries)), queries)


@given(arrays(np.int64, SHAPES, elements=st.integers(-(2**63), 2**63 - 1)))
def test_integers_are_the_same(integers: np.ndarray) -> None:
    np.testing.assert_array_equal(narrowed(integers).astype(np.int64), integers)


@pytest.mark.parametrize(
    ("integers", "size"),
    [([], 2), ([-1, 2**15 - 1], 2), ([0, 2**16 - 1], 2), ([-1, 2**16 - 1], 4), ([0, 2**32 - 1], 4), ([-1, 2**32], 8)],
)
def test_integers_take_the_bytes_that_the_largest_takes(integers: list[int], size: int) -> None:
    assert narrowed(np.array(integers, dtype=np.int64)).itemsize == size
