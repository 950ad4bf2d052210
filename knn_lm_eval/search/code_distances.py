"""Distances from a query to given entries, by the index's own codes: what RetoMaton's pointers need.

faiss computes such distances only inside a search. Here the codes are laid out once in text order, in files
beside the index, so that a pointer's distance is one table lookup per code byte:

    |q - x|^2  is approximated by  base(q, list of x) + offset_x + scale_x * sum_j table_q[j, code_x[j]]

For a product quantizer of residuals (Jegou et al. 2011), x is decoded as c + r, base is |q|^2 - 2 <q, c>, the
table holds <q, r> per sub-quantizer and codeword, offset is |c + r|^2 and scale is -2: the distance to the
decoded vector, as the search computes it. For RaBitQ (Gao & Long 2024), base is |q - c|^2 and <q - c, x - c> is
estimated from the signs s of x - c as m <s, q - c> with m = |x - c|^2 / |x - c|_1: the table holds the sums of
8 query components with the signs of one code byte. The search quantizes the query to 8 bits besides; that
is the one difference. Where the index rotates or projects its vectors first, so does this.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_kernels import look_up
from knn_lm_eval.search.faiss_index import below_transform, split_parts, transformed
from knn_lm_eval.search.laid_out import LaidOut
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.verification import Limits
from knn_lm_eval.system.files import (
    CACHE_VARIABLE,
    check_free_space,
)

CHUNK = 2**16
ARRAYS = {"lists": np.int32, "offsets": np.float32, "scales": np.float32, "codes": np.uint8}


@dataclass(frozen=True)
class CodeTables:
    """What the codes of an index mean.

    Attributes
    ----------
    centroids : float32 ``[lists, dimension]``, of the coarse quantizer.
    codebooks : float32 ``[code bytes, 256, dimension / code bytes]``: what each code byte stands for.
    is_rabitq : whether that is signs, by RaBitQ, and not parts of vectors, by a product quantizer.
    """

    centroids: np.ndarray
    codebooks: np.ndarray
    is_rabitq: bool

    @classmethod
    def of(cls, index: faiss.Index) -> CodeTables | None:
        """Those of an index, or of a part; None for types whose codes cannot be looked up so."""
        ivf = below_transform(index)
        if index.metric_type != faiss.METRIC_L2:
            return None
        if isinstance(ivf, faiss.IndexIVFPQ) and ivf.pq.nbits == 8 and ivf.by_residual:
            is_rabitq = False
            codebooks = faiss.vector_to_array(ivf.pq.centroids).reshape(ivf.pq.M, 256, ivf.pq.dsub)
        elif _is_rabitq_of_one_bit(ivf) and ivf.d % 8 == 0:
            is_rabitq = True
            signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * 2.0 - 1
            codebooks = np.broadcast_to(signs.astype(np.float32), (ivf.d // 8, 256, 8)).copy()
        else:
            return None
        # A tensor in a process that has imported faiss.contrib.torch_utils.
        return cls(np.asarray(ivf.quantizer.reconstruct_n(0, ivf.nlist)), codebooks, is_rabitq)


@dataclass(frozen=True)
class CodeDistances:
    """The codes of an index in text order, memory-mapped, and the tables to read them with.

    Attributes
    ----------
    index : the index or a part of it, for what it does to queries before it looks for lists.
    centroids : float32 ``[lists, dimension]``, of the coarse quantizer.
    base_offsets : float32 ``[lists]``, what ``base`` has beside |q|^2 - 2 <q, c>: |c|^2 for RaBitQ, 0 for PQ.
    codebooks : float32 ``[code bytes, dimension / code bytes, 256]``: what each code byte stands for.
    is_rabitq : whether that is signs.
    lists, offsets, scales, codes : per entry.
    """

    index: faiss.Index
    centroids: np.ndarray
    base_offsets: np.ndarray
    codebooks: np.ndarray
    is_rabitq: bool
    lists: np.ndarray
    offsets: np.ndarray
    scales: np.ndarray
    codes: np.ndarray

    @classmethod
    def open(cls, datastore: Datastore, index: faiss.Index, name: str) -> CodeDistances | None:
        """Open the code files of the index ``name``, making them first if need be.

        Returns None for an index that this cannot serve (others than IVF with PQ of 8 bits by residual or with
        RaBitQ of 1 bit, by L2, or parts that were not trained together): its pointers need exact distances.
        """
        parts = split_parts(index)
        tables = CodeTables.of(parts[0][0])
        if tables is None or not all(_mean_the_same(parts[0][0], part) for part, _ in parts[1:]):
            return None
        folder = _laid_out(datastore, name).folder(lambda folder: _write(folder, datastore, parts, tables), ARRAYS)
        return cls._map(folder, datastore, name, parts[0][0], tables)

    @classmethod
    def read(cls, datastore: Datastore, part: faiss.Index, name: str) -> CodeDistances:
        """Map the code files that ``open`` made; any part of the index gives the tables, and serves all entries.

        Raises UserError where this machine does not see them.
        """
        tables = CodeTables.of(part)
        assert tables is not None
        if (folder := _laid_out(datastore, name).find()) is None:
            raise UserError(
                f"{socket.gethostname()} does not see the codes of the index {name!r} of {datastore.path} in text "
                f"order; evaluate once where the datastore can be written to, or set {CACHE_VARIABLE} to a folder "
                f"that all nodes share."
            )
        return cls._map(folder, datastore, name, part, tables)

    @classmethod
    def _map(
        cls, folder: Path, datastore: Datastore, name: str, part: faiss.Index, tables: CodeTables
    ) -> CodeDistances:
        """Map the files of the entries' codes; raises UserError where they are damaged."""
        count = len(datastore)
        shapes = dict.fromkeys(ARRAYS, (count,)) | {"codes": (count, len(tables.codebooks))}
        limits = {"lists": Limits(0, len(tables.centroids))}
        arrays = _laid_out(datastore, name).arrays(folder, ARRAYS, shapes, limits)
        by_component = np.ascontiguousarray(tables.codebooks.transpose(0, 2, 1))  # [code bytes, width, 256]
        squared_norms = (tables.centroids**2).sum(1)  # [lists]
        base_offsets = squared_norms if tables.is_rabitq else np.zeros_like(squared_norms)
        mapped = {name: np.asarray(array) for name, array in arrays.items()}
        return cls(part, tables.centroids, base_offsets, by_component, tables.is_rabitq, **mapped)

    def __call__(self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Approximate squared L2 distances.

        Parameters
        ----------
        queries : float32 ``[n, dimension]``.
        entries : int64 ``[n, m]``; the first ``counts[i]`` of row i count.
        counts : int64 ``[n]``.

        Returns
        -------
        float32 ``[n, m]``; undefined beyond the counts.
        """
        return self.of_transformed(self.transformed(queries), entries, counts)

    def transformed(self, queries: np.ndarray) -> np.ndarray:
        """Queries as the lists hold vectors, float32 ``[n, dimension there]``; for many at once it takes less time."""
        return transformed(self.index, queries)

    def of_transformed(self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As a call, for queries that are ``transformed``."""
        distances = np.empty(entries.shape, dtype=np.float32)
        look_up(
            queries,
            self.centroids,
            self.base_offsets,
            self.codebooks,
            self.is_rabitq,
            entries,
            counts,
            self.lists,
            self.offsets,
            self.scales,
            self.codes,
            distances,
        )
        return distances


def _is_rabitq_of_one_bit(ivf: Any) -> bool:
    is_rabitq = isinstance(ivf, (faiss.IndexIVFRaBitQ, faiss.IndexIVFRaBitQFastScan))
    return is_rabitq and ivf.rabitq.nb_bits == 1


def _mean_the_same(part: faiss.Index, other: faiss.Index) -> bool:
    """Whether the codes of both parts mean the same."""
    tables, other_tables = CodeTables.of(part), CodeTables.of(other)
    axes = np.eye(part.d, dtype=np.float32)
    return (
        tables is not None
        and other_tables is not None
        and tables.is_rabitq == other_tables.is_rabitq
        and np.array_equal(tables.centroids, other_tables.centroids)
        and np.array_equal(tables.codebooks, other_tables.codebooks)
        and np.array_equal(transformed(part, axes), transformed(other, axes))
    )


def _laid_out(datastore: Datastore, name: str) -> LaidOut:
    return LaidOut(datastore, name, "codes", "RetoMaton's codes")


def _write(folder: Path, datastore: Datastore, parts: list[tuple[faiss.Index, int]], tables: CodeTables) -> None:
    """Lay out the codes, lists, offsets and scales of all entries in text order."""
    count, code_bytes = len(datastore), len(tables.codebooks)
    keys = datastore.require_keys("RetoMaton with a RaBitQ index") if tables.is_rabitq else None
    check_free_space(folder, count * (12 + code_bytes), "the codes in text order")
    shapes = {"codes": (count, code_bytes)}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shapes.get(name, (count,)))
        for name, dtype in ARRAYS.items()
    }
    for index, first_id in parts:
        _copy_lists(index, first_id, arrays["lists"], None if tables.is_rabitq else arrays["codes"])
    for start in tqdm(range(0, count, CHUNK), desc="Laying out codes in text order", unit=" chunks"):
        rows = slice(start, start + CHUNK)
        centroids = tables.centroids[arrays["lists"][rows]]  # [chunk, dimension]
        if keys is not None:
            residuals = transformed(parts[0][0], keys[rows].astype(np.float32)) - centroids  # [chunk, dimension]
            arrays["codes"][rows] = np.packbits(residuals > 0, axis=1, bitorder="little")
            arrays["scales"][rows], arrays["offsets"][rows] = _rabitq_factors(residuals, centroids)
        else:
            codes = arrays["codes"][rows]  # [chunk, code bytes]
            decoded = tables.codebooks[np.arange(code_bytes), codes].reshape(len(codes), -1)  # [chunk, dimension]
            arrays["scales"][rows] = -2
            arrays["offsets"][rows] = ((decoded + centroids) ** 2).sum(1)
    for array in arrays.values():
        array.flush()


