"""The compiled steps of a search of sign codes (RaBitQ of one bit); see ``sign_codes`` for what they compute.

The same query gives the same bits wherever it stands among others: each sum is added up in one order, and equal
distances rank by their entries' numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import intrinsic

from knn_lm_eval.compiling import compiled

BLOCK = 32  # entries whose codes lie side by side
PLANES = 8  # bits of a query's components, as in faiss's searches
ROWS = 4  # queries that products are computed of at once
COLUMNS = 256
BUCKETS = 1024
LARGE = np.float32(1e38)  # what distances are below
NOWHERE = np.float32(3e38)  # offset of what is no entry
LEAST_BUFFER = 2048  # neighbours that are kept beside the k nearest until the farthest are left out


@intrinsic
def _count_ones(typing_context: Any, word: Any) -> Any:
    """The bits of a word that are set: one instruction for eight words, where the processor has it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return word(word), generate


@compiled(nogil=True, fastmath={"contract"})
def products(queries, table, out):  # type: ignore[no-untyped-def]
    """Inner products ``out [n, columns]`` of queries ``[n, rows]`` with the columns of ``table [rows, columns]``."""
    n, dimension = queries.shape
    columns = table.shape[1]
    sums = np.empty((ROWS, COLUMNS), dtype=np.float32)
    some = np.zeros((ROWS, dimension + 1), dtype=np.float32)
    last = np.zeros(COLUMNS, dtype=np.float32)  # beside an odd number of rows
    for first in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - first)
        for start in range(0, n, ROWS):
            there = min(ROWS, n - start)
            some[:there, :dimension] = queries[start : start + there]
            sums[:] = 0
            a, b, c, d = sums[0], sums[1], sums[2], sums[3]
            for row in range(0, dimension, 2):
                one = table[row, first : first + width]
                two = table[row + 1, first : first + width] if row + 1 < dimension else last[:width]
                a1, b1, c1, d1 = some[0, row], some[1, row], some[2, row], some[3, row]
                a2, b2, c2, d2 = some[0, row + 1], some[1, row + 1], some[2, row + 1], some[3, row + 1]
                for j in range(width):
                    x, y = one[j], two[j]
                    a[j] += x * a1 + y * a2
                    b[j] += x * b1 + y * b2
                    c[j] += x * c1 + y * c2
                    d[j] += x * d1 + y * d2
            out[start : start + there, first : first + width] = sums[:there, :width]


@compiled(nogil=True)
def _slice_bits(query, planes):  # type: ignore[no-untyped-def]
    """Write the components' bits, as numbers v = delta (2 u - 255) with u of 8 bits, plane by plane; returns delta."""
    farthest = np.float32(0)
    for i in range(len(query)):
        farthest = max(farthest, abs(query[i]))
    top = np.float32(2**PLANES - 1)
    delta = farthest / top if farthest > 0 else np.float32(1)
    planes[:] = 0
    for i in range(len(query)):
        u = np.int64(math.floor((query[i] / delta + top) * np.float32(0.5) + np.float32(0.5)))
        u = min(max(u, 0), 2**PLANES - 1)
        for j in range(PLANES):
            planes[j, i >> 6] |= np.uint64((u >> j) & 1) << np.uint64(i & 63)
    return delta


@compiled(nogil=True, inline="always")
def _code_of(distance_bits):  # type: ignore[no-untyped-def]
    """A float32's bits as a number that grows with it."""
    sign = distance_bits >> np.uint32(31)
    return distance_bits ^ (np.uint32(0x80000000) | (np.uint32(0) - sign))


@compiled(nogil=True)
def _distances_of(keys, count, distances):  # type: ignore[no-untyped-def]
    """Write the distances that stand in the upper halves of keys."""
    bits = distances.view(np.uint32)
    for i in range(count):
        code = np.uint32(keys[i] >> np.uint64(32))
        bits[i] = code ^ np.uint32(0x80000000) if code >> np.uint32(31) else ~code


@compiled(nogil=True, fastmath={"nnan", "reassoc"})
def _bucket_counts(keys, count, k, distances, buckets, counts):  # type: ignore[no-untyped-def]
    """Count keys by buckets of their distances, which are finite; returns the last that the k nearest need."""
    _distances_of(keys, count, distances)
    least, most = distances[0], distances[0]
    for i in range(count):
        least, most = min(least, distances[i]), max(most, distances[i])
    width = most * np.float32(0.25) - least * np.float32(0.25)  # which no two numbers overflow
    scale = np.float32(BUCKETS - 1) / width if width > np.float32(1e-30) else np.float32(0)
    for i in range(count):
        bucket = np.int32((distances[i] * np.float32(0.25) - least * np.float32(0.25)) * scale)
        buckets[i] = min(max(bucket, 0), BUCKETS - 1)
    counts[:] = 0
    for i in range(count):
        counts[buckets[i]] += 1
    total, last = counts[0], 0
    while total < k:
        last += 1
        total += counts[last]
    return last


