"""Searching an index beyond one machine: its parts are Ray actors, spread over a cluster's nodes.

A part's actor (a shard) maps its file and the store's arrays from a file system that all nodes share. The driver
puts a batch of queries into Ray's object store once, the shards search it side by side, and what they send (the
neighbours with their values and weights) is merged. What RetoMaton asks of given entries, and exact distances,
come from the shards that have the entries.

Ray restarts a shard that dies and sends it again what it had not answered.
"""

from __future__ import annotations

import copy
import itertools
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.faiss_index import inverted_file, open_index, read_index, search, set_probe
from knn_lm_eval.search.faiss_index import vectors_compared as compared_in
from knn_lm_eval.search.retriever import EntryDistances, Found, RetrievalStatistics, Retriever, exact_distances
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX, IndexPart
from knn_lm_eval.system.ray_cluster import connect

RESTARTS = 3  # of each shard
# A shard says at once that it is there, however long its work takes: it waits for a place if it does not.
PLACE_SECONDS = 120.0


class Life(NamedTuple):
    """Of a shard, which has a new one after each restart: a name of its own, and the node's."""

    name: str
    node: str


class Neighbours(NamedTuple):
    """What a shard found, or all together: as ``Found``, in arrays (weights are its counts)."""

    distances: np.ndarray
    entries: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None


class Shard:
    """An actor: one part of an index with what the store has for its entries. Opens them when it is first asked."""

    def __init__(self, store: Path, part: IndexPart, index: str, threads: int) -> None:
        self.store, self.part, self.index_name, self.threads = store, part, index, threads
        self.life = Life(uuid.uuid4().hex, socket.gethostname())

    def is_there(self) -> bool:
        """True, at once."""
        return True

    def lists(self) -> tuple[Life, int | None]:
        """The life, and the number of the index's inverted lists."""
        ivf = inverted_file(self._index)
        return self.life, None if ivf is None else ivf.nlist

    def search(self, queries: np.ndarray, k: int, probe: int | None) -> tuple[Life, Neighbours, int]:
        """The life; the part's ``k`` nearest entries of each query, and with how many vectors they were compared."""
        if probe is not None:
            set_probe(self._index, probe)
        distances, entries = search(self._index, queries, k)
        empty = entries < 0
        entries[~empty] += self.part.first_id
        values, weights = self._of_entries(self._datastore.values, entries), self._datastore.weights
        values[empty] = 0
        if weights is not None:
            weights = self._of_entries(weights, entries)
            weights[empty] = 1
        compared = compared_in(self._index, len(queries))
        return self.life, Neighbours(distances, entries, values, weights), compared

    def distances(
        self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray, sim_func: str | None
    ) -> tuple[Life, np.ndarray, np.ndarray]:
        """The life; distances to entries of this part, and the entries' values.

        Parameters
        ----------
        entries : int64 ``[sum of counts]``, query by query.
        counts : int64 ``[n]``, how many each query has.
        sim_func : exact distances of that kind; None is by the index's codes.
        """
        there = np.arange(counts.max(initial=0)) < counts[:, None]
        rows = np.full(there.shape, -1, dtype=np.int64)
        rows[there] = entries
        if sim_func is None:
            distances = self._codes(queries, rows, counts)
        else:
            distances = exact_distances(self._datastore.require_keys("exact distances"), queries, rows, sim_func)
        return self.life, distances[there], self._of_entries(self._datastore.values, entries)

    @cached_property
    def _datastore(self) -> Datastore:
        if not self.store.is_dir():
            raise UserError(
                f"The Ray node {self.life.node} does not see the folder {self.store}; put the datastore on a "
                f"file system that all nodes share, under the same path."
            )
        faiss.omp_set_num_threads(self.threads)
        torch.set_num_threads(self.threads)
        return Datastore.open(self.store)

    @cached_property
    def _index(self) -> faiss.Index:
        assert self._datastore
        return read_index(self.part.path)

    @cached_property
    def _codes(self) -> CodeDistances:
        return CodeDistances.read(self._datastore, self._index, self.index_name)

    def _of_entries(self, array: np.ndarray, entries: np.ndarray) -> np.ndarray:
        return array[np.maximum(entries, 0)]