def _copy_lists(index: faiss.Index, first_id: int, lists: np.ndarray, codes: np.ndarray | None) -> None:
    """Enter, for each entry of an index or a part, the number of its list, and its code unless ``codes`` is None.

    Parameters
    ----------
    first_id : the entry that the part calls 0.
    lists, codes : int32 ``[count]`` and uint8 ``[count, code bytes]``, of all entries.
    """
    ivf = below_transform(index)
    inverted: Any = ivf.invlists
    for number in range(ivf.nlist):
        size = inverted.list_size(number)
        if not size:
            continue
        entries = faiss.rev_swig_ptr(inverted.get_ids(number), size) + first_id  # [size]
        lists[entries] = number
        if codes is not None:
            of_list = faiss.rev_swig_ptr(inverted.get_codes(number), size * ivf.code_size)
            codes[entries] = of_list.reshape(size, -1)


def _rabitq_factors(residuals: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scales and offsets ``[n]`` of entries x by RaBitQ, from x - c and c, float32 ``[n, dimension]``."""
    squared, absolute = (residuals**2).sum(1), np.abs(residuals).sum(1)  # [n]
    multiplier = squared / np.maximum(absolute, np.finfo(np.float32).tiny)  # [n]
    signed_centroids = np.where(residuals > 0, centroids, -centroids)  # [n, dimension]
    return -2 * multiplier, squared + 2 * multiplier * signed_centroids.sum(1)
