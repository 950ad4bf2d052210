"""The compiled look-ups in a suffix array: which suffixes begin with some tokens, and what comes after them.

A part of a text is ``text``, int32 ``[count]``; ``begins``, uint8, has a bit for each of its places, set where a
document begins; ``order``, int32, has the places of its suffixes, sorted, where a suffix ends with its document and
comes before those that go on; ``heads``, int64 ``[tokens + 1]``, says where in the order the suffixes begin whose first
token is each. Those that begin with some ``depth`` tokens are a run of the order, from ``low`` on and before ``high``.
"""

from __future__ import annotations

import numpy as np

from knn_lm_eval.compiling import compiled

ENDED = -1  # in the place of a token, where a document has ended


@compiled
def _token_at(text: np.ndarray, begins: np.ndarray, place: int, depth: int) -> int:
    """What stands ``depth`` tokens, 1 or more, behind a place of whose document all before it is."""
    at = place + depth
    if at >= len(text) or begins[at >> 3] >> (at & 7) & 1:
        return ENDED
    return text[at]


@compiled
def _first_not_below(
    text: np.ndarray, begins: np.ndarray, order: np.ndarray, low: int, high: int, depth: int, token: int
) -> int:
    """Of a run of suffixes with ``depth`` tokens in common, the first whose next token is at least ``token``."""
    while low < high:
        middle = (low + high) >> 1
        if _token_at(text, begins, order[middle], depth) < token:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def narrowed(
    text: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    heads: np.ndarray,
    low: int,
    high: int,
    depth: int,
    token: int,
) -> tuple[int, int]:
    """Of a run of suffixes with ``depth`` tokens in common those whose next token is ``token``: a run, may be empty."""
    if low >= high or token < 0:
        return low, low
    if depth == 0:
        return (heads[token], heads[token + 1]) if token < len(heads) - 1 else (low, low)
    first, last = order[low], order[high - 1]
    at_first, at_last = _token_at(text, begins, first, depth), _token_at(text, begins, last, depth)
    if at_first > token or at_last < token:
        return low, low
    if at_first < token:
        low = _first_not_below(text, begins, order, low + 1, high - 1, depth, token)
    if at_last > token:
        # Most runs are short: steps are doubled from their beginning.
        step, below = 1, low
        while below + step < high and _token_at(text, begins, order[below + step], depth) <= token:
            below += step
            step *= 2
        high = _first_not_below(text, begins, order, below, min(below + step, high - 1), depth, token + 1)
    return low, high


@compiled
def without_ended(
    text: np.ndarray, begins: np.ndarray, order: np.ndarray, low: int, high: int, depth: int
) -> tuple[int, int]:
    """Of a run of suffixes with ``depth`` tokens in common those that go on in their document."""
    if depth > 0 and low < high and _token_at(text, begins, order[low], depth) == ENDED:
        low = _first_not_below(text, begins, order, low + 1, high, depth, 0)
    return low, high


@compiled
def _run_of(
    text: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    heads: np.ndarray,
    tokens: np.ndarray,
    start: int,
    stop: int,
    continued: bool,
) -> tuple[int, int]:
    """The suffixes that begin with ``tokens[start:stop]`` (and, where ``continued``, go on)."""
    low, high = 0, len(order)
    for at in range(start, stop):
        low, high = narrowed(text, begins, order, heads, low, high, at - start, tokens[at])
        if low == high:
            return low, high
    return without_ended(text, begins, order, low, high, stop - start) if continued else (low, high)


