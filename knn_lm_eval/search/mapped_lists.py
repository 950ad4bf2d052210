"""Opening a fast-scan index (``IVF...,RaBitQfs``, ``IVF...,PQ64x4fs``) without reading its lists into memory.

faiss maps the arrays of most index files, but copies inverted lists that are laid out in blocks, as fast scans want
them. Here faiss reads the file through a reader that shows it every such list as empty and notes where it lies;
then mapped lists take the place of the empty ones. The file is an ordinary faiss file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

# What stands at the beginning of a file, or after a transform's: indexes that end with lists in blocks.
TRANSFORM, IN_BLOCKS = b"IxPT", (b"IwPf", b"Iwrn")
BLOCK_LISTS = b"ilbl"


class _AnotherKind(Exception):
    """The file has no lists in blocks, or none that end where they should."""


def read_with_mapped_lists(path: Path) -> faiss.Index | None:
    """Read the index file ``path`` with its block lists mapped; None where it has no such lists, or is damaged.

    What is left to memory is what goes with the number of lists: their centroids, and 24 bytes for each.
    """
    if not hasattr(faiss, "OnDiskInvertedLists"):  # as on Windows
        return None
    library: Any = faiss  # whose type stubs lack some of what is used here
    places: list[tuple[int, int, int]] = []
    with open(path, "rb") as file:
        reader = _show_empty_lists(file, places)
        next(reader)
        try:
            index = faiss.read_index(library.PyCallbackIOReader(reader.send))
        except (_AnotherKind, struct.error, RuntimeError):
            return None
    if sum(size for size, _, _ in places) != index.ntotal:
        return None
    # OnDiskInvertedLists takes a list's ids to lie code_size * capacity bytes after its codes. With the code size
    # -1, which replace_invlists knows as "none", a capacity is how far they lie before the codes, as here.
    lists = library.OnDiskInvertedLists(len(places), library.InvertedLists.INVALID_CODE_SIZE, str(path))
    lists.read_only, lists.totsize = True, path.stat().st_size
    lists.prefetch_nthread = 0  # these threads would count with the code size
    lists.do_mmap()
    table = np.array(places, dtype=np.uint64)
    library.memcpy(lists.lists.data(), library.swig_ptr(table), table.nbytes)
    if not _as_in_file(lists, path, places):
        return None
    faiss.extract_index_ivf(index).replace_invlists(lists, True)
    lists.this.disown()
    return index


def _as_in_file(lists: Any, path: Path, places: list[tuple[int, int, int]]) -> bool:
    """Whether the longest list begins where it lies: a later faiss may place lists otherwise."""
    number = max(range(len(places)), key=lambda number: places[number][0], default=0)
    if not places or not (size := places[number][0]):
        return True
    _, distance, begin = places[number]
    size = min(size, 1024)  # lists may be larger than the memory
    ids, codes = lists.get_ids(number), lists.get_codes(number)
    with open(path, "rb") as file:
        file.seek(begin - distance)
        same_ids = file.read(8 * size) == faiss.rev_swig_ptr(ids, size).tobytes()
        file.seek(begin)
        return same_ids and file.read(size) == faiss.rev_swig_ptr(codes, size).tobytes()


def _show_empty_lists(file: BinaryIO, places: list[tuple[int, int, int]]) -> Generator[bytes, int, None]:
    """Answers to faiss's wishes for so many bytes; fills ``places`` with each list's size, the distance from its
    ids to its codes, and where its codes begin."""
    data, kind, file_bytes = b"", b"", os.fstat(file.fileno()).st_size
    while data != BLOCK_LISTS:
        data = file.read((yield data))
        if not kind and len(data) == 4 and data[:1] == b"I" and data != TRANSFORM:
            kind = data
            if kind not in IN_BLOCKS:
                raise _AnotherKind
    header: list[int] = []
    for _ in range(4):  # lists, bytes per code, entries per block, bytes per block
        data = file.read((yield data))
        header += struct.unpack("<Q", data)
    lists, _, entries_per_block, block_bytes = header
    for _ in range(lists):
        (size,) = struct.unpack("<Q", file.read(8))
        ids = file.tell()
        file.seek(8 * size, os.SEEK_CUR)
        (code_bytes,) = struct.unpack("<Q", file.read(8))
        codes = file.tell()
        file.seek(code_bytes, os.SEEK_CUR)
        if code_bytes != -(-size // entries_per_block) * block_bytes or file.tell() > file_bytes:
            raise _AnotherKind
        places.append((size, codes - ids, codes))
        for _ in range(2):  # no ids, no codes
            yield data
            data = bytes(8)
    while True:
        data = file.read((yield data))
