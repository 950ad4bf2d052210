"""Index files that end with their inverted lists: where each list lies, and what stands before them.

faiss writes lists as arrays (``ilar``: a table of sizes, then for each list its codes and its entries' numbers) or, for
fast scans, in blocks (``ilbl``: for each list its size, its numbers, and codes packed in blocks of several entries).
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import below_transform
from knn_lm_eval.search.list_kernels import walk_blocks

ARRAYS, BLOCKS = b"ilar", b"ilbl"
FULL, SPARSE = b"full", b"sprs"
ID_BYTES = 8


class _NoLists(Exception):
    """The file does not end with its lists."""


@dataclass(frozen=True)
class Layout:
    """How lists are written.

    Attributes
    ----------
    kind : ``ARRAYS`` or ``BLOCKS``.
    lists : how many.
    code_bytes : of a code, and of a block of them.
    per_block : entries in a block; 1 in arrays.
    header : the numbers behind the kind, as they are written.
    """

    kind: bytes
    lists: int
    code_bytes: int
    per_block: int
    header: bytes

    def table(self, sizes: np.ndarray) -> bytes:
        """What stands between the header and the lists, of these sizes ``[lists]``."""
        if self.kind == BLOCKS:
            return b""
        numbers = sizes.astype("<u8")
        if (filled := np.flatnonzero(sizes)).size > self.lists // 2:
            kind = FULL
        else:
            kind, numbers = SPARSE, np.stack([filled.astype("<u8"), numbers[filled]], axis=1).ravel()
        return kind + struct.pack("<Q", len(numbers)) + numbers.tobytes()

    def list_bytes(self, sizes: np.ndarray) -> np.ndarray:
        """What lists of these sizes take, int64."""
        if self.kind == ARRAYS:
            return sizes * (self.code_bytes + ID_BYTES)
        return 16 + sizes * ID_BYTES + -(-sizes // self.per_block) * self.code_bytes


@dataclass(frozen=True)
class ListFile:
    """An index file that ends with its lists.

    Attributes
    ----------
    entries : how many it has.
    head : what stands before the lists, as faiss writes it for so many entries as asked for.
    starts : int64 ``[lists + 1]``, where in the file each list begins, and the last ends.
    """

    path: Path
    entries: int
    head: bytes
    layout: Layout
    index: faiss.Index
    starts: np.ndarray

    @classmethod
    def open(cls, path: Path) -> ListFile | None:
        """Look at an index file without reading its lists; None where it does not end with lists of a known kind.

        Raises UserError where the lists are not whole.
        """
        found: list[tuple[Layout, np.ndarray]] = []
        with open(path, "rb") as file:
            reader = _show_empty_lists(file, path, found)
            next(reader)
            library: Any = faiss  # whose type stubs lack some of what is used here
            try:
                index = faiss.read_index(library.PyCallbackIOReader(reader.send), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
            except (_NoLists, struct.error, RuntimeError):
                return None
        if not found or not is_inverted(index):
            return None
        ((layout, starts),) = found
        head = head_of(index, index.ntotal)
        return None if head is None else cls(path, index.ntotal, head, layout, index, starts)


def is_inverted(index: faiss.Index) -> bool:
    """Whether it is an IVF index, perhaps behind transforms."""
    library: Any = faiss
    return isinstance(below_transform(index), library.IndexIVF)


def head_of(index: faiss.Index, entries: int) -> bytes | None:
    """What faiss writes before the lists of an index without entries, if it had so many; None where the lists are not
    what it ends with."""
    written: list[bytes] = []

    def write(some: bytes) -> int:
        written.append(bytes(some))
        return len(some)

    below = below_transform(index)
    was, index.ntotal, below.ntotal = index.ntotal, entries, entries
    library: Any = faiss
    faiss.write_index(index, library.PyCallbackIOWriter(write))
    index.ntotal = below.ntotal = was
    places = [number for number, some in enumerate(written) if some in (ARRAYS, BLOCKS)]
    if len(places) != 1:  # lists within lists, or none
        return None
    head, kind, rest = b"".join(written[: places[0]]), written[places[0]], b"".join(written[places[0] + 1 :])
    empty = 16 + 12 if kind == ARRAYS else 32 + 16 * below.nlist
    return head if len(rest) == empty else None


def _show_empty_lists(
    file: BinaryIO, path: Path, found: list[tuple[Layout, np.ndarray]]
) -> Generator[bytes, int, None]:
    """Answers to faiss's wishes for so many bytes; notes where the lists lie."""
    data = b""
    while data not in (ARRAYS, BLOCKS):
        data = file.read((yield data))
    kind, begin = data, file.tell()
    header = file.read(16 if kind == ARRAYS else 32)
    numbers = struct.unpack(f"<{len(header) // 8}Q", header)
    if kind == ARRAYS:
        lists, code_bytes = numbers
        layout = Layout(kind, lists, code_bytes, 1, header)
        starts = _array_starts(file, path, layout)
        shown = kind + header + SPARSE + bytes(8)
    else:
        lists, _, per_block, block_bytes = numbers
        layout = Layout(kind, lists, block_bytes, per_block, header)
        starts = np.empty(lists + 1, dtype=np.int64)
        content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        if not per_block or not walk_blocks(content, begin + len(header), per_block, block_bytes, starts):
            raise _damaged(path)
        shown = kind + header + bytes(16 * lists)
    if starts[-1] != path.stat().st_size:
        raise _NoLists
    found.append((layout, starts))
    at = len(kind)
    while True:
        size = yield data
        data, at = shown[at : at + size], at + size


def _array_starts(file: BinaryIO, path: Path, layout: Layout) -> np.ndarray:
    """Where each list begins behind the table of sizes, and the last ends."""
    kind, (length,) = file.read(4), struct.unpack("<Q", file.read(8))
    if kind not in (FULL, SPARSE) or length > 2 * layout.lists:
        raise _damaged(path)
    numbers = np.frombuffer(file.read(8 * length), dtype="<i8")
    sizes = np.zeros(layout.lists, dtype=np.int64)
    try:
        if kind == FULL:
            sizes[:] = numbers
        else:
            sizes[numbers[::2]] = numbers[1::2]
    except (ValueError, IndexError) as error:
        raise _damaged(path) from error
    return file.tell() + np.concatenate([[0], np.cumsum(layout.list_bytes(sizes))])


def _damaged(path: Path) -> UserError:
    return UserError(f"The index {path} is damaged: its lists are not whole; build it again.")