@compiled
def longest_runs(
    text: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    heads: np.ndarray,
    tokens: np.ndarray,
    first: int,
    continued: bool,
    lengths: np.ndarray,
    lows: np.ndarray,
    highs: np.ndarray,
) -> None:
    """For each context ``tokens[:first + i]`` the longest end of it that occurs, and its run of suffixes.

    From one context to the next the end grows by a token at most, and where it does not its beginning moves on: by one
    token, then by two, and so on, and then back to where it occurs first.

    Parameters
    ----------
    continued : whether only what goes on in its document counts.
    lengths, lows, highs : int64 ``[contexts]``, filled in.
    """
    start, low, high = first, 0, len(order)
    for i in range(len(lengths)):
        stop = first + i
        if i == 0:
            # As if all before had failed: how far back it goes is found out by doubling, too.
            bad, step = -1, 1
            while start > 0:
                trial = max(0, stop - step)
                found_low, found_high = _run_of(text, begins, order, heads, tokens, trial, stop, continued)
                if found_low == found_high:
                    bad = trial
                    break
                start, low, high = trial, found_low, found_high
                step *= 2
        else:
            bad = start
            depth = stop - 1 - start
            found_low, found_high = narrowed(text, begins, order, heads, low, high, depth, tokens[stop - 1])
            if continued:
                found_low, found_high = without_ended(text, begins, order, found_low, found_high, depth + 1)
            step = 1
            while found_low == found_high:
                start = bad + step
                if start >= stop:
                    start, found_low, found_high = stop, 0, len(order)
                    break
                found_low, found_high = _run_of(text, begins, order, heads, tokens, start, stop, continued)
                if found_low == found_high:
                    bad = start
                    step *= 2
            low, high = found_low, found_high
        while start - bad > 1:
            trial = (start + bad) // 2
            found_low, found_high = _run_of(text, begins, order, heads, tokens, trial, stop, continued)
            if found_low == found_high:
                bad = trial
            else:
                start, low, high = trial, found_low, found_high
        lengths[i], lows[i], highs[i] = stop - start, low, high


@compiled
def ngram_runs(
    text: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    heads: np.ndarray,
    tokens: np.ndarray,
    size: int,
    lows: np.ndarray,
    highs: np.ndarray,
) -> None:
    """The suffixes that begin with each ``size`` consecutive tokens.

    Parameters
    ----------
    lows, highs : int64 ``[tokens - size + 1]``, filled in.
    """
    for i in range(len(lows)):
        lows[i], highs[i] = _run_of(text, begins, order, heads, tokens, i, i + size, False)


@compiled
def count_next(
    text: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    heads: np.ndarray,
    lows: np.ndarray,
    highs: np.ndarray,
    depths: np.ndarray,
    targets: np.ndarray,
    counts: np.ndarray,
) -> None:
    """How often each target comes next in a run of suffixes with ``depths`` tokens in common; all ``[pairs]``."""
    for i in range(len(targets)):
        low, high = narrowed(text, begins, order, heads, lows[i], highs[i], depths[i], targets[i])
        counts[i] = high - low


@compiled
def next_tokens(
    text: np.ndarray,
    begins: np.ndarray,
    order: np.ndarray,
    heads: np.ndarray,
    low: int,
    high: int,
    depth: int,
    tokens: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Fill in the tokens that come next in a run of suffixes, ascending, and how often; returns how many there are.

    The time goes with the number of different tokens, and with the logarithm of how often each comes.
    """
    number = 0
    low, high = without_ended(text, begins, order, low, high, depth)
    while low < high:
        token = _token_at(text, begins, order[low], depth) if depth else text[order[low]]
        _, after = narrowed(text, begins, order, heads, low, high, depth, token)
        tokens[number], counts[number] = token, after - low
        number += 1
        low = after
    return number


@compiled
def common_runs(
    text: np.ndarray,
    document_starts: np.ndarray,
    tokens: np.ndarray,
    positions: np.ndarray,
    places: np.ndarray,
    most: int,
    lengths: np.ndarray,
) -> None:
    """How many tokens before a position and before a place of the text, within its document, are the same ones.

    Parameters
    ----------
    document_starts : int64, ascending; the first is 0.
    tokens : of the other text.
    positions, places : int64 ``[pairs]``.
    most : where to stop counting.
    lengths : int64 ``[pairs]``, filled in.
    """
    for i in range(len(positions)):
        position, place = positions[i], places[i]
        start = document_starts[np.searchsorted(document_starts, place, side="right") - 1]
        limit = min(most, position, place - start)
        length = 0
        while length < limit and tokens[position - 1 - length] == text[place - 1 - length]:
            length += 1
        lengths[i] = length
