"""The parts of an index, or runs of keys, as Ray actors, spread over a cluster's nodes, and how they are asked.

A part's actor (a shard) maps its file and the store's arrays from a file system that all nodes share. Ray restarts a
shard that dies and sends it again what it had not answered.
"""

from __future__ import annotations

import itertools
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.faiss_index import inverted_file, read_index, search, vectors_compared
from knn_lm_eval.search.sign_codes import SignSearch
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexPart, find_parts
from knn_lm_eval.store.manifest import KEYS
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.system.ray_cluster import connect

RESTARTS = 3  # of each shard
# A shard says at once that it is there, however long its work takes: it waits for a place if it does not.
PLACE_SECONDS = 120.0


class Life(NamedTuple):
    """Of a shard, which has a new one after each restart: a name of its own, and the node's."""

    name: str
    node: str


class FoundArrays(NamedTuple):
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

    def search(self, queries: np.ndarray, k: int, probe: int | None) -> tuple[Life, FoundArrays, int]:
        """The life; the part's ``k`` nearest entries of each query, and with how many vectors they were compared."""
        distances, entries, compared = self._nearest(queries, k, probe)  # [n, k]
        empty = entries < 0
        entries[~empty] += self.part.first_id
        values, weights = self._of_entries(self._datastore.values, entries), self._datastore.weights
        values[empty] = 0
        if weights is not None:
            weights = self._of_entries(weights, entries)
            weights[empty] = 1
        return self.life, FoundArrays(distances, entries, values, weights), compared

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
        there = np.arange(counts.max(initial=0)) < counts[:, None]  # [n, most counts]
        rows = np.full(there.shape, -1, dtype=np.int64)
        rows[there] = entries
        if sim_func is None:
            distances = self._codes(queries, rows, counts)
        else:
            distances = exact_distances(self._datastore.require_keys("exact distances"), queries, rows, sim_func)
        return self.life, distances[there], self._of_entries(self._datastore.values, entries)

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
                f"The Ray node {self.life.node} does not see the folder {self.store}; put the datastore on a "
                f"file system that all nodes share, under the same path."
            )
        faiss.omp_set_num_threads(self.threads)
        torch.set_num_threads(self.threads)
        return Datastore.open(self.store, verify="never")  # the driver did

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

    def _of_entries(self, array: np.ndarray, entries: np.ndarray) -> np.ndarray:
        return array[np.maximum(entries, 0)]


class ExactShard(Shard):
    """An actor that compares all keys of a run of entries; ``sim_func`` says how."""

    def __init__(self, store: Path, part: IndexPart, index: str, threads: int, sim_func: str) -> None:
        super().__init__(store, part, index, threads)
        self.sim_func = sim_func

    def lists(self) -> tuple[Life, int | None]:
        """The life, and that there are no lists."""
        assert self._datastore
        return self.life, None

    def _nearest(self, queries: np.ndarray, k: int, probe: int | None) -> tuple[np.ndarray, np.ndarray, int]:
        distances, entries = np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1)
        there = min(k, self._kept)
        distances[:, :there], entries[:, :there] = self._exact.search(queries, there)
        return distances, entries, len(queries) * self._kept

    @cached_property
    def _exact(self) -> ExactSearch:
        keys = self._datastore.require_keys("exact search")
        return ExactSearch(keys[self.part.start : self.part.stop], self.sim_func, removed=self._removed)

    @cached_property
    def _removed(self) -> Removed | None:
        removed = self._datastore.removed
        return None if removed is None else removed.of_part(self.part.start, self.part.stop)

    @property
    def _kept(self) -> int:
        """How many entries are compared."""
        return self.part.stop - self.part.start if self._removed is None else self._removed.kept


def count_nodes(address: str) -> int:
    """How many nodes with a CPU a Ray cluster has, at least one; see ``connect`` for ``address``."""
    return max(1, len(_nodes(connect(address))))


def _nodes(ray: Any) -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


