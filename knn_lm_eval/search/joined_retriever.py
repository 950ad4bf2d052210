"""Neighbours in several datastores: each is searched by its own index, and the nearest of all are taken.

With exact searches they are those of one datastore that holds the entries of all. Distances by different indexes are
approximations of different kinds, which are compared as they are.

A store's weight multiplies the softmax weight of each of its entries, as if it held each so often: what the counts of
merged entries do in a store (He et al. 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.merged_runs import nearest_of_runs
from knn_lm_eval.search.retriever import (
    EntryDistances,
    Found,
    RetrievalStatistics,
    Retriever,
    SearchSettings,
    StoreRetriever,
)
from knn_lm_eval.store.joined import BETWEEN, JoinedStore, short_checksum
from knn_lm_eval.system.timing import now


class JoinedRetriever(Retriever):
    """As ``Retriever``, of several datastores.

    Parameters
    ----------
    datastore : the stores.
    retrievers : one of each, which finds k neighbours or all that the store has; nobody else uses them.
    k : neighbours per query.
    weights : of each store.
    knn_temp : the softmax temperature at which it is told how much of the neighbours' weight came from each store.

    Raises
    ------
    UserError
        Where the stores' distances are of different kinds of nearness, or a setting does not fit.
    """

    datastore: JoinedStore

    def __init__(
        self,
        datastore: JoinedStore,
        retrievers: Sequence[StoreRetriever],
        k: int,
        weights: Sequence[float],
        knn_temp: float,
    ) -> None:
        self._parts, self.weights, self._knn_temp = tuple(retrievers), tuple(weights), knn_temp
        kinds = {part.sim_func: part for part in self._parts}
        if len(kinds) > 1:
            raise UserError(
                "The datastores' indexes rank differently ("
                + ", ".join(f"{part.datastore.path}: {name}" for name, part in kinds.items())
                + "), so their distances do not compare: build an index of the other kind, or give index=exact."
            )
        names = dict.fromkeys(part.name for part in self._parts)
        super().__init__(datastore, BETWEEN.join(names), self._settings_of(self._parts, k))
        self.on_gpus = any(part.on_gpus for part in self._parts)
        self.searched_on = " + ".join(dict.fromkeys(part.searched_on for part in self._parts))
        self.statistics = self._no_statistics()

    def _settings_of(self, parts: Sequence[StoreRetriever], k: int) -> SearchSettings:
        probes = {part.probe for part in parts if part.has_lists}
        return SearchSettings(
            k,
            probes.pop() if len(probes) == 1 else None,
            parts[0].sim_func,
            any(part.recompute_dists for part in parts),
            any(part.settings.gpu for part in parts),
        )

    def _no_statistics(self) -> RetrievalStatistics:
        stores = len(self._parts)
        return RetrievalStatistics(neighbours_of_stores=[0] * stores, weight_of_stores=[0.0] * stores)

    def with_settings(
        self, *, k: int | None = None, probe: int | None = None, recompute_dists: bool | None = None
    ) -> JoinedRetriever:
        """As ``Retriever.with_settings``; a probe counts for all stores whose index has lists."""
        wanted = self.k if k is None else k
        return self._with(
            [
                part.with_settings(
                    k=max(1, min(wanted, part.datastore.kept)), probe=probe, recompute_dists=recompute_dists
                )
                for part in self._parts
            ],
            wanted,
        )

    def _with(self, parts: Sequence[StoreRetriever], k: int) -> JoinedRetriever:
        """Another retriever, of these parts."""
        other = copy.copy(self)
        other._parts = tuple(parts)
        other._settings = self._checked(self._settings_of(other._parts, k))
        other.statistics = other._no_statistics()
        return other

    @property
    def of_stores(self) -> tuple[StoreRetriever, ...]:
        """Each store's, in the stores' order."""
        return self._parts

    @property
    def has_lists(self) -> bool:
        """Whether an index of any has inverted lists; ``probe`` is None where they visit different numbers of them."""
        return any(part.has_lists for part in self._parts)

    @property
    def factory(self) -> str:
        """Those of all, where they differ."""
        return BETWEEN.join(dict.fromkeys(part.factory for part in self._parts))

    @property
    def bytes_on_disk(self) -> int:
        """Of all indexes."""
        return sum(part.bytes_on_disk for part in self._parts)

    @property
    def bytes_held(self) -> int:
        """By all."""
        return sum(part.bytes_held for part in self._parts)

    @property
    def kind_of_distances(self) -> str:
        """As ``Retriever.kind_of_distances``; ``approximate and exact`` where the stores differ."""
        return " and ".join(sorted({part.kind_of_distances for part in self._parts}))

    @property
    def first_of_more_are_fewer(self) -> bool:
        """Where it is so for all, and what they find is nearest first."""
        return not self.recompute_dists and all(part.first_of_more_are_fewer for part in self._parts)

    def identity(self) -> dict[str, Any]:
        """Each store's, its files and its weight."""
        return {
            "stores": [
                {"files": part.datastore.manifest.files, "weight": weight, **part.identity()}
                for part, weight in zip(self._parts, self.weights, strict=True)
            ]
        }

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file of the indexes, by store and name."""
        return {
            f"{short_checksum(part.datastore)}/{name}": checksum
            for part in self._parts
            for name, checksum in part.checksums().items()
        }

    @cached_property
    def _values(self) -> np.ndarray:
        return self.datastore.values()

    @property
    def values(self) -> np.ndarray:
        """int32 ``[count]``, a copy in memory; raises UserError where that is too small."""
        return self._values

    def search(self, queries: Tensor) -> Found:
        """As ``Retriever.search``."""
        queries = queries.float().cpu()
        with self._counted(len(queries)):
            found = [part.search(queries) for part in self._parts]
        start = now()
        distances = [one.distances.numpy() for one in found]
        nearest = nearest_of_runs(distances, self.k)  # [n, k]
        counts = self._counts([one.counts for one in found], distances)
        merged = Found(
            _taken(distances, nearest),
            _taken([one.values.numpy() for one in found], nearest),
            _taken(self._numbered([one.entries.numpy() for one in found]), nearest),
            None if counts is None else _taken(counts, nearest),
        )
        self._note(distances, nearest, merged)
        self.statistics.seconds["search"] += now() - start
        return merged

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Retriever.find``."""
        with self._counted(len(queries)):
            found = [part.find(queries) for part in self._parts]
        start = now()
        of_stores = [distances for distances, _ in found]
        nearest = nearest_of_runs(of_stores, self.k)  # [n, k]
        distances = _taken(of_stores, nearest)
        entries = _taken(self._numbered([entries for _, entries in found]), nearest)
        self._note(of_stores, nearest, Found(distances, torch.empty(0), entries, None))
        self.statistics.seconds["search"] += now() - start
        return distances.numpy(), entries.numpy()

    def _numbered(self, entries: list[np.ndarray]) -> list[np.ndarray]:
        """Each store's entries by their numbers among all."""
        starts = self.datastore.starts.tolist()
        return [np.where(of_store < 0, -1, of_store + start) for of_store, start in zip(entries, starts, strict=False)]

    def _counts(self, counts: list[Tensor | None], distances: list[np.ndarray]) -> list[np.ndarray] | None:
        """How often each neighbour counts, ``[n, slots]`` for each store; None where all do once."""
        weighs = any(weight != 1 for weight in self.weights)
        if not weighs and all(of_store is None for of_store in counts):
            return None
        found = [
            np.ones(slots.shape, dtype=np.int32) if of_store is None else of_store.numpy()
            for of_store, slots in zip(counts, distances, strict=True)
        ]
        if not weighs:
            return found
        return [
            of_store.astype(np.float32) * np.float32(weight)
            for of_store, weight in zip(found, self.weights, strict=True)
        ]

    def _note(self, runs: list[np.ndarray], nearest: np.ndarray, found: Found) -> None:
        """Count how many of the neighbours, and how much of their weight, came from each store."""
        ends = np.cumsum([run.shape[1] for run in runs])
        distances = found.distances.numpy().astype(np.float64)  # [n, k]
        least = distances.min(axis=1, keepdims=True)
        share = np.exp((np.where(np.isinf(least), 0.0, least) - distances) / self._knn_temp)
        if found.counts is not None:
            share *= found.counts.numpy()
        share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-300)
        there, before = found.entries.numpy() >= 0, 0
        for number, end in enumerate(ends.tolist()):
            own = (nearest >= before) & (nearest < end) & there
            self.statistics.neighbours_of_stores[number] += int(np.count_nonzero(own))
            self.statistics.weight_of_stores[number] += float(share[own].sum())
            before = end

    @contextmanager
    def _counted(self, searches: int = 0) -> Iterator[None]:
        """Inside, what the parts do is counted as done by all together."""
        before = [copy.deepcopy(part.statistics) for part in self._parts]
        try:
            yield
        finally:
            own = self.statistics
            own.searches += searches
            for part, then in zip(self._parts, before, strict=True):
                for name in ("entries_compared", "restarts", "bytes_sent", "bytes_received"):
                    setattr(own, name, getattr(own, name) + getattr(part.statistics, name) - getattr(then, name))
                for stage, seconds in part.statistics.seconds.items():
                    own.seconds[stage] += seconds - then.seconds[stage]

    def with_distances(self) -> tuple[JoinedRetriever, EntryDistances]:
        """As ``Retriever.with_distances``, a store at a time."""
        found = [part.with_distances() for part in self._parts]
        other = self._with([part for part, _ in found], self.k)
        return other, JoinedDistances(self.datastore, tuple(distances for _, distances in found))


