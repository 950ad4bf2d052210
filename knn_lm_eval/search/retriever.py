"""From queries to neighbours: search, exact distances on demand, and the neighbours' values.

A retriever's settings stay as they are for its life, so who shares one can rely on them. Who needs others asks it for
another retriever with ``with_settings``, which searches the same opened index.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import faiss
import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.factory_strings import has_exact_distances
from knn_lm_eval.search.faiss_index import (
    DEFAULT_PROBE,
    bytes_held,
    check_gpu_k,
    find_readable_parts,
    inverted_file,
    open_index,
    search,
    set_probe,
    to_gpus,
    vectors_compared,
)
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX
from knn_lm_eval.system.timing import now

AnyRetriever = TypeVar("AnyRetriever", bound="Retriever")

# queries [n, dimension], entries int64 [n, m], counts int64 [n] -> distances float32 [n, m], undefined beyond counts.
EntryDistances = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass
class RetrievalStatistics:
    """What a retriever did: queries searched, vectors compared with them, shards that were started again, seconds."""

    searches: int = 0
    entries_compared: int = 0
    restarts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"search": 0.0, "distances": 0.0, "values": 0.0})


class Found(NamedTuple):
    """The neighbours of ``n`` queries.

    Attributes
    ----------
    distances : float32 ``[n, k]`` (squared L2 or negated inner product); infinity in empty slots.
    values : int32 ``[n, k]``; 0 in empty slots.
    entries : int64 ``[n, k]``; -1 in empty slots.
    counts : int32 ``[n, k]``, how many merged entries each stands for; None in a store without weights.
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

    def check(self, datastore: Datastore, index_name: str, index_sim_func: str) -> None:
        """Raise UserError where one does not fit the store, or its index ``index_name``, which ranks by
        ``index_sim_func``."""
        if not 1 <= self.k <= len(datastore):
            raise UserError(
                f"k={self.k} does not fit the datastore {datastore.path}, which has {len(datastore)} entries; "
                f"choose 1 <= k <= {len(datastore)}."
            )
        if self.probe is not None and self.probe < 1:
            raise UserError(f"probe={self.probe} must be at least 1.")
        if self.recompute_dists:
            datastore.require_keys("recompute_dists=True")
        if self.sim_func not in ("l2", "dot"):
            raise UserError(f"knn_sim_func={self.sim_func!r} is unknown; use l2 or dot.")
        if self.sim_func != index_sim_func and not self.recompute_dists:
            raise UserError(
                f"knn_sim_func={self.sim_func} does not fit the index {index_name!r}, which ranks by "
                f"{index_sim_func}; build one with --sim_func {self.sim_func}, or add recompute_dists=True."
            )


class Retriever(ABC):
    """The neighbours of queries in a datastore.

    Parameters
    ----------
    datastore : an opened datastore with an index.
    index_name : the index's name.
    k : neighbours per query.
    probe : inverted lists visited per query; None takes what the index was found to need.
    sim_func : ``l2`` (squared) or ``dot``; None takes the index's. Another than the index's needs
        ``recompute_dists``.
    recompute_dists : compute the neighbours' distances from the keys on disk, exactly, instead of taking the
        index's approximation.
    gpu : search on all visible GPUs.

    Attributes
    ----------
    datastore, index_name : as above.
    metadata : the content of the index's JSON.
    parts : the files of the index.
    statistics : what this retriever did.
    on_gpus : whether searches run on GPUs.

    Raises
    ------
    UserError
        Where there is no such index, or a setting does not fit it or the store.
    """

    on_gpus = False

    def __init__(
        self,
        datastore: Datastore,
        index_name: str,
        k: int,
        probe: int | None,
        sim_func: str | None,
        recompute_dists: bool,
        gpu: bool = False,
    ) -> None:
        self.datastore, self.index_name = datastore, index_name
        self.metadata, self.parts = find_readable_parts(datastore, index_name)
        index_sim_func = self.metadata["sim_func"]
        wanted = self.metadata.get("probe") or DEFAULT_PROBE if probe is None else probe
        settings = SearchSettings(k, wanted, sim_func or index_sim_func, recompute_dists, gpu)
        settings.check(datastore, index_name, index_sim_func)
        self.statistics = RetrievalStatistics()
        self._lists = self._open(settings)
        self._settings = self._within_lists(settings)

    @abstractmethod
    def _open(self, settings: SearchSettings) -> int | None:
        """Get ready to search; returns how many inverted lists the index has, None for one without."""

    def _within_lists(self, settings: SearchSettings) -> SearchSettings:
        if self._lists is None or settings.probe is None:
            return replace(settings, probe=None)
        return replace(settings, probe=min(settings.probe, self._lists))

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
        """Inverted lists visited per query; None for an index without lists."""
        return self._settings.probe

    @property
    def sim_func(self) -> str:
        """What the distances are: ``l2`` (squared) or ``dot`` (negated inner products)."""
        return self._settings.sim_func

    @property
    def recompute_dists(self) -> bool:
        """Whether the distances are exact ones, from the keys on disk, and not the index's."""
        return self._settings.recompute_dists

    @property
    def kind_of_distances(self) -> str:
        """``exact``, from the keys or from an index that holds them; otherwise ``approximate``."""
        exact = self.recompute_dists or has_exact_distances(self.metadata["factory"])
        return "exact" if exact else "approximate"

    def with_settings(
        self: AnyRetriever, *, k: int | None = None, probe: int | None = None, recompute_dists: bool | None = None
    ) -> AnyRetriever:
        """Another retriever over the same opened index, with some settings of its own, and its own statistics.

        Parameters
        ----------
        k, probe, recompute_dists : as for the class; None takes this retriever's. An index without lists goes
            without ``probe``.

        Raises
        ------
        UserError
            Where one does not fit the store or the index.
        """
        settings = replace(
            self._settings,
            k=self.k if k is None else k,
            probe=self.probe if probe is None else probe,
            recompute_dists=self.recompute_dists if recompute_dists is None else recompute_dists,
        )
        settings.check(self.datastore, self.index_name, self.metadata["sim_func"])
        other = copy.copy(self)
        other._settings, other.statistics = self._within_lists(settings), RetrievalStatistics()
        return other

    @property
    @abstractmethod
    def cpu_index(self) -> faiss.Index:
        """The whole index, in this process: what codes are laid out from. Set to visit the lists that the retriever
        visits that was opened first."""

    @property
    @abstractmethod
    def index(self) -> faiss.Index:
        """The index that a benchmark compares with: the one that is searched, if that is in this process."""

    @property
    @abstractmethod
    def values(self) -> np.ndarray:
        """int32 ``[count]``: the values, of those entries at least that this retriever has told of."""

    @property
    @abstractmethod
    def bytes_held(self) -> int:
        """What the index takes of this process's own memory; see ``faiss_index.bytes_held``."""

    @abstractmethod
    def search(self, queries: Tensor) -> Found:
        """The ``k`` nearest entries of each query, nearest (by the index) first.

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
    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """Distances to given entries: by the index's codes, or exact ones where ``codes`` is None."""


