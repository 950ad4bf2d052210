"""Entries that are left out because they stand in the text that is scored, or it in the datastore.

At a position of a text an entry is left out where the tokens right before the two are the same, ``overlap`` of them or
more, none from before the entry's document; and where its document is one that is left out for the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from knn_lm_eval.methods.left_out_kernels import mark_left_out

NOTHING = -1  # in the place of a token, before the text's beginning


class Contexts(NamedTuple):
    """What stands before each of ``n`` positions, and which documents do not count there.

    Attributes
    ----------
    before : int32 ``[n, overlap]``, the tokens right before, the nearest last; -1 where the text has not so many.
    run_begins, run_ends : int64 ``[n]``: which of the runs count at each position.
    starts, stops : int64 ``[runs]``, entries of documents that do not count; those of a position ascend.
    """

    before: np.ndarray
    run_begins: np.ndarray
    run_ends: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of_text(cls, tokens: np.ndarray, first: int, count: int, overlap: int, runs: np.ndarray) -> Contexts:
        """Of consecutive positions of one text.

        Parameters
        ----------
        tokens : ``[tokens]``, the text, at least up to the last position.
        first, count : the positions; the tokens before the first one are ``tokens[:first]``.
        runs : int64 ``[2, runs]``, starts and stops of documents that do not count at any of them.
        """
        known = np.full(overlap + count - 1, NOTHING, dtype=np.int32)
        begin = max(0, first - overlap)
        some = tokens[begin : first + count - 1]
        known[len(known) - len(some) :] = some
        before = np.lib.stride_tricks.sliding_window_view(known, overlap)
        return cls(before, np.zeros(count, dtype=np.int64), np.full(count, runs.shape[1]), runs[0], runs[1])

    @classmethod
    def joined(cls, parts: Sequence[Contexts]) -> Contexts:
        """Those of several texts, one after the other."""
        offsets = np.cumsum([0, *(len(part.starts) for part in parts)]).tolist()
        return cls(
            np.concatenate([part.before for part in parts]),
            np.concatenate([part.run_begins + offset for part, offset in zip(parts, offsets, strict=False)]),
            np.concatenate([part.run_ends + offset for part, offset in zip(parts, offsets, strict=False)]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.stops for part in parts]),
        )

    def of_rows(self, rows: slice | np.ndarray) -> Contexts:
        """Those of some positions."""
        return Contexts(self.before[rows], self.run_begins[rows], self.run_ends[rows], self.starts, self.stops)


class TextPart(NamedTuple):
    """A datastore's text: its values and document starts, and the number of its first entry among those of several."""

    values: np.ndarray
    document_starts: np.ndarray
    first: int


def left_out(parts: Sequence[TextPart], contexts: Contexts, entries: np.ndarray) -> np.ndarray:
    """Which entries are left out.

    Parameters
    ----------
    entries : int64 ``[n, m]``, a row for each position; -1 in empty slots.

    Returns
    -------
    bool ``[n, m]``; False in empty slots.
    """
    marked = np.zeros(entries.shape, dtype=np.bool_)
    of_positions = *map(np.ascontiguousarray, contexts), np.ascontiguousarray(entries)
    for values, document_starts, first in parts:
        mark_left_out(np.asarray(values), np.asarray(document_starts), first, *of_positions, marked)
    return marked
