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
from functools import partial
from pathlib import Path

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_kernels import look_up
from knn_lm_eval.search.code_layout import ARRAYS, write_in_text_order
from knn_lm_eval.search.code_tables import CodeTables, mean_the_same
from knn_lm_eval.search.faiss_index import split_parts, transformed
from knn_lm_eval.search.laid_out import LaidOut
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.verification import Limits
from knn_lm_eval.system.files import CACHE_VARIABLE


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
        if tables is None or not all(mean_the_same(parts[0][0], part) for part, _ in parts[1:]):
            return None
        write = partial(write_in_text_order, count=len(datastore), parts=parts, tables=tables)
        folder = _laid_out(datastore, name).folder(write, ARRAYS)
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


def _laid_out(datastore: Datastore, name: str) -> LaidOut:
    return LaidOut(datastore, name, "codes", "RetoMaton's codes")