class LocalRetriever(Retriever):
    """As ``Retriever``, with the index in this process, mapped from disk where that can be done."""

    def __init__(
        self,
        datastore: Datastore,
        k: int = 1024,
        probe: int | None = None,
        sim_func: str | None = None,
        recompute_dists: bool = False,
        gpu: bool = False,
        index: str = DEFAULT_INDEX,
    ) -> None:
        super().__init__(datastore, index, k, probe, sim_func, recompute_dists, gpu)

    def _open(self, settings: SearchSettings) -> int | None:
        self._cpu_index, _ = open_index(self.datastore, self.index_name)
        assert settings.probe is not None
        set_probe(self._cpu_index, settings.probe)
        self._index = to_gpus(self._cpu_index, settings.k) if settings.gpu else self._cpu_index
        self.on_gpus = self._index is not self._cpu_index
        ivf = inverted_file(self._cpu_index)
        return None if ivf is None else ivf.nlist

    def with_settings(
        self, *, k: int | None = None, probe: int | None = None, recompute_dists: bool | None = None
    ) -> LocalRetriever:
        """As ``Retriever.with_settings``; an index on GPUs, which has its probe set, is opened again for another."""
        other = super().with_settings(k=k, probe=probe, recompute_dists=recompute_dists)
        if self.on_gpus:
            check_gpu_k(other.k)
            if other.probe != self.probe:
                other._open(other.settings)
        return other

    @property
    def cpu_index(self) -> faiss.Index:
        """The index as it was opened, with the probe of the retriever that opened it."""
        return self._cpu_index

    @property
    def index(self) -> faiss.Index:
        """The same, or its copy on GPUs."""
        return self._index

    @property
    def values(self) -> np.ndarray:
        """int32 ``[count]``: the store's."""
        return self.datastore.values

    @property
    def bytes_held(self) -> int:
        """What the index takes of this process's own memory; see ``faiss_index.bytes_held``."""
        return bytes_held(self._cpu_index)

    def search(self, queries: Tensor) -> Found:
        """As ``Retriever.search``."""
        distances, entries = self.find(queries.float().cpu().numpy())  # [n, k]
        start = now()
        values = self.datastore.values[np.maximum(entries, 0)]  # [n, k]
        values[entries < 0] = 0
        self.statistics.seconds["values"] += now() - start
        counts = entry_counts(self.datastore.weights, entries)
        return Found(torch.from_numpy(distances), torch.from_numpy(values), torch.from_numpy(entries), counts)

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Retriever.find``."""
        statistics, start = self.statistics, now()
        distances, entries = search(self._index, queries, self.k, None if self.on_gpus else self.probe)
        statistics.searches += len(queries)
        statistics.entries_compared += vectors_compared(self._index, len(queries))
        statistics.seconds["search"] += now() - start
        if self.recompute_dists:
            start = now()
            keys = self.datastore.require_keys("recompute_dists=True")
            distances = exact_distances(keys, queries, entries, self.sim_func)
            statistics.seconds["distances"] += now() - start
        return distances, entries

    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """As ``Retriever.distances_to``."""
        if codes is not None:
            return codes
        keys = self.datastore.require_keys(f"RetoMaton with the index {self.metadata['factory']}")
        sim_func = self.sim_func

        def exact(queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
            entries = np.where(np.arange(entries.shape[1]) < counts[:, None], entries, -1)
            return exact_distances(keys, queries, entries, sim_func)

        return exact


def entry_counts(weights: np.ndarray | None, entries: np.ndarray) -> Tensor | None:
    """How often each neighbour counts: the store's weights at ``entries`` (1 in empty slots); None without any."""
    if weights is None:
        return None
    counts = weights[np.maximum(entries, 0)]
    counts[entries < 0] = 1
    return torch.from_numpy(counts)
