"""From queries to neighbours: what all retrievers have in common, whatever they search and wherever.

A retriever's settings stay as they are for its life, so who shares one can rely on them. Who needs others asks it for
another retriever with ``with_settings``, which searches what the first has opened.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.exact_distances import exact_distances, filled_slots
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.joined import Store
from knn_lm_eval.system.timing import now

AnyRetriever = TypeVar("AnyRetriever", bound="Retriever")

# queries [n, dimension], entries int64 [n, m], counts int64 [n] -> distances float32 [n, m], undefined beyond counts.
EntryDistances = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass
class RetrievalStatistics:
    """What a retriever did: queries searched, vectors compared with them, shards that were started again and bytes that
    went to and came from them, seconds; of several stores, how many of the neighbours, and how much of their weight
    (1 for each query), came from each."""

    searches: int = 0
    entries_compared: int = 0
    restarts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"search": 0.0, "distances": 0.0, "values": 0.0})
    neighbours_of_stores: list[int] = field(default_factory=list)
    weight_of_stores: list[float] = field(default_factory=list)


class Found(NamedTuple):
    """The neighbours of ``n`` queries.

    Attributes
    ----------
    distances : float32 ``[n, k]`` (squared L2 or negated inner product); infinity in empty slots.
    values : int32 ``[n, k]``; 0 in empty slots.
    entries : int64 ``[n, k]``; -1 in empty slots.
    counts : int32 ``[n, k]``, how many merged entries each stands for; None in a store without weights. Of several
        stores with weights of their own, float32: these times that.
    """

    distances: Tensor
    values: Tensor
    entries: Tensor
    counts: Tensor | None


@dataclass(frozen=True)
class SearchSettings:
    """How neighbours are searched for.

    Attributes
    ----------
    k : neighbours per query.
    probe : inverted lists visited per query; None for an index without lists.
    sim_func : ``l2`` (squared) or ``dot``.
    recompute_dists : whether the neighbours' distances are computed from the keys on disk, exactly, instead of
        taken from the index, approximately.
    gpu : whether to search on all visible GPUs.
    """

    k: int
    probe: int | None
    sim_func: str
    recompute_dists: bool = False
    gpu: bool = False

    def check(self, datastore: Store) -> None:
        """Raise UserError where one does not fit the store."""
        if not 1 <= self.k <= datastore.kept:
            raise UserError(
                f"k={self.k} does not fit the datastore {datastore.label}, which has {datastore.kept} entries; "
                f"choose 1 <= k <= {datastore.kept}."
            )
        if self.probe is not None and self.probe < 1:
            raise UserError(f"probe={self.probe} must be at least 1.")
        if self.recompute_dists:
            datastore.require_keys("recompute_dists=True")
        if self.sim_func not in ("l2", "dot"):
            raise UserError(f"knn_sim_func={self.sim_func!r} is unknown; use l2 or dot.")


class Retriever(ABC):
    """The neighbours of queries in a datastore, or in several.

    Parameters
    ----------
    datastore : an opened datastore, or several as one.
    name : what is searched: an index's name, or ``exact``.
    settings : how; they must fit.

    Attributes
    ----------
    datastore, name : as above.
    statistics : what this retriever did.
    on_gpus : whether searches run on GPUs.
    searched_on : where, in words for results; with ``knn_gpu=True`` also why there.
    """

    datastore: Store
    on_gpus = False
    searched_on = "cpu"

    def __init__(self, datastore: Store, name: str, settings: SearchSettings) -> None:
        self.datastore, self.name = datastore, name
        self._settings = self._checked(settings)
        self.statistics = RetrievalStatistics()

    def _checked(self, settings: SearchSettings) -> SearchSettings:
        """The settings as they count here; raises UserError where one does not fit."""
        settings.check(self.datastore)
        return settings

    @property
    def settings(self) -> SearchSettings:
        """How this retriever searches, as long as it lives."""
        return self._settings

    @property
    def k(self) -> int:
        """Neighbours per query."""
        return self._settings.k

    @property
    def probe(self) -> int | None:
        """Inverted lists visited per query; None where there are none."""
        return self._settings.probe

    @property
    def sim_func(self) -> str:
        """What the distances are: ``l2`` (squared) or ``dot`` (negated inner products)."""
        return self._settings.sim_func

    @property
    def recompute_dists(self) -> bool:
        """Whether the distances are exact ones, from the keys on disk, and not the index's."""
        return self._settings.recompute_dists

    def with_settings(
        self: AnyRetriever, *, k: int | None = None, probe: int | None = None, recompute_dists: bool | None = None
    ) -> AnyRetriever:
        """Another retriever over what this one has opened, with some settings of its own, and its own statistics.

        Parameters
        ----------
        k, probe, recompute_dists : as for ``SearchSettings``; None takes this retriever's. Where there are no lists
            ``probe`` counts for nothing.

        Raises
        ------
        UserError
            Where one does not fit the store or the index.
        """
        other = copy.copy(self)
        other._settings = self._checked(
            replace(
                self._settings,
                k=self.k if k is None else k,
                probe=self.probe if probe is None else probe,
                recompute_dists=self.recompute_dists if recompute_dists is None else recompute_dists,
            )
        )
        other.statistics = RetrievalStatistics()
        return other

    @property
    def has_lists(self) -> bool:
        """Whether there are inverted lists, of which ``probe`` are visited."""
        return self.probe is not None

    @property
    @abstractmethod
    def of_stores(self) -> tuple[StoreRetriever, ...]:
        """A retriever for each datastore: this one, where there is one."""

    @property
    @abstractmethod
    def factory(self) -> str:
        """What is searched, as faiss calls it (a factory string); ``exact`` for all keys without an index."""

    @property
    @abstractmethod
    def bytes_on_disk(self) -> int:
        """Of the index; 0 without one."""

    @property
    @abstractmethod
    def bytes_held(self) -> int:
        """What searching takes of this process's own memory, beside what is mapped."""

    @property
    @abstractmethod
    def kind_of_distances(self) -> str:
        """``exact``, from the keys or from an index that holds them; otherwise ``approximate``."""

    @property
    @abstractmethod
    def first_of_more_are_fewer(self) -> bool:
        """Whether the first neighbours of a search are those that a search for so many finds."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What searches depend on beside the store's keys and the settings: content, not names."""

    @abstractmethod
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file of the index, by its name; none without an index."""

    @property
    @abstractmethod
    def values(self) -> np.ndarray:
        """int32 ``[count]``: the values, of those entries at least that this retriever has told of."""

    @abstractmethod
    def search(self, queries: Tensor) -> Found:
        """The ``k`` nearest entries of each query, nearest (by what is searched) first.

        Parameters
        ----------
        queries : ``[n, dimension]``, any float dtype and device.

        Returns
        -------
        All on the CPU.
        """

    @abstractmethod
    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``search``, for float32 arrays and without the values: distances and entries."""

    @abstractmethod
    def with_distances(self: AnyRetriever) -> tuple[AnyRetriever, EntryDistances]:
        """What RetoMaton needs: distances to given entries, and a retriever whose distances are of the same kind.

        That is this retriever, or another where this one's index gives none to given entries: both are exact then.

        Raises
        ------
        UserError
            Where exact distances take keys and the store has none.
        """


