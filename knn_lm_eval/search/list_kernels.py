"""The compiled steps of joining inverted lists; see ``segments`` for what they do.

Files are looked at as bytes, ``data``. What is kept of the entries is ``kept [count]``, bytes of 0 and 1, with
``ranks``, how many are kept before every ``RANK_RUN``-th; both are empty where all are.
"""

from __future__ import annotations

import numpy as np

from knn_lm_eval.compiling import compiled

RANK_RUN = 256  # entries
DONE = -1


@compiled
def _number(data, at):  # type: ignore[no-untyped-def]
    """The 64-bit integer whose bytes begin there."""
    number = np.int64(0)
    for byte in range(8):
        number |= np.int64(data[at + byte]) << (8 * byte)
    return number


@compiled
def _put(number, data, at):  # type: ignore[no-untyped-def]
    for byte in range(8):
        data[at + byte] = (number >> (8 * byte)) & 255


@compiled(nogil=True)
def walk_blocks(data, begin, per_block, block_bytes, starts):  # type: ignore[no-untyped-def]
    """Fill in where each list in blocks begins, and where the last ends; returns whether they are whole."""
    at = begin
    for i in range(len(starts) - 1):
        starts[i] = at
        if at + 16 > len(data):
            return False
        size = _number(data, at)
        if size < 0 or size > (len(data) - at) // 8 or at + 16 + 8 * size > len(data):
            return False
        code_bytes = _number(data, at + 8 + 8 * size)
        if code_bytes != -(-size // per_block) * block_bytes:
            return False
        at += 16 + 8 * size + code_bytes
    starts[-1] = at
    return at <= len(data)


@compiled
def _new_number(entry, kept, ranks):  # type: ignore[no-untyped-def]
    """What an entry is called among those that are kept; -1 where it is not."""
    if len(kept) == 0:
        return entry
    if kept[entry] == 0:
        return np.int64(-1)
    rank = ranks[entry // RANK_RUN]
    for before in range(entry - entry % RANK_RUN, entry):
        rank += kept[before]
    return rank


@compiled(nogil=True)
def count_kept(data, ids, sizes, first, entries, kept, counts):  # type: ignore[no-untyped-def]
    """Add to each list's count those of its entries that are kept; returns the list that names another, or ``DONE``.

    Parameters
    ----------
    ids, sizes : int64 ``[lists]``, where each list's numbers begin, and how many they are.
    first, entries : what the file calls 0, and how many it has.
    """
    for i in range(len(sizes)):
        for j in range(sizes[i]):
            entry = _number(data, ids[i] + 8 * j)
            if entry < 0 or entry >= entries:
                return i
            counts[i] += kept[first + entry]
    return DONE


@compiled(nogil=True)
def join_arrays(data, at, sizes, firsts, entries, code_size, kept, ranks, out):  # type: ignore[no-untyped-def]
    """Lists that are arrays of codes and of numbers, each joined from those of all segments.

    Parameters
    ----------
    at, sizes : int64 ``[segments, lists]``, where a list begins in ``data``, and how many entries it has.
    firsts, entries : int64 ``[segments]``, as for ``count_kept``.
    out : the bytes of the joined lists, one after the other.

    Returns
    -------
    The segment that names an entry that it does not have, or ``DONE``.
    """
    segments, lists = at.shape
    begin = 0
    numbers = np.empty(sizes.sum(0).max(), dtype=np.int64)
    for i in range(lists):
        size, end = 0, begin
        for s in range(segments):
            codes = at[s, i]
            ids = codes + sizes[s, i] * code_size
            for j in range(sizes[s, i]):
                entry = _number(data, ids + 8 * j)
                if entry < 0 or entry >= entries[s]:
                    return s
                number = _new_number(firsts[s] + entry, kept, ranks)
                if number >= 0:
                    for byte in range(code_size):
                        out[end + byte] = data[codes + j * code_size + byte]
                    end += code_size
                    numbers[size] = number
                    size += 1
        for j in range(size):
            _put(numbers[j], out, end + 8 * j)
        begin = end + 8 * size
    return DONE


@compiled(nogil=True)
def join_blocks(data, at, sizes, firsts, entries, places, block_bytes, counts, kept, ranks, out):  # type: ignore[no-untyped-def]
    """As ``join_arrays``, for lists whose codes are packed in blocks of several entries.

    Parameters
    ----------
    places : int64 ``[entries per block, half bytes of a code]``, where each lies, in half bytes of a block.
    counts : int64 ``[lists]``, how many entries are kept.
    out : zeros.
    """
    segments, lists = at.shape
    per_block, halves = places.shape
    whole = np.empty(halves // 2, dtype=np.bool_)  # code bytes that are bytes of the block as well
    for byte in range(halves // 2):
        lower, upper = places[:, 2 * byte], places[:, 2 * byte + 1]
        whole[byte] = (lower >= 0).all() and (lower % 2 == 0).all() and (upper == lower + 1).all()
    begin = 0
    for i in range(lists):
        ids_out = begin + 8
        blocks_out = ids_out + 8 * counts[i] + 8
        code_bytes = -(-counts[i] // per_block) * block_bytes
        _put(counts[i], out, begin)
        _put(code_bytes, out, blocks_out - 8)
        size = 0
        for s in range(segments):
            ids = at[s, i] + 8
            blocks = ids + 8 * sizes[s, i] + 8
            for j in range(sizes[s, i]):
                entry = _number(data, ids + 8 * j)
                if entry < 0 or entry >= entries[s]:
                    return s
                number = _new_number(firsts[s] + entry, kept, ranks)
                if number < 0:
                    continue
                _put(number, out, ids_out + 8 * size)
                here, there = j % per_block, size % per_block
                source = blocks + j // per_block * block_bytes
                target = blocks_out + size // per_block * block_bytes
                for byte in range(halves // 2):
                    if whole[byte]:
                        out[target + places[there, 2 * byte] // 2] = data[source + places[here, 2 * byte] // 2]
                        continue
                    for half in range(2 * byte, 2 * byte + 2):
                        a, b = places[here, half], places[there, half]
                        if a >= 0:
                            value = (data[source + a // 2] >> (4 * (a % 2))) & 15
                            out[target + b // 2] |= value << (4 * (b % 2))
                size += 1
        begin = blocks_out + code_bytes
    return DONE
