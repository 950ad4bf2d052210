"""What an index's lists hold of a range of entries, list by list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from knn_lm_eval.search.faiss_index import below_transform


class ListRanges:
    """The lists of an index, or of a part of it.

    Parameters
    ----------
    index, first_id : the part, and the entry that it calls 0.
    """

    def __init__(self, index: faiss.Index, first_id: int) -> None:
        self.ivf, self._first_id = below_transform(index), first_id
        self._inverted: Any = self.ivf.invlists
        # Of other programs' lists the entries may come in any order.
        self._ascending = [bool((ids[1:] > ids[:-1]).all()) for _, ids in self._all()]

    def _all(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each list's number and entries."""
        for number in range(self.ivf.nlist):
            size = self._inverted.list_size(number)
            yield number, faiss.rev_swig_ptr(self._inverted.get_ids(number), size) if size else np.empty(0, np.int64)

    def within(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """What lists hold of the entries ``[begin, end)``.

        Yields
        ------
        A list's number; int64 ``[n]``, where in it these entries are, ascending; int64 ``[n]``, which of the range they
        are.
        """
        for number, ids in self._all():
            rows = self._rows(number, ids, begin - self._first_id, end - self._first_id)
            if len(rows):
                yield number, rows, ids[rows] + (self._first_id - begin)

    def _rows(self, number: int, ids: np.ndarray, begin: int, end: int) -> np.ndarray:
        if self._ascending[number]:
            first, last = np.searchsorted(ids, (begin, end)).tolist()
            return np.arange(first, last)
        return np.flatnonzero((ids >= begin) & (ids < end))

    def codes(self, number: int, entry_bytes: int, entries: int) -> np.ndarray:
        """A list's codes as they lie there, uint8 ``[entries, entry_bytes]``; of lists in blocks those."""
        codes = self._inverted.get_codes(number)
        return faiss.rev_swig_ptr(codes, entries * entry_bytes).reshape(entries, entry_bytes)

    def size(self, number: int) -> int:
        """How many entries a list has."""
        return self._inverted.list_size(number)