@compiled(nogil=True)
def _keep_nearest(keys, count, k, distances, buckets, counts):  # type: ignore[no-untyped-def]
    """Bring the k least of ``count`` keys to the front, perhaps with some more; returns how many."""
    last = _bucket_counts(keys, count, k, distances, buckets, counts)
    kept = 0
    for i in range(count):
        keys[kept] = keys[i]
        kept += buckets[i] <= last
    if kept > k + LEAST_BUFFER // 2:  # as where most are equally far
        keys[:kept].sort()
        kept = k
    return kept


@compiled(nogil=True)
def _sort_nearest(keys, count, k, distances, buckets, counts, ordered):  # type: ignore[no-untyped-def]
    """Write the k least of ``count`` keys to ``ordered``, the least first."""
    last = _bucket_counts(keys, count, k, distances, buckets, counts)
    total = 0
    for bucket in range(last + 1):
        size = counts[bucket]
        counts[bucket] = total
        total += size
    for i in range(count):
        bucket = buckets[i]
        if bucket <= last:
            ordered[counts[bucket]] = keys[i]
            counts[bucket] += 1
    start = 0
    for bucket in range(last + 1):  # counts are now where buckets end
        end = counts[bucket]
        if end - start > 32:
            ordered[start:end].sort()
        else:
            for i in range(start + 1, end):
                key, j = ordered[i], i - 1
                while j >= start and ordered[j] > key:
                    ordered[j + 1] = ordered[j]
                    j -= 1
                ordered[j + 1] = key
        start = end


@compiled(nogil=True, fastmath={"contract", "reassoc"})
def _base(query, centroid, dot):  # type: ignore[no-untyped-def]
    """|q - c|^2, or for inner products |c|^2 / 2 - <q, c>."""
    base = np.float32(0)
    for j in range(len(query)):
        c = centroid[j]
        base += c * (np.float32(0.5) * c - query[j]) if dot else (query[j] - c) * (query[j] - c)
    return base


@compiled(nogil=True)
def scan(  # type: ignore[no-untyped-def]
    queries, lists, centroids, centre, dot, sizes, starts, codes, offsets, scales, entries, kept, k, distances, found
):
    """Find the k nearest of the entries in some lists.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``, as the lists hold vectors.
    lists : int64 ``[n, probe]``, which to visit, in any order; negative ones are left out.
    centroids, centre, dot, sizes, starts, codes, offsets, scales, entries : see ``SignCodes``.
    kept : uint8 ``[entries / 8]``, a bit for each entry, set for those that count; none where all do.
    distances, found : float32 and int64 ``[n, k]``, filled here; infinity and -1 where there are no more.

    Returns
    -------
    How many entries were compared.
    """
    dimension, words = queries.shape[1], codes.shape[1]
    planes = np.empty((PLANES, words), dtype=np.uint64)
    sums, near = np.empty(BLOCK, dtype=np.uint64), np.empty(BLOCK, dtype=np.float32)
    near_bits = near.view(np.uint32)
    limit = 2 * k + LEAST_BUFFER
    keys, ordered = np.empty(limit + BLOCK, dtype=np.uint64), np.empty(limit + BLOCK, dtype=np.uint64)
    kept_distances = np.empty(limit + BLOCK, dtype=np.float32)
    buckets, counts = np.empty(limit + BLOCK, dtype=np.int32), np.empty(BUCKETS, dtype=np.int64)
    compared = 0
    for i in range(len(queries)):
        query, count, threshold = queries[i], 0, LARGE
        delta = _slice_bits(query - centre, planes)
        whole, step = delta * np.float32((2**PLANES - 1) * dimension), np.float32(-2) * delta
        for number in lists[i]:
            if number < 0:
                continue
            base = _base(query, centroids[number], dot)
            for block in range(starts[number], starts[number + 1]):
                code, first = codes[block], block * BLOCK
                sums[:] = 0
                for half in range(0, PLANES, 4):
                    shift = np.uint64(half)
                    for w in range(words):
                        p, q, r, s = planes[half, w], planes[half + 1, w], planes[half + 2, w], planes[half + 3, w]
                        for e in range(BLOCK):
                            word = code[w, e]
                            ones = _count_ones(word ^ s)
                            ones = ones + ones + _count_ones(word ^ r)
                            ones = ones + ones + _count_ones(word ^ q)
                            ones = ones + ones + _count_ones(word ^ p)
                            sums[e] += ones << shift
                any_near = False
                for e in range(BLOCK):
                    product = whole + step * np.float32(np.int32(sums[e]))
                    near[e] = base + (offsets[first + e] + scales[first + e] * product)
                for e in range(BLOCK):
                    if not dot:
                        near[e] = max(near[e], np.float32(0))
                    any_near |= near[e] <= threshold
                if any_near:
                    if len(kept):  # a second look, at those alone that are near
                        for e in range(BLOCK):
                            entry = entries[first + e]
                            if near[e] <= threshold and not (kept[entry >> 3] >> (entry & 7)) & 1:
                                near[e] = NOWHERE
                    for e in range(BLOCK):
                        key = np.uint64(_code_of(near_bits[e])) << np.uint64(32)
                        keys[count] = key | np.uint64(entries[first + e])
                        count += near[e] <= threshold
                    if count > limit:
                        count = _keep_nearest(keys, count, k, kept_distances, buckets, counts)
                        _distances_of(keys, count, kept_distances)
                        threshold = kept_distances[0]
                        for j in range(count):
                            threshold = max(threshold, kept_distances[j])
            compared += sizes[number]
        there = min(count, k)
        if there:
            _sort_nearest(keys, count, there, kept_distances, buckets, counts, ordered)
            _distances_of(ordered, there, distances[i])
        for j in range(there):
            found[i, j] = np.int64(ordered[j] & np.uint64(0xFFFFFFFF))
        distances[i, there:] = np.inf
        found[i, there:] = -1
    return compared


