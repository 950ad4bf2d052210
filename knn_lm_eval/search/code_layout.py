"""Laying out the codes of an index in text order, in files.

An index has an entry's code in the entry's list, so that neighbours in the text are scattered over all lists. The files
are written range by range, each in one go from memory: a list's entries of a range lie side by side, for entries were
added in text order.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.search.code_kernels import factors_of_signs
from knn_lm_eval.search.code_tables import CodeTables
from knn_lm_eval.search.list_ranges import ListRanges
from knn_lm_eval.search.rabitq_lists import signs_of_list
from knn_lm_eval.system.files import check_free_space

ARRAYS = {"lists": np.int32, "offsets": np.float32, "scales": np.float32, "codes": np.uint8}
RANGE_BYTES = 2**29  # held in memory
CHUNK = 2**16  # entries that are decoded at once
BLOCK = 32  # entries of a list that are packed together


def write_in_text_order(folder: Path, count: int, parts: list[tuple[faiss.Index, int]], tables: CodeTables) -> None:
    """Write the codes, lists, offsets and scales of all entries, ``ARRAY.npy`` each.

    Parameters
    ----------
    count : entries of the store.
    parts : of the index, each with the entry that it calls 0.
    tables : what their codes mean.
    """
    code_bytes = len(tables.codebooks)
    check_free_space(folder, count * (12 + code_bytes), "the codes in text order")
    shapes = {"codes": (code_bytes,)}
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shapes.get(name, ())))
        for name, dtype in ARRAYS.items()
    }
    sources, size = [_Lists(index, first_id, tables) for index, first_id in parts], RANGE_BYTES // (12 + code_bytes)
    with tqdm(total=count, desc="Laying out codes in text order", unit=" entries", unit_scale=True) as bar:
        for begin in range(0, count, size):
            end = min(begin + size, count)
            laid_out = {
                name: np.zeros((end - begin, *shapes.get(name, ())), dtype=dtype) for name, dtype in ARRAYS.items()
            }
            for source in sources:
                source.lay_out(begin, end, **laid_out)
            if not tables.is_rabitq:
                _add_factors(tables, **laid_out)
            for name, array in laid_out.items():
                files[name][begin:end] = array
            bar.update(end - begin)
    for file in files.values():
        file.flush()


class _Lists:
    """The lists of an index or of a part of it.

    Parameters
    ----------
    index, first_id : the part, and the entry that it calls 0.
    tables : what its codes mean.
    """

    def __init__(self, index: faiss.Index, first_id: int, tables: CodeTables) -> None:
        self._ranges, self._tables = ListRanges(index, first_id), tables
        self._ivf = self._ranges.ivf

    def lay_out(
        self, begin: int, end: int, lists: np.ndarray, offsets: np.ndarray, scales: np.ndarray, codes: np.ndarray
    ) -> None:
        """Enter what the lists hold of the entries ``[begin, end)`` into arrays of that range."""
        for number, rows, places in self._ranges.within(begin, end):
            lists[places] = number
            if self._tables.is_rabitq:
                codes[places], offsets[places], scales[places] = self._signs(number, rows)
            else:
                codes[places] = self._ranges.codes(number, self._ivf.code_size, self._ranges.size(number))[rows]

    def _signs(self, number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The signs, offsets and scales of some entries of a list."""
        start, stop = int(rows[0]) // BLOCK * BLOCK, int(rows[-1]) + 1
        signs, factors, _ = signs_of_list(self._ivf, number, start, stop)
        signs, factors = signs[rows - start], factors[rows - start]
        offsets, scales = np.empty(len(rows), dtype=np.float32), np.empty(len(rows), dtype=np.float32)
        factors_of_signs(signs, factors, self._tables.centroids[number], offsets, scales)
        return signs, offsets, scales


def _add_factors(
    tables: CodeTables, lists: np.ndarray, offsets: np.ndarray, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Fill in what follows from the codes of a product quantizer."""
    scales[:] = -2
    for start in range(0, len(lists), CHUNK):
        chunk = slice(start, start + CHUNK)
        of_chunk = codes[chunk]  # [chunk, code bytes]
        decoded = tables.codebooks[np.arange(of_chunk.shape[1]), of_chunk].reshape(len(of_chunk), -1)
        offsets[chunk] = ((decoded + tables.centroids[lists[chunk]]) ** 2).sum(1)
