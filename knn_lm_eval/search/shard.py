"""What a Ray actor does that holds a part of an index, or a run of keys (a shard), and what it sends.

It maps its file and the store's arrays from a file system that all nodes share.
"""

from __future__ import annotations

import socket
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.faiss_index import inverted_file, read_index, search, vectors_compared
from knn_lm_eval.search.packing import narrowed, unpacked_queries
from knn_lm_eval.search.sign_codes import SignSearch
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexPart, find_parts
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.system.ray_actors import Living

if TYPE_CHECKING:
    from knn_lm_eval.search.exact import ExactSearch


class FoundArrays(NamedTuple):
    """What a shard found, or all together: as ``Found``, in arrays (weights are its counts)."""

    distances: np.ndarray
    entries: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None


def of_shard(found: FoundArrays, first_id: int) -> FoundArrays:
    """What ``Shard.search`` sent, with entries counted from the store's first, in the types of ``Found``.

    Parameters
    ----------
    first_id : the part's.
    """
    entries = found.entries.astype(np.int64)  # [n, k]
    entries[entries >= 0] += first_id
    values, weights = found.values.astype(np.int32), found.weights
    return FoundArrays(found.distances, entries, values, None if weights is None else weights.astype(np.int32))


class Shard(Living):
    """An actor: one part of an index with what the store has for its entries. Opens them when it is first asked."""

    def __init__(self, store: Path, part: IndexPart, index: str, threads: int) -> None:
        self.store, self.part, self.index_name, self.threads = store, part, index, threads

    def lists(self) -> int | None:
        """The number of the index's inverted lists."""
        ivf = inverted_file(self._index)
        return None if ivf is None else ivf.nlist

    def search(self, queries: np.ndarray, k: int, probe: int | None) -> tuple[FoundArrays, int]:
        """The part's ``k`` nearest entries of each query, and with how many vectors they were compared.

        Parameters
        ----------
        queries : as ``packed_queries`` makes them.

        Returns
        -------
        As ``of_shard`` takes it.
        """
        distances, rows, compared = self._nearest(unpacked_queries(queries), k, probe)  # [n, k]
        empty = rows < 0
        entries = np.where(empty, 0, rows + self.part.first_id)
        values, weights = self._datastore.values[entries], self._datastore.weights
        values[empty] = 0
        if weights is not None:
            weights = weights[entries]
            weights[empty] = 1
            weights = narrowed(weights)
        return FoundArrays(distances, narrowed(rows), narrowed(values), weights), compared

    def distances(
        self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray, sim_func: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances to entries of this part, and the entries' values.

        Parameters
        ----------
        queries : as ``packed_queries`` makes them.
        entries : integers ``[sum of counts]``, counted from the part's first, query by query.
        counts : integers ``[n]``, how many each query has.
        sim_func : exact distances of that kind; None is by the index's codes.
        """
        there = np.arange(counts.max(initial=0)) < counts[:, None]  # [n, most counts]
        rows = np.full(there.shape, -1, dtype=np.int64)
        rows[there] = entries
        rows[there] += self.part.start
        if sim_func is None:
            distances = self._codes(unpacked_queries(queries), rows, counts)
        else:
            distances = exact_distances(self._keys("exact distances"), unpacked_queries(queries), rows, sim_func)
        return distances[there], narrowed(self._datastore.values[rows[there]])

    def _nearest(self, queries: np.ndarray, k: int, probe: int | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Distances and entries ``[n, k]``, counted from the part's first, and how many were compared."""
        if self._signs is not None and probe is not None:
            return self._signs.search(queries, k, probe, self._removed)
        distances, entries = search(self._index, queries, k, probe, self._removed)
        return distances, entries, vectors_compared(self._index, len(queries))

    @cached_property
    def _datastore(self) -> Datastore:
        if not self.store.is_dir():
            raise UserError(
                f"The Ray node {socket.gethostname()} does not see the folder {self.store}; put the datastore on a "
                f"file system that all nodes share, under the same path."
            )
        faiss.omp_set_num_threads(self.threads)
        return Datastore.open(self.store, verify="never")  # the driver did

    def _keys(self, use: str) -> np.ndarray:
        """The store's keys, and torch made ready for them; an index alone starts without that, seconds earlier."""
        import torch

        torch.set_num_threads(self.threads)
        return self._datastore.require_keys(use)

    @cached_property
    def _index(self) -> faiss.Index:
        assert self._datastore
        return read_index(self.part.path)

    @cached_property
    def _signs(self) -> SignSearch | None:
        metadata, parts = find_parts(self._datastore, self.index_name)
        number = [part.start for part in parts].index(self.part.start) if "parts" in metadata else None
        return SignSearch.open(self._datastore, self._index, self.index_name, number)

    @cached_property
    def _removed(self) -> Removed | None:
        """The entries that do not count, as the part numbers them."""
        removed = self._datastore.removed
        return None if removed is None else removed.of_part(self.part.first_id)

    @cached_property
    def _codes(self) -> CodeDistances:
        return CodeDistances.read(self._datastore, self._index, self.index_name)


class ExactShard(Shard):
    """An actor that compares all keys of a run of entries; ``sim_func`` says how."""

    def __init__(self, store: Path, part: IndexPart, index: str, threads: int, sim_func: str) -> None:
        super().__init__(store, part, index, threads)
        self.sim_func = sim_func

    def lists(self) -> None:
        """None: there are no lists."""
        assert self._datastore

    def _nearest(self, queries: np.ndarray, k: int, probe: int | None) -> tuple[np.ndarray, np.ndarray, int]:
        distances, entries = np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1)
        if there := min(k, self._kept):
            distances[:, :there], entries[:, :there] = self._exact.search(queries, there)
        return distances, entries, len(queries) * self._kept

    @cached_property
    def _exact(self) -> ExactSearch:
        from knn_lm_eval.search.exact import ExactSearch

        keys = self._keys("exact search")
        return ExactSearch(keys[self.part.start : self.part.stop], self.sim_func, removed=self._removed)

    @cached_property
    def _removed(self) -> Removed | None:
        removed = self._datastore.removed
        return None if removed is None else removed.of_part(self.part.start, self.part.stop)

    @property
    def _kept(self) -> int:
        """How many entries are compared."""
        return self.part.stop - self.part.start if self._removed is None else self._removed.kept
