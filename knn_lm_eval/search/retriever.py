"""From queries to neighbours: search, exact distances on demand, and the neighbours' values."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.faiss_index import (
    DEFAULT_PROBE,
    bytes_held,
    inverted_file,
    open_index,
    search,
    set_probe,
    to_gpus,
    vectors_compared,
)
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX, find_parts

# queries [n, dimension], entries int64 [n, m], counts int64 [n] -> distances float32 [n, m], undefined beyond counts.
EntryDistances = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# Keys gathered at a time for exact distances: bounds the memory that recompute_dists takes.
GATHER_BYTES = 2**26


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


class Retriever:
    """The neighbours of queries in a datastore.

    Parameters
    ----------
    datastore : an opened datastore with an index.
    k : neighbours per query.
    probe : inverted lists visited per query; None takes what the index was found to need.
    sim_func : ``l2`` (squared) or ``dot``; None takes the index's. Another than the index's needs
        ``recompute_dists``.
    recompute_dists : compute the neighbours' distances from the keys on disk, exactly, instead of taking the
        index's approximation.
    gpu : search on all visible GPUs.
    index : the index's name.

    Attributes
    ----------
    on_gpus : whether searches run on GPUs.

    Raises
    ------
    UserError
        Where a setting does not fit the store or the index.
    """

    on_gpus = False
    index: faiss.Index
    cpu_index: faiss.Index

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
        if not 1 <= k <= len(datastore):
            raise UserError(
                f"k={k} does not fit the datastore {datastore.path}, which has {len(datastore)} entries; "
                f"choose 1 <= k <= {len(datastore)}."
            )
        if probe is not None and probe < 1:
            raise UserError(f"probe={probe} must be at least 1.")
        if recompute_dists:
            datastore.require_keys("recompute_dists=True")
        self.metadata, self.parts = find_parts(datastore, index)
        index_sim_func = self.metadata["sim_func"]
        self.sim_func = sim_func or index_sim_func
        if self.sim_func not in ("l2", "dot"):
            raise UserError(f"knn_sim_func={self.sim_func!r} is unknown; use l2 or dot.")
        if self.sim_func != index_sim_func and not recompute_dists:
            raise UserError(
                f"knn_sim_func={self.sim_func} does not fit the index {index!r}, which ranks by {index_sim_func}; "
                f"build one with --sim_func {self.sim_func}, or add recompute_dists=True."
            )
        self.datastore, self.k, self.recompute_dists = datastore, k, recompute_dists
        self.index_name, self.gpu = index, gpu
        self.statistics = RetrievalStatistics()
        self.probe = self._open(probe or self.metadata.get("probe") or DEFAULT_PROBE)

    def _open(self, probe: int) -> int | None:
        """Get ready to search; returns how many lists a search visits, ``probe`` at most, None without lists."""
        self.cpu_index, _ = open_index(self.datastore, self.index_name)
        set_probe(self.cpu_index, probe)
        self.index = to_gpus(self.cpu_index, self.k) if self.gpu else self.cpu_index
        self.on_gpus = self.index is not self.cpu_index
        ivf = inverted_file(self.cpu_index)
        return None if ivf is None else min(probe, ivf.nlist)

    @property
    def values(self) -> np.ndarray:
        """int32 ``[count]``: the values, of those entries at least that this retriever has told of."""
        return self.datastore.values

    @property
    def bytes_held(self) -> int:
        """What the index takes of this process's own memory; see ``index.bytes_held``."""
        return bytes_held(self.cpu_index)

    def with_probe(self, probe: int) -> Retriever:
        """Another over the same index, with statistics of its own, that visits ``probe`` lists."""
        return Retriever(self.datastore, self.k, probe, self.sim_func, self.recompute_dists, self.gpu, self.index_name)

    def search(self, queries: Tensor) -> Found:
        """The ``k`` nearest entries of each query, nearest (by the index) first.

        Parameters
        ----------
        queries : ``[n, dimension]``, any float dtype and device.

        Returns
        -------
        All on the CPU.
        """
        distances, entries = self.find(queries.float().cpu().numpy())
        start = time.perf_counter()
        values = self.datastore.values[np.maximum(entries, 0)]
        values[entries < 0] = 0
        self.statistics.seconds["values"] += time.perf_counter() - start
        counts = entry_counts(self.datastore.weights, entries)
        return Found(torch.from_numpy(distances), torch.from_numpy(values), torch.from_numpy(entries), counts)

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``search``, for float32 arrays and without the values."""
        statistics, start = self.statistics, time.perf_counter()
        distances, entries = search(self.index, queries, self.k)
        statistics.searches += len(queries)
        statistics.entries_compared += vectors_compared(self.index, len(queries))
        statistics.seconds["search"] += time.perf_counter() - start
        if self.recompute_dists:
            start = time.perf_counter()
            distances = exact_distances(
                self.datastore.require_keys("recompute_dists=True"), queries, entries, self.sim_func
            )
            statistics.seconds["distances"] += time.perf_counter() - start
        return distances, entries

    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """Distances to given entries: by the index's codes, or exact ones where ``codes`` is None."""
        if codes is not None:
            return codes
        keys = self.datastore.require_keys(f"RetoMaton with the index {self.metadata['factory']}")

        def exact(queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
            entries = np.where(np.arange(entries.shape[1]) < counts[:, None], entries, -1)
            return exact_distances(keys, queries, entries, self.sim_func)

        return exact


def entry_counts(weights: np.ndarray | None, entries: np.ndarray) -> Tensor | None:
    """How often each neighbour counts: the store's weights at ``entries`` (1 in empty slots); None without any."""
    if weights is None:
        return None
    counts = weights[np.maximum(entries, 0)]
    counts[entries < 0] = 1
    return torch.from_numpy(counts)


def exact_distances(keys: np.ndarray, queries: np.ndarray, entries: np.ndarray, sim_func: str) -> np.ndarray:
    """The distances of queries to given entries, from the keys themselves.

    The entries of all queries are gone through in file order, so that each key is read once and a disk reads
    forwards. Takes 24 bytes of memory per distance, and ``GATHER_BYTES`` three times.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    queries : float32 ``[n, dimension]``.
    entries : int64 ``[n, k]``; -1 in empty slots.

    Returns
    -------
    float32 ``[n, k]``: squared L2 or negated inner products; infinity in empty slots.
    """
    distances = np.full(entries.size, np.inf, dtype=np.float32)
    wanted, of_queries = entries.ravel(), torch.from_numpy(queries)
    order = np.argsort(wanted, kind="stable")
    order = order[np.searchsorted(wanted, 0, sorter=order) :]
    block = max(1, GATHER_BYTES // (keys.shape[1] * 4))
    for start in range(0, len(order), block):
        slots = order[start : start + block]
        unique, inverse = np.unique(wanted[slots], return_inverse=True)
        vectors = torch.from_numpy(keys[unique].astype(np.float32))[torch.from_numpy(inverse)]
        query = of_queries[torch.from_numpy(slots // entries.shape[1])]
        result = -(query * vectors).sum(-1) if sim_func == "dot" else (query - vectors).square_().sum(-1)
        distances[slots] = result.numpy()
    return distances.reshape(entries.shape)