class RayRetriever(Retriever):
    """As ``Retriever``, with the search and all that is asked of entries done by the index's parts on Ray nodes.

    Parameters
    ----------
    address : of the Ray cluster, see ``connect``.
    others : as for ``Retriever``.

    Raises
    ------
    UserError
        Also where no cluster answers, a node does not see the datastore's folder, or, at any time, a shard is lost
        for good or finds no place on a node within ``PLACE_SECONDS``.
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
    ) -> None:
        self.address = address
        super().__init__(datastore, k, probe, sim_func, recompute_dists, index=index)

    def _open(self, probe: int) -> int | None:
        self._ray = ray = connect(self.address)
        folder = self.datastore.path.resolve()
        threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // len(self.parts))
        if (limit := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            threads = min(threads, int(limit))
        # In turn, as Ray's own SPREAD may put all on one node; soft: a shard of a node that is gone goes elsewhere.
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        places = [affinity(node, soft=True) for node in nodes] or ["SPREAD"]
        # Two calls at a time: one that works, and one that asks whether the shard is there.
        options = {"max_restarts": RESTARTS, "max_task_retries": -1, "max_concurrency": 2}
        self._shards = [
            ray.remote(Shard)
            .options(scheduling_strategy=place, **options)
            .remote(folder, replace(part, path=folder / part.path.name), self.index_name, threads)
            for part, place in zip(self.parts, itertools.cycle(places), strict=False)
        ]
        self._starts = np.array([part.start for part in self.parts])
        self._lives: dict[int, Life] = {}
        self._values: np.ndarray | None = None
        answers = self._ask({number: shard.lists.remote() for number, shard in enumerate(self._shards)})
        self._lists: int | None = answers[0][1]
        return None if self._lists is None else min(probe, self._lists)

    @cached_property
    def cpu_index(self) -> faiss.Index:  # type: ignore[override]
        """The whole index, mapped by the driver: what codes are laid out from, or a benchmark compares with."""
        index, _ = open_index(self.datastore, self.index_name)
        set_probe(index, self.probe or 1)
        return index

    @property
    def index(self) -> faiss.Index:  # type: ignore[override]
        """The same."""
        return self.cpu_index

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
        """None: the shards have the index."""
        return 0

    def with_probe(self, probe: int) -> RayRetriever:
        """Another over the same shards, with statistics of its own, that visits ``probe`` lists."""
        other = copy.copy(self)
        other.probe = None if self._lists is None else min(probe, self._lists)
        other.statistics = RetrievalStatistics()
        return other

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

    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """As ``Retriever.distances_to``; ``codes`` are files that the shards map as well."""
        if codes is None:
            self.datastore.require_keys(f"RetoMaton with the index {self.metadata['factory']}")
        sim_func = self.sim_func if codes is None else None

        def ask(queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
            entries = np.where(np.arange(entries.shape[1]) < counts[:, None], entries, -1)
            return self._distances(self._ray.put(queries), entries, sim_func)

        return ask

    def _find(self, queries: np.ndarray) -> Neighbours:
        statistics, start = self.statistics, perf_counter()
        sent = self._ray.put(queries)
        calls = {n: shard.search.remote(sent, self.k, self.probe) for n, shard in enumerate(self._shards)}
        answers = self._ask(calls)
        found = merge([answers[number][1] for number in sorted(answers)], self.metadata["sim_func"] == "dot")
        statistics.searches += len(queries)
        statistics.entries_compared += sum(compared for _, _, compared in answers.values())
        statistics.seconds["search"] += perf_counter() - start
        if self._values is not None:
            there = found.entries >= 0
            self._values[found.entries[there]] = found.values[there]
        if self.recompute_dists:
            start = perf_counter()
            found = found._replace(distances=self._distances(sent, found.entries, self.sim_func))
            statistics.seconds["distances"] += perf_counter() - start
        return found

    def _distances(self, queries: Any, entries: np.ndarray, sim_func: str | None) -> np.ndarray:
        """Distances ``[n, m]`` to the store's entries (-1 in empty slots), from the shards that have them."""
        distances = np.full(entries.shape, np.inf, dtype=np.float32)
        owners = np.where(entries < 0, -1, np.searchsorted(self._starts, entries, side="right") - 1)
        slots = {number: owners == number for number in range(len(self._shards))}
        slots = {number: mine for number, mine in slots.items() if mine.any()}
        calls = {
            number: self._shards[number].distances.remote(queries, entries[mine], mine.sum(1), sim_func)
            for number, mine in slots.items()
        }
        for number, (_, theirs, values) in self._ask(calls).items():
            distances[slots[number]] = theirs
            if self._values is not None:
                self._values[entries[slots[number]]] = values
        return distances

    def _ask(self, calls: Mapping[int, Any]) -> dict[int, Any]:
        """Wait for the shards' answers, by their numbers; Ray sends calls again to shards that it restarts."""
        waiting, answers = {reference: number for number, reference in calls.items()}, {}
        while waiting:
            done, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=PLACE_SECONDS)
            for reference in done:
                number = waiting.pop(reference)
                answers[number] = answer = self._get(number, reference)
                before = self._lives.setdefault(number, answer[0])
                if answer[0] != before:
                    self._lives[number] = answer[0]
                    self.statistics.restarts += 1
            self._check_there(waiting.values())
        return answers

    def _check_there(self, numbers: Iterable[int]) -> None:
        """Raise UserError where one of these shards has no place: on no node can Ray (re)start it."""
        waiting = {self._shards[number].is_there.remote(): number for number in numbers}
        if not waiting:
            return
        there, missing = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=PLACE_SECONDS)
        for reference in there:
            self._get(waiting[reference], reference)
        if missing:
            raise UserError(
                f"{self._name(waiting[missing[0]])}: there has been no free CPU on a node for it within "
                f"{2 * PLACE_SECONDS:g} seconds; add nodes or free some, and run again."
            )

    def _get(self, number: int, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(f"{self._name(number)}: {error.cause}") from error
            raise
        except errors.RayError as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._name(number)} is lost, after {RESTARTS} restarts at most ({first_line}); see to the node, and "
                f"run again."
            ) from error

    def _name(self, number: int) -> str:
        """A shard, for an error message."""
        life = self._lives.get(number)
        where = "" if life is None else f", last on the node {life.node}"
        return f"The shard with {self.parts[number].path.name} (Ray at address={self.address}{where})"


def merge(parts: list[Neighbours], dot: bool) -> Neighbours:
    """The ``k`` nearest of several parts' ``k`` nearest, as ``faiss.IndexShards`` merges them.

    Parameters
    ----------
    parts : in the order of their entries; all of one shape ``[n, k]``.
    dot : the index ranks by inner product; its ties then fall the other way.
    """
    entries = np.stack([part.entries for part in parts])
    slots = np.arange(entries.size).reshape(entries.shape)
    slots[entries < 0] = -1
    scores = np.stack([part.distances for part in parts])
    scores, chosen = faiss.merge_knn_results(-scores if dot else scores, slots, keep_max=dot)
    distances = -scores if dot else scores
    empty = chosen < 0
    distances[empty] = np.inf

    def pick(arrays: list[np.ndarray], otherwise: int) -> np.ndarray:
        picked = np.stack(arrays).reshape(-1)[np.maximum(chosen, 0)]
        picked[empty] = otherwise
        return picked

    weights = [part.weights for part in parts if part.weights is not None]
    return Neighbours(
        distances,
        pick([part.entries for part in parts], -1),
        pick([part.values for part in parts], 0),
        pick(weights, 1) if weights else None,
    )
