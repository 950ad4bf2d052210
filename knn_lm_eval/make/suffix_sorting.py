"""Sorting all suffixes of a sequence of numbers in linear time: SA-IS (Nong, Zhang & Chan 2009), in place.

A suffix is smaller than the one after it (S) or larger (L). An S suffix behind an L one (LMS) begins a piece of the
text that ends at the next such. These pieces are sorted, named by their ranks and, where some are equal, the suffixes
of the names' text are sorted by the same means; from the order of the LMS suffixes that of all others is induced.

Repeats do not matter: a text of one token over and over takes no longer. Memory: 8 bytes a symbol, half of which is the
result, and at most 4 more, where there are many names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from knn_lm_eval.compiling import compiled

BYTES_PER_SYMBOL = 12  # of memory, at most
MOST_SYMBOLS = 2**30

Advance = Callable[[float], None]


def sort_suffixes(symbols: np.ndarray, alphabet: int, advance: Advance = lambda share: None) -> np.ndarray:
    """Where each suffix of ``symbols`` begins, in the order of the suffixes.

    Parameters
    ----------
    symbols : int32 ``[n]``, at most ``MOST_SYMBOLS`` from 1 to ``alphabet`` - 1, the last one 0; overwritten.
    advance : is told, now and then, which share of all the work was done since it was told last.

    Returns
    -------
    int32 ``[n]``; the first is that of the last symbol alone.
    """
    order = np.empty(len(symbols), dtype=np.int32)
    _sort(symbols, order, alphabet, advance, 1.0)
    return order


def _sort(symbols: np.ndarray, order: np.ndarray, alphabet: int, advance: Advance, share: float) -> None:
    """Fill ``order``, as ``sort_suffixes``; it is ``share`` of all the work."""
    if len(symbols) == 1:
        order[0] = 0
        return
    _add_types(symbols)
    starts = _bucket_starts(symbols, alphabet)
    _place_unsorted(symbols, order, starts)
    _induce(symbols, order, starts)
    pieces = _gather_pieces(symbols, order)
    names = _name_pieces(symbols, order, pieces)
    advance(0.4 * share)
    of_pieces, named = order[:pieces], order[len(order) - pieces :]
    if names < pieces:
        del starts  # of as many symbols as there are names, deeper
        _sort(named, of_pieces, names, advance, 0.2 * share)
        starts = _bucket_starts(symbols, alphabet)
    else:
        of_pieces[named] = np.arange(pieces, dtype=np.int32)
        advance(0.2 * share)
    _place_sorted(symbols, order, starts, pieces)
    _induce(symbols, order, starts)
    advance(0.4 * share)


# Below, a symbol is ``symbol << 1 | type``, and type is 1 for S: one look into memory tells both.


@compiled
def _add_types(symbols: np.ndarray) -> None:
    last = len(symbols) - 1
    after, after_type = symbols[last], 1
    symbols[last] = after << 1 | 1
    for i in range(last - 1, -1, -1):
        here = symbols[i]
        of_type = after_type if here == after else int(here < after)
        symbols[i] = here << 1 | of_type
        after, after_type = here, of_type


def _bucket_starts(symbols: np.ndarray, alphabet: int) -> np.ndarray:
    """int32 ``[alphabet + 1]``: where in the order the suffixes of each first symbol begin."""
    starts = np.zeros(alphabet + 1, dtype=np.int32)
    _count(symbols, starts)
    return np.cumsum(starts, out=starts)


@compiled
def _count(symbols: np.ndarray, starts: np.ndarray) -> None:
    for i in range(len(symbols)):
        starts[(symbols[i] >> 1) + 1] += 1


@compiled
def _is_lms(symbols: np.ndarray, i: int) -> bool:
    return i > 0 and symbols[i] & 1 == 1 and symbols[i - 1] & 1 == 0


@compiled
def _place_unsorted(symbols: np.ndarray, order: np.ndarray, starts: np.ndarray) -> None:
    """Put LMS suffixes at the ends of their buckets, in any order."""
    ends = starts[1:].copy()
    order[:] = -1
    for i in range(1, len(symbols)):
        if _is_lms(symbols, i):
            symbol = symbols[i] >> 1
            ends[symbol] -= 1
            order[ends[symbol]] = i


@compiled
def _induce(symbols: np.ndarray, order: np.ndarray, starts: np.ndarray) -> None:
    """From the LMS suffixes, at the ends of their buckets, the order of all L, and from these that of all S."""
    free = starts[:-1].copy()
    for i in range(len(order)):
        before = order[i] - 1
        if before >= 0:
            found = symbols[before]
            if found & 1 == 0:
                order[free[found >> 1]] = before
                free[found >> 1] += 1
    free[:] = starts[1:]
    for i in range(len(order) - 1, -1, -1):
        before = order[i] - 1
        if before >= 0:
            found = symbols[before]
            if found & 1 == 1:
                free[found >> 1] -= 1
                order[free[found >> 1]] = before


@compiled
def _gather_pieces(symbols: np.ndarray, order: np.ndarray) -> int:
    """Move the LMS suffixes to the beginning of the order; returns how many they are."""
    count = 0
    for i in range(len(order)):
        if _is_lms(symbols, order[i]):
            order[count] = order[i]
            count += 1
    return count


@compiled
def _name_pieces(symbols: np.ndarray, order: np.ndarray, count: int) -> int:
    """Write the name of each piece, in the text's order, to the order's end; returns how many names there are.

    ``order`` begins with the places of the pieces, in their order. No two are neighbours in the text.
    """
    order[count:] = -1
    name, last = -1, -1
    for i in range(count):
        place = order[i]
        if last < 0 or not _are_equal(symbols, place, last):
            name += 1
            last = place
        order[count + place // 2] = name
    free = len(order)
    for i in range(len(order) - 1, count - 1, -1):
        if order[i] >= 0:
            free -= 1
            order[free] = order[i]
    return name + 1


@compiled
def _are_equal(symbols: np.ndarray, one: int, other: int) -> bool:
    """Whether two pieces are, their ends included."""
    if symbols[one] != symbols[other]:
        return False
    step = 1
    while one + step < len(symbols) and other + step < len(symbols):
        if symbols[one + step] != symbols[other + step]:
            return False
        ended, other_ended = _is_lms(symbols, one + step), _is_lms(symbols, other + step)
        if ended or other_ended:
            return ended and other_ended
        step += 1
    return False


@compiled
def _place_sorted(symbols: np.ndarray, order: np.ndarray, starts: np.ndarray, count: int) -> None:
    """Put the LMS suffixes at the ends of their buckets, in their order, which ``order`` begins with."""
    places = order[len(order) - count :]
    number = 0
    for i in range(1, len(symbols)):
        if _is_lms(symbols, i):
            places[number] = i
            number += 1
    for i in range(count):
        order[i] = places[order[i]]
    order[count:] = -1
    free = starts[1:].copy()
    for i in range(count - 1, -1, -1):
        place = order[i]
        order[i] = -1
        free[symbols[place] >> 1] -= 1
        order[free[symbols[place] >> 1]] = place
