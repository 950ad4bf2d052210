"""Segments of an index, each of a run of entries in a file of its own, become one file, list by list.

The file is, byte for byte, what faiss writes for an index that was trained the same and was given all vectors in order.
Nothing is ever as large as an index: some lists of all segments are read, joined and written at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import below_transform
from knn_lm_eval.search.list_files import ARRAYS, ID_BYTES, Layout, ListFile, head_of, is_inverted
from knn_lm_eval.search.list_kernels import DONE, RANK_RUN, count_kept, join_arrays, join_blocks
from knn_lm_eval.system.files import check_free_space, replace_file

LIST_BYTES = 2**25  # of lists that are joined at a time, or one list
KEPT_AT_ONCE = 2**24  # counted; a multiple of RANK_RUN


def can_be_joined(trained: faiss.Index) -> bool:
    """Whether segments that begin as this trained and empty index can be joined."""
    if not is_inverted(trained) or head_of(trained, 0) is None:
        return False
    below = below_transform(trained)
    library: Any = faiss
    lists = library.downcast_InvertedLists(below.invlists)
    if type(lists) is library.ArrayInvertedLists:
        return True
    return (
        type(lists) is library.BlockInvertedLists
        and places_in_block(trained, lists.n_per_block, lists.block_size) is not None
    )


def join_segments(segments: Sequence[Path], output: Path, kept: np.ndarray | None = None) -> int:
    """Join the files of segments, in order, into the file ``output``, all at once.

    Memory: ``LIST_BYTES`` or the longest list, twice; 8 bytes for each list of each segment; and with ``kept`` a byte
    for each 32 entries.

    Parameters
    ----------
    segments : index files that were trained the same, each of which calls its first entry 0.
    kept : bool ``[count]``, may be memory-mapped, of all segments' entries: those that are in ``output``, where they
        are numbered anew, in order; None keeps all.

    Returns
    -------
    The number of entries in ``output``.

    Raises
    ------
    UserError
        Where a file is damaged or of a kind that cannot be joined, they were not trained the same, or the disk is full.
    """
    joining = _Joining.open(segments, kept)
    head = head_of(joining.trained, joining.count)
    assert head is not None
    check_free_space(output.parent, len(head) + int(joining.bytes.sum()), "the index's lists")
    temporary = output.with_name(output.name + ".tmp")
    try:
        with (
            open(temporary, "wb") as file,
            tqdm(total=int(joining.bytes.sum()), desc="Joining segments", unit="B", unit_scale=True) as bar,
        ):
            layout = joining.layout
            file.write(head + layout.kind + layout.header + layout.table(joining.counts))
            for some in joining.lists():
                bar.update(file.write(some))
        replace_file(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return joining.count


@dataclass(frozen=True)
class _Joining:
    """Segments that fit each other.

    Attributes
    ----------
    trained : without entries.
    starts : int64 ``[segments, lists + 1]``, as in ``ListFile``.
    firsts, entries : int64 ``[segments]``, each one's first entry, and how many it has.
    kept, ranks : see ``list_kernels``.
    counts, bytes : int64 ``[lists]``, how many entries of each list are kept, and what it takes.
    """

    paths: list[Path]
    trained: faiss.Index
    layout: Layout
    starts: np.ndarray
    firsts: np.ndarray
    entries: np.ndarray
    kept: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray

    @classmethod
    def open(cls, segments: Sequence[Path], kept: np.ndarray | None) -> _Joining:
        first, starts, entries = _open(segments[0]), [], []
        for path in segments:
            one = _open(path)
            same_head = one.head == (first.head if one.entries == first.entries else head_of(first.index, one.entries))
            if one.layout != first.layout or not same_head:
                raise UserError(f"{path} cannot be joined with {segments[0]}: they were not trained the same.")
            starts.append(one.starts)
            entries.append(one.entries)
        ends = np.cumsum(entries)
        if kept is None:
            flags, ranks = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64)
        else:
            if kept.shape != (ends[-1],):
                raise UserError(f"The segments have {ends[-1]:,} entries, and {len(kept):,} are kept or left out.")
            flags = np.asarray(kept).view(np.uint8)
            ranks = _ranks(flags)
        places = np.stack(starts), np.array([0, *ends[:-1]], dtype=np.int64), np.array(entries, dtype=np.int64)
        joining = cls(
            list(segments), first.index, first.layout, *places, flags, ranks, np.zeros(first.layout.lists, np.int64)
        )
        joining.counts[:] = joining._counts()
        return joining

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def bytes(self) -> np.ndarray:
        return self.layout.list_bytes(self.counts)

    def lists(self) -> Iterator[memoryview]:
        """The bytes of all lists, some at a time."""
        places = None
        if self.layout.kind != ARRAYS:
            places = places_in_block(self.trained, self.layout.per_block, self.layout.code_bytes)
            if places is None:
                raise UserError(f"{self.paths[0]} cannot be joined: this faiss packs its codes in an unknown way.")
        list_bytes = self.bytes
        for begin, end in self._groups():
            at = self.starts[:, begin : end + 1]  # [segments, lists + 1]
            offsets = np.concatenate([[0], np.cumsum(at[:, -1] - at[:, 0])])  # [segments + 1]
            data = np.empty(offsets[-1], dtype=np.uint8)
            for path, start, first, stop in zip(self.paths, at[:, 0], offsets[:-1], offsets[1:], strict=True):
                _read(path, start, data[first:stop].data)
            where = at[:, :-1] - at[:, :1] + offsets[:-1, None]  # [segments, lists]
            sizes = self._sizes(at, data, where)
            out = np.zeros(int(list_bytes[begin:end].sum()), dtype=np.uint8)
            common = data, where, sizes, self.firsts, self.entries
            if places is None:
                wrong = join_arrays(*common, self.layout.code_bytes, self.kept, self.ranks, out)
            else:
                counts = self.counts[begin:end]
                wrong = join_blocks(*common, places, self.layout.code_bytes, counts, self.kept, self.ranks, out)
            if wrong != DONE:
                raise _foreign_entry(self.paths[wrong])
            yield out.data

    def _groups(self) -> Iterator[tuple[int, int]]:
        """The first and the last list, not included, of those that are joined at a time."""
        ends = np.cumsum((self.starts[:, 1:] - self.starts[:, :-1]).sum(0))  # [lists]
        begin = 0
        while begin < len(ends):
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + LIST_BYTES, side="right")))
            yield begin, end
            begin = end

    def _sizes(self, starts: np.ndarray, data: np.ndarray, where: np.ndarray) -> np.ndarray:
        """How many entries lists have, int64 ``[segments, lists]``; ``where`` they begin in ``data``."""
        if self.layout.kind == ARRAYS:
            return np.diff(starts, axis=1) // (self.layout.code_bytes + ID_BYTES)
        return data[where[..., None] + np.arange(8)].view("<i8")[..., 0]

    def _counts(self) -> np.ndarray:
        """How many entries of each list are kept, int64 ``[lists]``."""
        counts = np.zeros(self.layout.lists, dtype=np.int64)
        for path, starts, first, entries in zip(self.paths, self.starts, self.firsts, self.entries, strict=True):
            data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            sizes = self._sizes(starts[None], data, starts[None, :-1])[0]
            if sizes.sum() != entries:
                raise _foreign_entry(path)
            if not len(self.kept):
                counts += sizes
                continue
            ids = starts[:-1] + (sizes * self.layout.code_bytes if self.layout.kind == ARRAYS else 8)
            if count_kept(data, ids, sizes, first, entries, self.kept, counts) != DONE:
                raise _foreign_entry(path)
        return counts


def _open(path: Path) -> ListFile:
    if (found := ListFile.open(path)) is None:
        raise UserError(f"{path} cannot be joined: it is no index that ends with its inverted lists, or it is damaged.")
    return found


def _foreign_entry(path: Path) -> UserError:
    return UserError(f"The index {path} is damaged: it names entries that it does not have; build it again.")


def _read(path: Path, start: int, into: memoryview) -> None:
    with open(path, "rb") as file:
        file.seek(start)
        if file.readinto(into) != len(into):
            raise UserError(f"The index {path} is damaged: it ends too early; build it again.")


def _ranks(kept: np.ndarray) -> np.ndarray:
    """How many are kept before every ``RANK_RUN``-th entry, int64 ``[runs]``."""
    in_runs = [
        np.add.reduceat(some, np.arange(0, len(some), RANK_RUN), dtype=np.int64)
        for start in range(0, len(kept), KEPT_AT_ONCE)
        if len(some := kept[start : start + KEPT_AT_ONCE])
    ]
    return np.concatenate([[0], *(np.asarray(some) for some in in_runs)]).cumsum()[:-1].astype(np.int64)


def places_in_block(index: faiss.Index, per_block: int, block_bytes: int) -> np.ndarray | None:
    """Where each entry of a block has each half byte of its code, in half bytes of the block; -1 where it has not.

    It is asked of faiss: codes whose half bytes number themselves are packed, digit by digit. None where that is not
    all there is to it.

    Returns
    -------
    int64 ``[per_block, 2 * code bytes]``.
    """
    packer: Any = below_transform(index).get_CodePacker()
    if packer.nvec != per_block or packer.block_size != block_bytes:
        return None
    halves = 2 * packer.code_size
    numbers = np.arange(1, per_block * halves + 1).reshape(per_block, halves)
    found = np.zeros(2 * block_bytes, dtype=np.int64)
    for shift in range(0, int(numbers[-1, -1]).bit_length(), 4):
        found |= halves_of_bytes(_packed(packer, bytes_of_halves((numbers >> shift) & 15))).astype(np.int64) << shift
    place_of = np.full(numbers.size + 1, -1, dtype=np.int64)  # by the number; 0 for what belongs to no code
    place_of[found] = np.arange(len(found))
    places = place_of[1:].reshape(per_block, halves)
    codes = np.random.default_rng(0).integers(0, 256, (per_block, packer.code_size), dtype=np.uint8)
    block, of_codes = np.zeros(2 * block_bytes, dtype=np.uint8), halves_of_bytes(codes)
    block[places[places >= 0]] = of_codes[places >= 0]
    return places if np.array_equal(bytes_of_halves(block), _packed(packer, codes)) else None


def _packed(packer: Any, codes: np.ndarray) -> np.ndarray:
    """A block of codes uint8 ``[entries, code bytes]``."""
    block = np.zeros(packer.block_size, dtype=np.uint8)
    for number, code in enumerate(np.ascontiguousarray(codes)):
        packer.pack_1(code, number, block[None])
    return block


def halves_of_bytes(data: np.ndarray) -> np.ndarray:
    """The half bytes of some bytes, the lower one first."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def bytes_of_halves(halves: np.ndarray) -> np.ndarray:
    return (halves[..., ::2] | (halves[..., 1::2] << 4)).astype(np.uint8)
