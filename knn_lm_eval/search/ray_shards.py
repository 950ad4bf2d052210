"""The parts of an index, or runs of keys, on a Ray cluster's nodes: what they are asked, and what that weighs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knn_lm_eval.search.packing import narrowed, packed_queries
from knn_lm_eval.search.ray_seats import Seats
from knn_lm_eval.search.shard import ExactShard, FoundArrays, Shard, of_shard
from knn_lm_eval.store.index_files import IndexPart
from knn_lm_eval.store.manifest import KEYS
from knn_lm_eval.system.ray_cluster import Head


class Sent(NamedTuple):
    """Queries on their way: Ray's reference, and bytes."""

    reference: Any
    size: int


def count_nodes(address: str) -> int:
    """How many nodes with a CPU a Ray cluster has, at least one; see ``connect`` for ``address``."""
    return max(1, len(Head(address).workers))


class Shards:
    """All shards of an index, or of all keys, started in turn on a cluster's nodes.

    Parameters
    ----------
    store : the datastore's folder.
    index_name : the index's name, or ``exact``.
    parts : its files, or runs of keys, in order.
    address : of the Ray cluster, see ``connect``.
    sim_func : how keys are compared; None for an index, which knows.
    replicas : actors that hold each shard, on different nodes.

    Attributes
    ----------
    seats : who holds them.
    lists : how many inverted lists the index has; None for one without.
    bytes_sent, bytes_received : of queries and entries to shards, and of distances, entries, values and counts from
        them; each shard's, also where several are on one node.

    Raises
    ------
    UserError
        Where no cluster answers, and for what ``Seats`` raises it for.
    """

    def __init__(
        self,
        store: Path,
        index_name: str,
        parts: list[IndexPart],
        address: str,
        sim_func: str | None = None,
        replicas: int = 1,
    ) -> None:
        head = Head(address)
        cpus = sum(node.resources["CPU"] for node in head.workers)
        threads = max(1, int(cpus) // (len(parts) * replicas))
        if (limit := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            threads = min(threads, int(limit))
        folder = store.resolve()
        how = () if sim_func is None else (sim_func,)
        arguments = [(folder, replace(part, path=folder / part.path.name), index_name, threads, *how) for part in parts]
        self._ray, self._parts = head.ray, parts
        self._starts = np.array([part.start for part in parts])  # [parts]
        self.bytes_sent = self.bytes_received = 0
        self.seats = Seats(head, Shard if sim_func is None else ExactShard, arguments, self._name_of, replicas)
        self.lists: int | None = self.seats.of_shards[0][0].lists

    @property
    def restarts(self) -> int:
        """Actors that were started in the place of others so far."""
        return self.seats.restarts

    def send(self, queries: np.ndarray) -> Sent:
        """Put float32 queries where all shards can take them from."""
        packed = packed_queries(queries)
        return Sent(self._ray.put(packed), packed.nbytes)

    def search(self, sent: Sent, k: int, probe: int | None) -> tuple[list[FoundArrays], int]:
        """What each shard found, in the order of their entries, and with how many vectors the queries were compared."""
        numbers = range(len(self._parts))
        answers = self.seats.ask({number: partial(_ask_search, sent.reference, k, probe) for number in numbers})
        for number in numbers:
            self._count(sent.size, [array for array in answers[number][0] if array is not None])
        found = [of_shard(answers[number][0], part.first_id) for number, part in enumerate(self._parts)]
        return found, sum(compared for _, compared in answers.values())

    def distances(self, sent: Sent, entries: np.ndarray, sim_func: str | None) -> tuple[np.ndarray, np.ndarray]:
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
        calls: dict[int, Callable[[Any], Any]] = {}
        for number, owned in slots.items():
            rows, counts = narrowed(entries[owned] - self._starts[number]), narrowed(owned.sum(1))
            calls[number] = partial(_ask_distances, sent.reference, rows, counts, sim_func)
            self._count(sent.size + rows.nbytes + counts.nbytes, [])
        for number, answer in self.seats.ask(calls).items():
            self._count(0, answer)
            distances[slots[number]], values[slots[number]] = answer
        return distances, values

    def _count(self, sent: int, received: Iterable[np.ndarray]) -> None:
        self.bytes_sent += sent
        self.bytes_received += sum(array.nbytes for array in received)

    def _name_of(self, number: int) -> str:
        part = self._parts[number]
        return part.path.name + (f" from {part.start:,} to {part.stop:,}" if part.path.name == KEYS else "")


def _ask_search(queries: Any, k: int, probe: int | None, actor: Any) -> Any:
    return actor.search.remote(queries, k, probe)


def _ask_distances(queries: Any, rows: np.ndarray, counts: np.ndarray, sim_func: str | None, actor: Any) -> Any:
    return actor.distances.remote(queries, rows, counts, sim_func)
