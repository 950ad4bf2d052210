"""Fewer bytes for the same numbers, on their way between machines."""

from __future__ import annotations

import numpy as np


def packed_queries(queries: np.ndarray) -> np.ndarray:
    """Queries in 16 bits a number where that loses nothing, as for an LM that computes in 16 bits.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``.

    Returns
    -------
    uint16 of the same shape, the upper halves of numbers that are bfloat16's; float16, where all numbers are that;
    otherwise the queries.
    """
    bits = np.ascontiguousarray(queries).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        halves = queries.astype(np.float16)
    return halves if np.array_equal(halves.astype(np.float32).view(np.uint32), bits) else queries


def unpacked_queries(packed: np.ndarray) -> np.ndarray:
    """The queries that ``packed_queries`` was given, float32."""
    if packed.dtype == np.uint16:
        return (packed.astype(np.uint32) << 16).view(np.float32)
    return packed.astype(np.float32, copy=False)


def narrowed(integers: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that holds them all, of 2 bytes at least."""
    if not integers.size:
        return integers.astype(np.int16)
    least, most = int(integers.min()), int(integers.max())
    for kind in (np.int16, np.uint16, np.int32, np.uint32):
        limits = np.iinfo(kind)
        if limits.min <= least and most <= limits.max:
            return integers.astype(kind)
    return integers
