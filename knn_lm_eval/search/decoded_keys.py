"""The keys of a datastore as its index's codes have them, for what reads many keys and finds none on the disk.

The codes are laid out in text order first, in a file, range by range (see ``code_layout``); then any of them are
decoded as they are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import below_transform, split_parts
from knn_lm_eval.search.list_files import is_inverted
from knn_lm_eval.search.list_ranges import ListRanges
from knn_lm_eval.search.segments import bytes_of_halves, halves_of_bytes, places_in_block
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.files import check_free_space, replace_file

MOST_AT_ONCE = 2**29  # bytes of codes that are laid out in memory
LEAST_AT_ONCE = 2**24


class DecodedKeys:
    """Read as an array of keys, float32 ``[count, dimension]``, by rows.

    Parameters
    ----------
    index : the index whose codes they are; ``lay_out`` comes before any is read.

    Raises
    ------
    UserError
        Where keys cannot be made of such codes.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, index: faiss.Index) -> None:
        self._index = index  # which its parts are lent by
        self._parts = split_parts(index)
        _check_decodable(self._parts[0][0])
        self._ends = np.cumsum([part.ntotal for part, _ in self._parts])
        self.shape = index.ntotal, index.d
        self._codes = np.empty((0, 0), dtype=np.uint8)

    def lay_out(self, path: Path, memory: int) -> None:
        """Read from now on from the file ``path``, which is written first where it is not there.

        Parameters
        ----------
        path : a name that ends with ``.npy.part``.
        memory : bytes, of which a part is taken to write it.

        Raises
        ------
        UserError
            Where the disk is full.
        """
        if not path.exists():
            _write_codes(self._parts, len(self), path, min(max(memory // 8, LEAST_AT_ONCE), MOST_AT_ONCE))
        self._codes = map_npy(path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The keys of a slice, or of some entries, float32 ``[n, dimension]``."""
        codes = self._codes[rows]
        if len(self._parts) == 1:
            return _decoded(self._parts[0][0], codes)
        entries = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        part_of = np.searchsorted(self._ends, entries, side="right")  # [n]
        keys = np.empty((len(codes), self.shape[1]), dtype=np.float32)
        for number in np.unique(part_of):
            keys[part_of == number] = _decoded(self._parts[number][0], codes[part_of == number])
        return keys


def _check_decodable(index: faiss.Index) -> None:
    """Raise UserError where an index, or a part, does not have codes of which keys can be made."""
    below = below_transform(index)
    if not is_inverted(index):
        raise UserError(f"Keys cannot be made of the codes of {type(below).__name__}, which has no inverted lists.")
    if hasattr(below, "rabitq") and index.metric_type != faiss.METRIC_L2:  # the lengths are not among its factors
        raise UserError(f"Keys cannot be made of the codes of {type(below).__name__} for inner products.")
    library: Any = faiss  # whose type stubs lack some of what is used here
    if isinstance(below, library.IndexIVFPQFastScan):  # which crashes where it was read from a file (faiss 1.15)
        raise UserError(f"faiss cannot make keys of the codes of {type(below).__name__}.")
    try:
        _decoded(index, np.zeros((1, index.sa_code_size()), dtype=np.uint8))
    except RuntimeError as error:
        raise UserError(f"faiss cannot make keys of the codes of {type(below).__name__}.") from error


def _decoded(index: faiss.Index, codes: np.ndarray) -> np.ndarray:
    if not len(codes):  # of which some kinds make an error
        return np.empty((0, index.d), dtype=np.float32)
    return np.asarray(index.sa_decode(np.ascontiguousarray(codes)))


def _write_codes(parts: list[tuple[faiss.Index, int]], count: int, path: Path, at_once: int) -> None:
    """Write the codes of all entries, each behind its list's number, as faiss encodes a vector by itself."""
    code_bytes = parts[0][0].sa_code_size()
    check_free_space(path.parent, count * code_bytes, "the index's codes in text order")
    temporary, size = path.with_suffix(".tmp"), max(1, at_once // code_bytes)
    file = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, code_bytes))
    sources = [_Codes(*part) for part in parts]
    with tqdm(total=count, desc="Laying out codes in text order", unit=" entries", unit_scale=True) as bar:
        for begin in range(0, count, size):
            laid_out = np.zeros((min(size, count - begin), code_bytes), dtype=np.uint8)
            for source in sources:
                source.lay_out(begin, laid_out)
            file[begin : begin + size] = laid_out
            bar.update(len(laid_out))
    file.flush()
    replace_file(temporary, path)


class _Codes:
    """The codes in the lists of an index, or of a part of it, and the entry that it calls 0."""

    def __init__(self, index: faiss.Index, first_id: int) -> None:
        self._ranges = ListRanges(index, first_id)
        ivf = self._ranges.ivf
        self._code_bytes, self._list_bytes = ivf.code_size, ivf.coarse_code_size()
        self._packer: Any = ivf.get_CodePacker() if isinstance(ivf, faiss.IndexIVFFastScan) else None
        if self._packer is not None:
            places = places_in_block(index, self._packer.nvec, self._packer.block_size)
            if places is None:
                raise UserError(f"This faiss packs the codes of {type(ivf).__name__} in an unknown way.")
            self._places = places

    def lay_out(self, begin: int, codes: np.ndarray) -> None:
        """Enter the codes of the entries from ``begin`` on, ``[n, bytes]``."""
        for number, rows, places in self._ranges.within(begin, begin + len(codes)):
            codes[places, : self._list_bytes] = np.array([number], dtype="<u8").view(np.uint8)[: self._list_bytes]
            codes[places, self._list_bytes :] = self._of_list(number, rows)

    def _of_list(self, number: int, rows: np.ndarray) -> np.ndarray:
        """The codes of some entries of a list, uint8 ``[n, code bytes]``."""
        size = self._ranges.size(number)
        if self._packer is None:
            return self._ranges.codes(number, self._code_bytes, size)[rows]
        per_block = self._packer.nvec
        blocks = self._ranges.codes(number, self._packer.block_size, -(-size // per_block))
        first, last = int(rows[0]) // per_block, int(rows[-1]) // per_block + 1
        halves = halves_of_bytes(blocks[first:last])  # [blocks, 2 * block bytes]
        unpacked = np.where(self._places >= 0, halves[:, self._places], 0)  # [blocks, per block, 2 * code bytes]
        whole = bytes_of_halves(unpacked.astype(np.uint8)).reshape((last - first) * per_block, -1)
        return whole[rows - first * per_block][:, : self._code_bytes]