class StoreRetriever(Retriever):
    """As ``Retriever``, of one datastore."""

    datastore: Datastore

    def __init__(self, datastore: Datastore, name: str, settings: SearchSettings) -> None:
        super().__init__(datastore, name, settings)

    @property
    def of_stores(self) -> tuple[StoreRetriever, ...]:
        """This retriever."""
        return (self,)

    @property
    def values(self) -> np.ndarray:
        """As ``Retriever.values``."""
        return self.datastore.values

    def search(self, queries: Tensor) -> Found:
        """As ``Retriever.search``."""
        distances, entries = self.find(queries.float().cpu().numpy())  # [n, k]
        start = now()
        values = self.datastore.values[np.maximum(entries, 0)]  # [n, k]
        values[entries < 0] = 0
        self.statistics.seconds["values"] += now() - start
        counts = entry_counts(self.datastore.weights, entries)
        return Found(torch.from_numpy(distances), torch.from_numpy(values), torch.from_numpy(entries), counts)

    def _exact_distances(self, reason: str) -> EntryDistances:
        """From the keys, which are needed for ``reason``."""
        keys, sim_func = self.datastore.require_keys(reason), self.sim_func

        def exact(queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
            return exact_distances(keys, queries, filled_slots(entries, counts), sim_func)

        return exact


def entry_counts(weights: np.ndarray | None, entries: np.ndarray) -> Tensor | None:
    """How often each neighbour counts: the store's weights at ``entries`` (1 in empty slots); None without any."""
    if weights is None:
        return None
    counts = weights[np.maximum(entries, 0)]
    counts[entries < 0] = 1
    return torch.from_numpy(counts)