class Shards:
    """All shards of an index, or of all keys, started in turn on a cluster's nodes.

    Parameters
    ----------
    store : the datastore's folder.
    index_name : the index's name, or ``exact``.
    parts : its files, or runs of keys, in order.
    address : of the Ray cluster, see ``connect``.
    sim_func : how keys are compared; None for an index, which knows.

    Attributes
    ----------
    actors : the shards, in the order of their entries.
    lists : how many inverted lists the index has; None for one without.
    restarts : of all shards so far.

    Raises
    ------
    UserError
        Where no cluster answers, a node does not see the datastore's folder, or, at any time, a shard is lost for
        good or does not start on a node in twice ``PLACE_SECONDS``.
    """

    def __init__(
        self, store: Path, index_name: str, parts: list[IndexPart], address: str, sim_func: str | None = None
    ) -> None:
        self._ray = ray = connect(address)
        self._parts, self._address = parts, address
        folder = store.resolve()
        threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // len(parts))
        if (limit := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            threads = min(threads, int(limit))
        # In turn, as Ray's own SPREAD may put all on one node; soft: a shard of a node that is gone goes elsewhere.
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        places = [affinity(node, soft=True) for node in _nodes(ray)] or ["SPREAD"]
        # Two calls at a time: one that works, and one that asks whether the shard is there.
        options = {"max_restarts": RESTARTS, "max_task_retries": -1, "max_concurrency": 2}
        kind, how = (Shard, ()) if sim_func is None else (ExactShard, (sim_func,))
        self.actors = [
            ray.remote(kind)
            .options(scheduling_strategy=place, **options)
            .remote(folder, replace(part, path=folder / part.path.name), index_name, threads, *how)
            for part, place in zip(parts, itertools.cycle(places), strict=False)
        ]
        self._starts = np.array([part.start for part in parts])  # [parts]
        self._lives: dict[int, Life] = {}
        self.restarts = 0
        answers = self.ask({number: actor.lists.remote() for number, actor in enumerate(self.actors)})
        self.lists: int | None = answers[0][1]

    def send(self, queries: np.ndarray) -> Any:
        """Put queries where all shards can take them from; returns what ``search`` and ``distances`` are given."""
        return self._ray.put(queries)

    def search(self, sent: Any, k: int, probe: int | None) -> tuple[list[FoundArrays], int]:
        """What each shard found, in the order of their entries, and with how many vectors the queries were compared."""
        answers = self.ask({number: actor.search.remote(sent, k, probe) for number, actor in enumerate(self.actors)})
        found = [answers[number][1] for number in sorted(answers)]
        return found, sum(compared for _, _, compared in answers.values())

    def distances(self, sent: Any, entries: np.ndarray, sim_func: str | None) -> tuple[np.ndarray, np.ndarray]:
        """From the shards that have the entries.

        Parameters
        ----------
        sent : ``n`` queries.
        entries : int64 ``[n, m]``; -1 in empty slots.
        sim_func : exact distances of that kind; None is by the index's codes.

        Returns
        -------
        distances : float32 ``[n, m]``; infinity in empty slots.
        values : int32 ``[n, m]``, of the entries; 0 in empty slots.
        """
        distances = np.full(entries.shape, np.inf, dtype=np.float32)  # [n, m]
        values = np.zeros(entries.shape, dtype=np.int32)  # [n, m]
        owners = np.where(entries < 0, -1, np.searchsorted(self._starts, entries, side="right") - 1)  # [n, m]
        slots = {number: owners == number for number in np.unique(owners).tolist() if number >= 0}
        calls = {
            number: self.actors[number].distances.remote(sent, entries[owned], owned.sum(1), sim_func)
            for number, owned in slots.items()
        }
        for number, (_, of_shard, values_of_shard) in self.ask(calls).items():
            distances[slots[number]] = of_shard
            values[slots[number]] = values_of_shard
        return distances, values

    def ask(self, calls: Mapping[int, Any]) -> dict[int, Any]:
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
                    self.restarts += 1
            self._check_there(waiting.values())
        return answers

    def _check_there(self, numbers: Iterable[int]) -> None:
        """Raise UserError where one of these shards is on no node: Ray has not (re)started it."""
        waiting = {self.actors[number].is_there.remote(): number for number in numbers}
        if not waiting:
            return
        there, missing = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=PLACE_SECONDS)
        for reference in there:
            self._get(waiting[reference], reference)
        if missing:
            raise UserError(
                f"{self._name(waiting[missing[0]])}: it has not started on any node within {2 * PLACE_SECONDS:g} "
                f"seconds: none has a CPU for it, or they are too busy; see to the nodes, and run again."
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
        part = self._parts[number]
        run = f" from {part.start:,} to {part.stop:,}" if part.path.name == KEYS else ""
        return f"The shard with {part.path.name}{run} (Ray at address={self._address}{where})"
