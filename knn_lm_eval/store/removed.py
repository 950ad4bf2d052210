"""Documents that were removed from a datastore and whose entries are still in its files: a mask that searches honour.

``removed.npy``, int64, has the documents' numbers, ascending. Their entries are few runs, since documents lie one after
the other, so a mask of all entries is made only where a search asks for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Removed:
    """Entries that do not count, in runs that do not touch each other.

    Attributes
    ----------
    starts, stops : int64 ``[runs]``, ascending.
    count : of all entries, those that do not count among them.
    documents : int64 ``[removed documents]``, their numbers, ascending.
    """

    starts: np.ndarray
    stops: np.ndarray
    count: int
    documents: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    _parts: dict[tuple[int, int], Removed] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_documents(cls, documents: np.ndarray, document_starts: np.ndarray, count: int) -> Removed:
        """The entries of some documents of a store of ``count`` entries, by the documents' numbers, ascending."""
        documents = np.asarray(documents, dtype=np.int64)
        begins = np.asarray(document_starts[documents])  # [documents]
        after = np.minimum(documents + 1, len(document_starts) - 1)
        ends = np.where(documents + 1 < len(document_starts), document_starts[after], count)  # [documents]
        there = begins < ends  # a document may be empty
        begins, ends = begins[there], ends[there]
        touches = begins[1:] == ends[:-1]
        return cls(
            begins[np.concatenate([[True], ~touches])] if len(begins) else begins,
            ends[np.concatenate([~touches, [True]])] if len(ends) else ends,
            count,
            documents,
        )

    def __len__(self) -> int:
        """How many entries do not count."""
        return int((self.stops - self.starts).sum())

    @property
    def kept(self) -> int:
        """How many do."""
        return self.count - len(self)

    @cached_property
    def _removed_before(self) -> np.ndarray:
        """int64 ``[runs + 1]``: how many do not count before each run, and in all."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)]).astype(np.int64)

    def are_removed(self, entries: np.ndarray) -> np.ndarray:
        """Which of some entries do not count, bool of their shape; none that is negative."""
        if not len(self.starts):
            return np.zeros(np.shape(entries), dtype=bool)
        run = np.searchsorted(self.starts, entries, side="right") - 1
        return (run >= 0) & (entries < self.stops[np.maximum(run, 0)])

    def kept_entries(self, ranks: np.ndarray) -> np.ndarray:
        """The entries that have these numbers when only those that count are numbered."""
        before = self._removed_before
        return ranks + before[np.searchsorted(self.starts - before[:-1], ranks, side="right")]

    def ranks(self, entries: np.ndarray) -> np.ndarray:
        """The numbers of entries that count when only such are numbered; -1 stays so."""
        before = self._removed_before
        return entries - before[np.searchsorted(self.starts, entries, side="right")]

    def within(self, start: int, stop: int | None = None) -> Removed:
        """The same of the entries from ``start`` to ``stop`` (None: to the end), counted from ``start``."""
        stop = self.count if stop is None else stop
        there = (self.stops > start) & (self.starts < stop)
        starts, stops = np.maximum(self.starts[there], start), np.minimum(self.stops[there], stop)
        return Removed(starts - start, stops - start, stop - start)

    def of_part(self, start: int, stop: int | None = None) -> Removed:
        """As ``within``, for a part of an index, which is searched again and again: its bits are made once."""
        place = start, self.count if stop is None else stop
        if place == (0, self.count):
            return self
        if place not in self._parts:
            self._parts[place] = self.within(*place)
        return self._parts[place]

    @cached_property
    def kept_bits(self) -> np.ndarray:
        """uint8 ``[count / 8, rounded up]``: a bit for each entry, the first the lowest; set for those that count."""
        bits = np.full(-(-self.count // 8), 0xFF, dtype=np.uint8)
        for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True):
            first, last = start // 8, -(-stop // 8)
            some = np.unpackbits(bits[first:last], bitorder="little")
            some[start - 8 * first : stop - 8 * first] = 0
            bits[first:last] = np.packbits(some, bitorder="little")
        return bits

    def kept_runs(self) -> list[tuple[int, int]]:
        """The runs of entries that count, in order."""
        ends = [0, *self.stops.tolist()]
        return [(a, b) for a, b in zip(ends, [*self.starts.tolist(), self.count], strict=True) if a < b]


class KeptKeys:
    """Keys without those that do not count, numbered anew: as an array, of which nothing is copied but what is read.

    Parameters
    ----------
    keys : ``[count, dimension]``, may be memory-mapped.
    removed : of these keys.
    start, stop : which of those that count, by their new numbers; None: to the end.
    """

    def __init__(self, keys: np.ndarray, removed: Removed, start: int = 0, stop: int | None = None) -> None:
        self._keys, self._removed = keys, removed
        self._start, self._stop = start, removed.kept if stop is None else stop
        self.dtype, self.itemsize = keys.dtype, keys.itemsize
        self.is_mapped = isinstance(keys, np.memmap)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._keys.shape[1]

    @property
    def size(self) -> int:
        return len(self) * self._keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    def run(self, start: int, stop: int) -> KeptKeys:
        """Some of them, of which nothing is read yet."""
        return KeptKeys(self._keys, self._removed, self._start + start, self._start + stop)

    def __getitem__(self, some: slice) -> np.ndarray:
        """Some of them, read."""
        ranks = np.arange(len(self))[some] if some.step not in (None, 1) else None
        if ranks is not None:
            return self._keys[self._removed.kept_entries(self._start + ranks)]
        start, stop, _ = some.indices(len(self))
        if stop <= start:
            return self._keys[:0]
        first, last = self._removed.kept_entries(np.array([self._start + start, self._start + stop - 1])).tolist()
        runs = self._removed.within(first, last + 1).kept_runs()
        parts = [self._keys[first + begin : first + end] for begin, end in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


Keys = np.ndarray | KeptKeys


def is_mapped(keys: Keys) -> bool:
    """Whether keys come from a file as they are read."""
    return isinstance(keys, np.memmap) or (isinstance(keys, KeptKeys) and keys.is_mapped)


def run_of(keys: Keys, start: int, stop: int) -> Any:
    """Some of the keys, of which nothing is read yet."""
    return keys.run(start, stop) if isinstance(keys, KeptKeys) else keys[start:stop]
