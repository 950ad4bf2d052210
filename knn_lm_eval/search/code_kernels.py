# mypy: disable-error-code="no-untyped-def"
"""Distances by codes, compiled: a table per query of what each code byte adds, and per entry the sum of its bytes."""

from __future__ import annotations

import numpy as np

from knn_lm_eval.compiling import compiled


# None of these is parallel: a step of few sequences is a fraction of a millisecond, less than waking threads takes.
@compiled(fastmath=True)
def _tabulate_signs(query, table):
    """The sums of 8 components with the signs of each byte: those of a byte that has one more bit set differ by twice
    a component."""
    for m in range(len(table)):
        row, first = table[m], 8 * m
        row[0] = -query[first : first + 8].sum()
        for w in range(8):
            bit, twice = 1 << w, 2 * query[first + w]
            for c in range(bit):
                row[bit + c] = row[c] + twice


@compiled(fastmath=True)
def _tabulate_codewords(query, codebooks, table):
    """The inner products of the query's parts with what each code byte stands for."""
    code_bytes, width, _ = codebooks.shape
    for m in range(code_bytes):
        row = table[m]
        row[:] = 0
        for w in range(width):
            component, codewords = query[m * width + w], codebooks[m, w]
            for c in range(256):
                row[c] += component * codewords[c]


# Without fastmath, which has the sums done by gather instructions: they take longer than loads. Four entries side by
# side take half the time of one after the other, for their loads wait together.
@compiled
def _sum_up(table, codes, entries, count, totals):
    """What the tables hold for the code bytes of the first ``count`` entries, added up per entry."""
    code_bytes, together = len(table), count - count % 4
    for j in range(0, together, 4):
        code_0, code_1, code_2, code_3 = (
            codes[entries[j]],
            codes[entries[j + 1]],
            codes[entries[j + 2]],
            codes[entries[j + 3]],
        )
        total_0 = total_1 = total_2 = total_3 = np.float32(0.0)
        for m in range(code_bytes):
            row = table[m]
            total_0 += row[code_0[m]]
            total_1 += row[code_1[m]]
            total_2 += row[code_2[m]]
            total_3 += row[code_3[m]]
        totals[j], totals[j + 1], totals[j + 2], totals[j + 3] = total_0, total_1, total_2, total_3
    for j in range(together, count):
        code, total = codes[entries[j]], np.float32(0.0)
        for m in range(code_bytes):
            total += table[m, code[m]]
        totals[j] = total


@compiled(fastmath=True)
def look_up(
    queries, centroids, base_offsets, codebooks, is_rabitq, entries, counts, lists, offsets, scales, codes, distances
):
    """The distances from queries to entries, by the codes and tables of ``CodeDistances``, which says what they are.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``, as the index's lists hold vectors.
    entries, counts : int64 ``[n, m]`` and ``[n]``; the first ``counts[i]`` of row i count.
    distances : float32 ``[n, m]``, written to; undefined beyond the counts.
    """
    table = np.empty((codes.shape[1], 256), dtype=np.float32)  # <query, what a code byte stands for>
    base = np.empty(len(centroids), dtype=np.float32)  # [lists], where known
    for i in range(len(queries)):
        query = queries[i]
        if is_rabitq:
            _tabulate_signs(query, table)
        else:
            _tabulate_codewords(query, codebooks, table)
        _sum_up(table, codes, entries[i], counts[i], distances[i])
        squared = np.float32(0.0)
        for d in range(len(query)):
            squared += query[d] * query[d]
        known = np.zeros(len(centroids), dtype=np.bool_)
        for j in range(counts[i]):
            entry = entries[i, j]
            number = lists[entry]
            if not known[number]:
                known[number] = True
                dot, centroid = np.float32(0.0), centroids[number]
                for d in range(len(query)):
                    dot += query[d] * centroid[d]
                base[number] = squared - 2 * dot + base_offsets[number]
            distances[i, j] = base[number] + offsets[entry] + scales[entry] * distances[i, j]


@compiled
def factors_of_signs(signs, factors, centroid, offsets, scales):
    """The offsets and scales of entries x of one list by RaBitQ, see ``CodeDistances``.

    Parameters
    ----------
    signs : uint8 ``[n, code bytes]``, those of x - c, the first in the lowest bit.
    factors : float32 ``[n, 2]``: |x - c|^2 and |x - c|^2 sqrt(d) / |x - c|_1.
    centroid : float32 ``[dimension]``, c.
    offsets, scales : float32 ``[n]``, written to.
    """
    table = np.empty((signs.shape[1], 256), dtype=np.float32)
    _tabulate_signs(centroid, table)
    root = np.float32(np.sqrt(len(centroid)))
    for i in range(len(signs)):
        signed = 0.0
        for m in range(len(table)):
            signed += table[m, signs[i, m]]
        multiplier = factors[i, 1] / root
        offsets[i] = factors[i, 0] + np.float32(2) * multiplier * np.float32(signed)
        scales[i] = np.float32(-2) * multiplier
