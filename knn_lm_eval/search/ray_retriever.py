"""Searching beyond one machine: an index's parts, or runs of keys, are Ray actors, spread over a cluster's nodes.

The driver puts a batch of queries into Ray's object store once, the shards search it side by side, and what they
send (the neighbours with their values and weights) is merged. What RetoMaton asks of given entries, and exact
distances, come from the shards that have the entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise

import faiss
import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.faiss_index import open_index, set_probe
from knn_lm_eval.search.index_retriever import IndexRetriever
from knn_lm_eval.search.ray_shards import Shards, count_nodes
from knn_lm_eval.search.retriever import EntryDistances, Found, SearchSettings, StoreRetriever
from knn_lm_eval.search.shard import FoundArrays
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX, EXACT, IndexPart
from knn_lm_eval.store.manifest import KEYS
from knn_lm_eval.system.timing import now


class ShardedRetriever(StoreRetriever):
    """As ``Retriever``, with the search and all that is asked of entries done by shards on Ray nodes.

    Attributes
    ----------
    shards : those that are asked; retrievers that were made ``with_settings`` share them.
    """

    shards: Shards
    _values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """int32 ``[count]``: the values that shards send are entered here, from the first look at it on.

        Pages of it that no entry falls in take no memory.
        """
        if self._values is None:
            self._values = np.zeros(len(self.datastore), dtype=np.int32)
        return self._values

    @property
    def bytes_held(self) -> int:
        """None: the shards have what is searched."""
        return 0

    def search(self, queries: Tensor) -> Found:
        """As ``Retriever.search``."""
        found = self._find(queries.float().cpu().numpy())
        weights = None if found.weights is None else torch.from_numpy(found.weights)
        distances, entries, values = map(torch.from_numpy, found[:3])
        return Found(distances, values, entries, weights)

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Retriever.find``."""
        found = self._find(queries)
        return found.distances, found.entries

    @abstractmethod
    def _merge(self, of_shards: list[FoundArrays]) -> FoundArrays:
        """The nearest of what all shards found."""

    def _find(self, queries: np.ndarray) -> FoundArrays:
        statistics, start = self.statistics, now()
        sent = self.shards.send(queries)
        with self._shards_counted():
            of_shards, compared = self.shards.search(sent, self.k, self.probe)
        found = self._merge(of_shards)
        statistics.searches += len(queries)
        statistics.entries_compared += compared
        statistics.seconds["search"] += now() - start
        self._enter_values(found.entries, found.values)
        if self.recompute_dists:
            start = now()
            with self._shards_counted():
                distances, _ = self.shards.distances(sent, found.entries, self.sim_func)
            found = found._replace(distances=distances)
            statistics.seconds["distances"] += now() - start
        return found

    def _distances_by_shards(self, sim_func: str | None) -> EntryDistances:
        """Distances from the shards that have the entries: exact ones, or by the index's codes where that is None."""

        def ask(queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
            entries = np.where(np.arange(entries.shape[1]) < counts[:, None], entries, -1)  # [n, m]
            with self._shards_counted():
                distances, values = self.shards.distances(self.shards.send(queries), entries, sim_func)
            self._enter_values(entries, values)
            return distances

        return ask

    def _enter_values(self, entries: np.ndarray, values: np.ndarray) -> None:
        """Keep what shards sent, if anybody looks at ``values``; both ``[n, m]``, with entries -1 in empty slots."""
        if self._values is not None:
            there = entries >= 0
            self._values[entries[there]] = values[there]

    @contextmanager
    def _shards_counted(self) -> Iterator[None]:
        shards, statistics = self.shards, self.statistics
        before = shards.restarts, shards.bytes_sent, shards.bytes_received
        try:
            yield
        finally:
            statistics.restarts += shards.restarts - before[0]
            statistics.bytes_sent += shards.bytes_sent - before[1]
            statistics.bytes_received += shards.bytes_received - before[2]


class RayRetriever(ShardedRetriever, IndexRetriever):
    """As ``IndexRetriever``; the index's parts are the shards.

    Parameters
    ----------
    address : of the Ray cluster, see ``connect``.
    replicas : actors that hold each part, on different nodes.
    others : as for ``IndexRetriever``.

    Raises
    ------
    UserError
        Also for what ``Shards`` raises it for.
    """

    def __init__(
        self,
        datastore: Datastore,
        k: int = 1024,
        probe: int | None = None,
        sim_func: str | None = None,
        recompute_dists: bool = False,
        index: str = DEFAULT_INDEX,
        address: str = "auto",
        replicas: int = 1,
    ) -> None:
        self.address, self.replicas = address, replicas
        super().__init__(datastore, index, k, probe, sim_func, recompute_dists)

    def _open(self, settings: SearchSettings) -> int | None:
        self.shards = Shards(self.datastore.path, self.name, self.parts, self.address, replicas=self.replicas)
        return self.shards.lists

    @cached_property
    def cpu_index(self) -> faiss.Index:
        """The whole index, mapped by the driver when it is first asked for."""
        index, _ = open_index(self.datastore, self.name)
        set_probe(index, self.probe or 1)
        return index

    @property
    def index(self) -> faiss.Index:
        """The same."""
        return self.cpu_index

    def _merge(self, of_shards: list[FoundArrays]) -> FoundArrays:
        return merge_found(of_shards, self.metadata["sim_func"] == "dot")

    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """As ``IndexRetriever.distances_to``; ``codes`` are files that the shards map as well."""
        if codes is None:
            self.datastore.require_keys(f"RetoMaton with the index {self.factory}")
        return self._distances_by_shards(self.sim_func if codes is None else None)


class RayExactRetriever(ShardedRetriever, ExactRetriever):
    """As ``ExactRetriever``; each node of a Ray cluster that has a CPU compares a run of the keys.

    Parameters
    ----------
    address : of the Ray cluster, see ``connect``.
    replicas : actors that hold each run, on different nodes.
    others : as for ``ExactRetriever``.

    Raises
    ------
    UserError
        Also for what ``Shards`` raises it for.
    """

    def __init__(
        self,
        datastore: Datastore,
        k: int = 1024,
        sim_func: str | None = None,
        address: str = "auto",
        replicas: int = 1,
    ) -> None:
        super().__init__(datastore, k, sim_func, "cpu")
        nodes = count_nodes(address)
        ends = [len(datastore) * number // nodes for number in range(nodes + 1)]
        keys = datastore.path / KEYS
        runs = [IndexPart(keys, start, stop, start) for start, stop in pairwise(ends) if stop > start]
        self.shards = Shards(datastore.path, EXACT, runs, address, self.sim_func, replicas)

    def _merge(self, of_shards: list[FoundArrays]) -> FoundArrays:
        return merge_exact(of_shards)

    def with_distances(self) -> tuple[RayExactRetriever, EntryDistances]:
        """This retriever, and exact distances."""
        return self, self._distances_by_shards(self.sim_func)


def merge_exact(parts: list[FoundArrays]) -> FoundArrays:
    """The ``k`` nearest of several parts' ``k`` nearest; of equally near ones that of the smaller number.

    Parameters
    ----------
    parts : in the order of their entries; all of one shape ``[n, k]``.
    """
    distances, entries, values = (np.concatenate([part[column] for part in parts], 1) for column in range(3))
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : parts[0].entries.shape[1]]  # [n, k]
    weights = [part.weights for part in parts if part.weights is not None]
    return FoundArrays(
        np.take_along_axis(distances, nearest, 1),
        np.take_along_axis(entries, nearest, 1),
        np.take_along_axis(values, nearest, 1),
        np.take_along_axis(np.concatenate(weights, 1), nearest, 1) if weights else None,
    )


def merge_found(parts: list[FoundArrays], dot: bool) -> FoundArrays:
    """The ``k`` nearest of several parts' ``k`` nearest, as ``faiss.IndexShards`` merges them.

    Parameters
    ----------
    parts : in the order of their entries; all of one shape ``[n, k]``.
    dot : the index ranks by inner product; its ties then fall the other way.
    """
    entries = np.stack([part.entries for part in parts])  # [parts, n, k]
    slots = np.arange(entries.size).reshape(entries.shape)  # [parts, n, k]
    slots[entries < 0] = -1
    scores = np.stack([part.distances for part in parts])  # [parts, n, k]
    scores, chosen = faiss.merge_knn_results(-scores if dot else scores, slots, keep_max=dot)  # [n, k]
    distances = -scores if dot else scores
    empty = chosen < 0
    distances[empty] = np.inf

    def pick(arrays: list[np.ndarray], otherwise: int) -> np.ndarray:
        picked = np.stack(arrays).reshape(-1)[np.maximum(chosen, 0)]
        picked[empty] = otherwise
        return picked

    weights = [part.weights for part in parts if part.weights is not None]
    return FoundArrays(
        distances,
        pick([part.entries for part in parts], -1),
        pick([part.values for part in parts], 0),
        pick(weights, 1) if weights else None,
    )
