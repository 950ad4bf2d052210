"""Which entries are left out at positions of a text, compiled."""

from __future__ import annotations

import numpy as np

from knn_lm_eval.compiling import compiled


@compiled
def mark_left_out(
    values: np.ndarray,
    document_starts: np.ndarray,
    first: int,
    before: np.ndarray,
    run_begins: np.ndarray,
    run_ends: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    entries: np.ndarray,
    marked: np.ndarray,
) -> None:
    """Mark the entries of one store that are left out.

    Parameters
    ----------
    values, document_starts : the store's.
    first : the number that its first entry has among all; the others' entries are passed over.
    before, run_begins, run_ends, starts, stops : as ``Contexts`` has them.
    entries : int64 ``[n, m]``.
    marked : bool ``[n, m]``, set where an entry is left out.
    """
    overlap = before.shape[1]
    for i in range(len(entries)):
        for j in range(entries.shape[1]):
            place = entries[i, j] - first
            if place < 0 or place >= len(values):
                continue
            if run_begins[i] < run_ends[i]:
                of_position = starts[run_begins[i] : run_ends[i]]
                run = run_begins[i] + np.searchsorted(of_position, entries[i, j], side="right") - 1
                if run >= run_begins[i] and entries[i, j] < stops[run]:
                    marked[i, j] = True
                    continue
            if place < overlap:
                continue
            length = 0
            while length < overlap and before[i, overlap - 1 - length] == values[place - 1 - length]:
                length += 1
            if length == overlap:
                # Its document is looked for where all tokens agree, which is seldom.
                document = np.searchsorted(document_starts, place, side="right") - 1
                if document_starts[document] <= place - overlap:
                    marked[i, j] = True


@compiled
def drop_marked(entries: np.ndarray, counts: np.ndarray, marked: np.ndarray) -> int:
    """Close the gaps that marked entries leave in rows that are filled from the left; returns how many there were.

    Parameters
    ----------
    entries, marked : int64 and bool ``[n, m]``; the entries are changed.
    counts : int64 ``[n]``, how many each row has; changed.
    """
    dropped = 0
    for i in range(len(entries)):
        kept = 0
        for j in range(counts[i]):
            if not marked[i, j]:
                entries[i, kept] = entries[i, j]
                kept += 1
        dropped += counts[i] - kept
        counts[i] = kept
    return dropped