@compiled(nogil=True)
def nearest_lists(products_, norms, probe, lists):  # type: ignore[no-untyped-def]
    """Write the ``probe`` lists whose centroids are nearest, the nearest first and the earlier of equally near ones.

    Parameters
    ----------
    products_ : float32 ``[n, lists]``, of queries and centroids.
    norms : float32 ``[lists]``, half the squares of the centroids' lengths; 0 where the inner product ranks.
    lists : int64 ``[n, probe]``.
    """
    many = len(norms)
    values = np.empty(many, dtype=np.float32)
    bits = values.view(np.uint32)
    keys, ordered = np.empty(many, dtype=np.uint64), np.empty(many, dtype=np.uint64)
    distances, buckets = np.empty(many, dtype=np.float32), np.empty(many, dtype=np.int32)
    counts = np.empty(BUCKETS, dtype=np.int64)
    for i in range(len(products_)):
        for j in range(many):
            value = norms[j] - products_[i, j]
            values[j] = value if abs(value) < LARGE else np.float32(0)  # of a query that is not a number
        for j in range(many):
            keys[j] = np.uint64(_code_of(bits[j])) << np.uint64(32) | np.uint64(j)
        _sort_nearest(keys, many, probe, distances, buckets, counts, ordered)
        for j in range(probe):
            lists[i, j] = np.int64(ordered[j] & np.uint64(0xFFFFFFFF))


@compiled(nogil=True)
def lay_out(  # type: ignore[no-untyped-def]
    flat, factors, ids, centroid, centre, dot, codes, offsets, scales, entries
):
    """Write the entries of one list in blocks.

    Parameters
    ----------
    flat : uint8 ``[n, code bytes]``, the signs of an entry's components, the first in the lowest bit.
    factors : float32 ``[n, 2]``: |x - c|^2 (less |x|^2 for inner products) and |x - c|^2 sqrt(d) / |x - c|_1.
    ids : int64 ``[n]``.
    centroid, centre : float32 ``[dimension]``.
    codes, offsets, scales, entries : those of the list, see ``SignCodes``; without anything in them.
    """
    dimension, root = len(centroid), np.float32(math.sqrt(len(centroid)))
    moved = centroid - centre
    half = np.float32(0.5) if dot else np.float32(1)
    for i in range(len(flat)):
        signed = 0.0
        for j in range(dimension):
            is_set = (flat[i, j >> 3] >> (j & 7)) & 1
            signed += moved[j] if is_set else -moved[j]
            codes[i // BLOCK, j >> 6, i % BLOCK] |= np.uint64(is_set) << np.uint64(j & 63)
        multiplier = np.float32(2) * half * factors[i, 1] / root
        offsets[i] = half * factors[i, 0] + multiplier * np.float32(signed)
        scales[i] = -multiplier
        entries[i] = np.uint32(ids[i])
