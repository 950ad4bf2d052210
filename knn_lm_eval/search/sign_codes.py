"""Searching an index's sign codes (RaBitQ of one bit), laid out for processors that count bits.

RaBitQ (Gao & Long 2024) keeps the signs s of x - c, for a vector x in the list of centroid c, and two numbers:

    |q - x|^2  is estimated by  |q - c|^2 + |x - c|^2 - 2 m <s, q - c>,   m = |x - c|^2 / |x - c|_1

faiss prepares each query anew for each list that it visits. With any common centre g,

    <s, q - c> = <s, q - g> - <s, c - g>

has a last term that belongs to the entry, so that a query is prepared once: its components, quantized to 8 bits as
faiss does it, are cut into bit planes, and <s, q - g> is counts of bits. Most of the time of a search for 1,024
neighbours in faiss is their heap; here what is nearer than a threshold is kept, which is lowered now and then.

The layout is made from the codes in the index, not from keys, in files beside the index that are mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.search.faiss_index import NAMES, below_transform, split_parts, transformed
from knn_lm_eval.search.laid_out import LaidOut
from knn_lm_eval.search.rabitq_lists import has_signs, signs_of_list
from knn_lm_eval.search.sign_kernels import BLOCK, NOWHERE, lay_out, nearest_lists, products, scan
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.store.verification import Limits
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.files import check_free_space

ARRAYS = {
    "sizes": np.int64,
    "starts": np.int64,
    "centre": np.float32,
    "codes": np.uint64,
    "offsets": np.float32,
    "scales": np.float32,
    "entries": np.uint32,
}
MOST_ENTRIES = 2**32  # whose numbers are kept
QUERIES_AT_ONCE = 256  # whose products with all centroids are held
PER_THREAD = 8  # queries, at least, that it is worth a thread
ENTRIES_AT_ONCE = 2**16  # that are laid out
Result = TypeVar("Result")
QUANTIZERS = (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP)


class PreparedQueries(NamedTuple):
    """Queries as the lists hold vectors, float32 ``[n, dimension there]``, and the lists that are nearest to each,
    int64 ``[n, probe]``, the nearest first."""

    vectors: np.ndarray
    lists: np.ndarray

    def of_rows(self, rows: slice) -> PreparedQueries:
        """Some of them."""
        return PreparedQueries(self.vectors[rows], self.lists[rows])


@dataclass(frozen=True)
class SignCodes:
    """The codes of an index, or of one of its parts.

    Attributes
    ----------
    index : the index or the part, for what it does to queries and how it finds lists.
    first_id : the entry that it calls 0.
    dot : whether the negated inner product is the distance, and not squared L2.
    table, bias : float32 ``[dimension, dimension there]`` and ``[dimension there]``, which queries go through before
        they are compared; None for other transforms, or none.
    centroids : float32 ``[lists, dimension there]``.
    moved, norms : float32 ``[dimension there, lists]``, the centroids less the centre, and ``[lists]``: the list is the
        nearest whose norm less the product is the least. None where a graph or the like finds lists.
    sizes : int64 ``[lists]``, each list's entries.
    starts : int64 ``[lists + 1]``, each list's first block.
    centre : float32 ``[dimension there]``.
    codes : uint64 ``[blocks, words, BLOCK]``, the signs; an entry's are 64 a word.
    offsets, scales : float32 ``[blocks * BLOCK]``; ``NOWHERE`` and 0 where a list's last block is empty.
    entries : uint32 ``[blocks * BLOCK]``.
    """

    index: faiss.Index
    first_id: int
    dot: bool
    table: np.ndarray | None
    bias: np.ndarray | None
    centroids: np.ndarray
    moved: np.ndarray | None
    norms: np.ndarray | None
    sizes: np.ndarray
    starts: np.ndarray
    centre: np.ndarray
    codes: np.ndarray
    offsets: np.ndarray
    scales: np.ndarray
    entries: np.ndarray

    @classmethod
    def of(cls, index: faiss.Index, first_id: int, arrays: dict[str, np.ndarray]) -> SignCodes:
        """With the arrays of ``write``."""
        ivf = below_transform(index)
        table, bias = _linear(index)
        centroids = _centroids(ivf)
        quantizer, moved, norms = faiss.downcast_index(ivf.quantizer), None, None
        if type(quantizer) in QUANTIZERS and quantizer.metric_type in NAMES:
            moved = np.ascontiguousarray((centroids - arrays["centre"]).T)
            # Of products with q - g: |c - g|^2 / 2 where L2 ranks, and -<g, c> less what is the same for all.
            norms = (moved.astype(np.float64) ** 2).sum(0) / 2
            if quantizer.metric_type == faiss.METRIC_INNER_PRODUCT:
                norms = -(moved.T.astype(np.float64) @ arrays["centre"])
            norms = norms.astype(np.float32)
        dot = index.metric_type == faiss.METRIC_INNER_PRODUCT
        return cls(index, first_id, dot, table, bias, centroids, moved, norms, **arrays)

    def search(
        self, queries: np.ndarray, k: int, probe: int, kept: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Distances float32 and entries int64 ``[n, k]``, and how many were compared; see ``faiss_index.search``.

        ``kept`` has a bit for each of its entries, set for those that count; None where all do.
        """
        return self._search(len(queries), lambda run: self._prepared(queries[run], probe), k, probe, kept)

    def prepare(self, queries: np.ndarray, probe: int) -> PreparedQueries:
        """What a search of float32 ``[n, dimension]`` begins with."""
        parts = _in_threads(lambda run: self._prepared(queries[run], probe), _runs(len(queries)))
        return PreparedQueries(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def search_prepared(self, queries: PreparedQueries, k: int, probe: int) -> tuple[np.ndarray, np.ndarray, int]:
        """As ``search``, in the first ``probe`` of the lists that are known."""
        return self._search(len(queries.lists), queries.of_rows, k, probe)

    def _search(
        self,
        count: int,
        prepared: Callable[[slice], PreparedQueries],
        k: int,
        probe: int,
        kept: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        distances = np.empty((count, k), dtype=np.float32)
        entries = np.empty((count, k), dtype=np.int64)
        bits = np.empty(0, dtype=np.uint8) if kept is None else kept

        def search_run(run: slice) -> int:
            there, lists = prepared(run)
            lists, found = np.ascontiguousarray(lists[:, :probe]), (distances[run], entries[run])
            of_lists = self.centroids, self.centre, self.dot, self.sizes, self.starts
            return scan(there, lists, *of_lists, self.codes, self.offsets, self.scales, self.entries, bits, k, *found)

        compared = sum(_in_threads(search_run, _runs(count)))
        entries[entries >= 0] += self.first_id
        return distances, entries, compared

    def _prepared(self, queries: np.ndarray, probe: int) -> PreparedQueries:
        there = self._transformed(np.ascontiguousarray(queries, dtype=np.float32))
        return PreparedQueries(there, self._nearest_lists(there, min(probe, len(self.centroids))))

    def _transformed(self, queries: np.ndarray) -> np.ndarray:
        if self.table is None:
            return transformed(self.index, queries)
        there = np.empty((len(queries), self.table.shape[1]), dtype=np.float32)
        products(queries, self.table, there)
        return there if self.bias is None else there + self.bias

    def _nearest_lists(self, queries: np.ndarray, probe: int) -> np.ndarray:
        if self.moved is None or self.norms is None:
            return np.asarray(below_transform(self.index).quantizer.search(queries, probe)[1])
        of_lists = np.empty((len(queries), len(self.norms)), dtype=np.float32)
        products(queries - self.centre, self.moved, of_lists)
        lists = np.empty((len(queries), probe), dtype=np.int64)
        nearest_lists(of_lists, self.norms, probe, lists)
        return lists


def _runs(count: int) -> list[slice]:
    """Queries that are searched for at a time."""
    size = min(QUERIES_AT_ONCE, max(PER_THREAD, -(-count // max(1, faiss.omp_get_max_threads()))))
    return [slice(start, start + size) for start in range(0, count, size)]


def _in_threads(work: Callable[[slice], Result], runs: list[slice]) -> list[Result]:
    threads = min(faiss.omp_get_max_threads(), len(runs))
    if threads <= 1:
        return list(map(work, runs))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, runs))


@dataclass(frozen=True)
class SignSearch:
    """The codes of all parts of an index, which are searched one after the other."""

    parts: list[SignCodes]

    @classmethod
    def open(cls, datastore: Datastore, index: faiss.Index, name: str, part: int | None = None) -> SignSearch | None:
        """Open the laid-out codes of the index ``name``, making them first if need be; None where it has no such.

        Parameters
        ----------
        index : all of it, or the one part of that number.
        """
        if len(datastore) >= MOST_ENTRIES or not serves(index):
            return None
        opened, in_parts = [], isinstance(index, faiss.IndexShards)
        limits = {"entries": Limits(0, len(datastore))}
        for number, (one, first_id) in enumerate(split_parts(index)):
            laid_out = LaidOut(datastore, name, "scan", "the search's codes", number if in_parts else part)
            folder = laid_out.folder(partial(write, index=one), ARRAYS)
            opened.append(SignCodes.of(one, first_id, laid_out.arrays(folder, ARRAYS, limits=limits)))
        return cls(opened)

    @classmethod
    def of(cls, index: faiss.Index, folder: Path) -> SignSearch | None:
        """Lay out the codes of an index that is under way in an empty folder; None where it has no such."""
        if not serves(index):
            return None
        opened = []
        for number, (one, first_id) in enumerate(split_parts(index)):
            of_part = folder / str(number)
            of_part.mkdir()
            write(of_part, one)
            opened.append(SignCodes.of(one, first_id, {array: map_npy(of_part / f"{array}.npy") for array in ARRAYS}))
        return cls(opened)

    def search(
        self, queries: np.ndarray, k: int, probe: int, removed: Removed | None = None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """As ``faiss_index.search``, with how many entries were compared; equally near ones by their numbers."""
        kept = [None if removed is None else removed.of_part(part.first_id).kept_bits for part in self.parts]
        return _merged([part.search(queries, k, probe, bits) for part, bits in zip(self.parts, kept, strict=True)], k)

    @property
    def compares_lists(self) -> bool:
        """Whether a query is compared with all lists, so that those nearest are the first of any more that are."""
        return all(part.norms is not None for part in self.parts)

    def prepare(self, queries: np.ndarray, probe: int) -> list[PreparedQueries]:
        """What searches of queries begin with, for each part."""
        return [part.prepare(queries, probe) for part in self.parts]

    def search_prepared(self, queries: list[PreparedQueries], k: int, probe: int) -> tuple[np.ndarray, np.ndarray, int]:
        """As ``search``, where all nearest lists are known (``compares_lists``) of as high a probe or a higher one."""
        parts = zip(self.parts, queries, strict=True)
        return _merged([part.search_prepared(of_part, k, probe) for part, of_part in parts], k)


def _merged(found: list[tuple[np.ndarray, np.ndarray, int]], k: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The nearest of what was found in all parts."""
    if len(found) == 1:
        return found[0]
    distances = np.concatenate([part for part, _, _ in found], axis=1)  # [n, parts * k]
    entries = np.concatenate([part for _, part, _ in found], axis=1)  # [n, parts * k]
    order = np.lexsort((entries, distances), axis=1)[:, :k]  # [n, k]
    distances, entries = np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)
    return distances, entries, sum(compared for _, _, compared in found)


def serves(index: faiss.Index) -> bool:
    """Whether all parts of an index are IVF with RaBitQ of one bit, perhaps behind transforms."""
    return all(_serves(part) for part, _ in split_parts(index))


def _serves(index: faiss.Index) -> bool:
    return index.metric_type in NAMES and has_signs(below_transform(index))


def _linear(index: faiss.Index) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The table and the bias of an index's transforms, if it has a single one that is linear."""
    if not isinstance(index, faiss.IndexPreTransform):
        return None, None
    chain: Any = index.chain
    if chain.size() != 1:
        return None, None
    library: Any = faiss  # whose type stubs lack some of what is used here
    transform = library.downcast_VectorTransform(chain.at(0))
    if not isinstance(transform, faiss.LinearTransform):
        return None, None
    matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    bias = faiss.vector_to_array(transform.b) if transform.have_bias else None
    return np.ascontiguousarray(matrix.T), bias


def _centroids(ivf: Any) -> np.ndarray:
    return np.asarray(ivf.quantizer.reconstruct_n(0, ivf.nlist))


def write(folder: Path, index: faiss.Index) -> None:
    """Lay out the codes of an index, or of a part, in files ``ARRAY.npy``."""
    ivf = below_transform(index)
    sizes = np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)], dtype=np.int64)  # [lists]
    starts = np.concatenate([[0], np.cumsum(-(-sizes // BLOCK))]).astype(np.int64)  # [lists + 1]
    centroids, dot = _centroids(ivf), ivf.metric_type == faiss.METRIC_INNER_PRODUCT
    centre = centroids.mean(0, dtype=np.float64).astype(np.float32)
    blocks, words = int(starts[-1]), -(-ivf.d // 64)
    check_free_space(folder, blocks * BLOCK * (12 + 8 * words), "the search's codes")
    shapes = {"sizes": sizes.shape, "starts": starts.shape, "centre": centre.shape, "codes": (blocks, words, BLOCK)}
    arrays = {
        array: np.lib.format.open_memmap(folder / f"{array}.npy", "w+", dtype, shapes.get(array, (blocks * BLOCK,)))
        for array, dtype in ARRAYS.items()
    }
    arrays["sizes"][:], arrays["starts"][:], arrays["centre"][:], arrays["offsets"][:] = sizes, starts, centre, NOWHERE
    for i, size in enumerate(tqdm(sizes.tolist(), desc="Laying out codes for searches", unit=" lists")):
        for start in range(0, size, ENTRIES_AT_ONCE):
            flat, factors, ids = signs_of_list(ivf, i, start, min(size, start + ENTRIES_AT_ONCE))
            first = int(starts[i]) + start // BLOCK
            there = slice(first, first + -(-len(ids) // BLOCK))
            rows = slice(there.start * BLOCK, there.stop * BLOCK)
            of_entries = arrays["offsets"][rows], arrays["scales"][rows], arrays["entries"][rows]
            lay_out(flat, factors, ids, centroids[i], centre, dot, arrays["codes"][there], *of_entries)
    for array in arrays.values():
        array.flush()