@dataclass(frozen=True)
class JoinedDistances:
    """Distances to given entries of several stores, each by its store's codes or keys.

    Attributes
    ----------
    datastore : the stores.
    of_stores : each one's.
    """

    datastore: JoinedStore
    of_stores: tuple[EntryDistances, ...]

    @cached_property
    def _widths(self) -> np.ndarray:
        """``[stores + 1]``: where each store's part of a transformed query begins, and the last one's end."""
        widths = [
            one.centroids.shape[1] if isinstance(one, CodeDistances) else self.datastore.dimension
            for one in self.of_stores
        ]
        return np.cumsum([0, *widths])

    def __call__(self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As ``EntryDistances``."""
        return self.of_transformed(self.transformed(queries), entries, counts)

    def transformed(self, queries: np.ndarray) -> np.ndarray:
        """What each store takes of the queries, side by side: float32 ``[n, sum of the stores' widths]``."""
        return np.concatenate([_transformed(one, queries) for one in self.of_stores], axis=1)

    def of_transformed(self, queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As a call, for queries that are ``transformed``."""
        distances = np.empty(entries.shape, dtype=np.float32)
        slots = np.arange(entries.shape[1])
        filled = slots < counts[:, None]  # [n, m]
        for number, of_store in enumerate(self.of_stores):
            first, stop = self.datastore.starts[number : number + 2].tolist()
            own = filled & (entries >= first) & (entries < stop)
            of_rows = own.sum(axis=1)
            if not of_rows.any():
                continue
            left = slots[: int(of_rows.max())] < of_rows[:, None]  # [n, most], filled from the left
            rows = np.zeros(left.shape, dtype=np.int64)
            rows[left] = entries[own] - first
            asked = np.flatnonzero(of_rows)
            own_part = np.ascontiguousarray(queries[asked, self._widths[number] : self._widths[number + 1]])
            found = np.empty(left.shape, dtype=np.float32)
            found[asked] = _of_transformed(of_store)(own_part, rows[asked], of_rows[asked])
            distances[own] = found[left]
        return distances


def _transformed(distances: EntryDistances, queries: np.ndarray) -> np.ndarray:
    return distances.transformed(queries) if isinstance(distances, CodeDistances) else queries


def _of_transformed(distances: EntryDistances) -> EntryDistances:
    return distances.of_transformed if isinstance(distances, CodeDistances) else distances


def _taken(runs: Sequence[np.ndarray], nearest: np.ndarray) -> Tensor:
    """The slots ``nearest`` of runs side by side."""
    return torch.from_numpy(np.take_along_axis(np.concatenate(runs, axis=1), nearest, 1))
