"""Greedy merging (He et al. 2021): which entries take in which of their near neighbours that have the same value.

Both a clustering and a pruned store come of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from knn_lm_eval.compiling import compiled
from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import DEFAULT_PROBE, bytes_held, inverted_file, open_index, search, set_probe
from knn_lm_eval.store.clusters import entry_dtype
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import SEARCH_CHUNK, KeyRows, number_entries
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.memory import size_text


@dataclass(frozen=True)
class NeighbourSearch:
    """The search for the ``k`` nearest other entries of each entry, checked and opened."""

    datastore: Datastore
    k: int
    index: faiss.Index
    settings: dict[str, Any]

    @classmethod
    def open(
        cls, datastore: Datastore, k: int, index: str, probe: int | None, memory: int | None = None
    ) -> NeighbourSearch:
        """See ``cluster_greedy_merge`` for the arguments; raises UserError where they do not fit the store."""
        if not 1 <= k < len(datastore):
            raise UserError(f"k={k} must be at least 1 and less than the store's {len(datastore):,} entries.")
        if probe is not None and probe < 1:
            raise UserError(f"probe={probe} must be at least 1.")
        faiss_index, metadata = open_index(datastore, index)
        needed = bytes_held(faiss_index) + SEARCH_CHUNK * (8 * datastore.dimension + 12 * (k + 1))
        if memory is not None and needed > memory:
            raise UserError(
                f"To search the index {index} takes about {size_text(needed)} of memory, and {size_text(memory)} may "
                f"be taken: give --memory {size_text(needed)} or more, or an index that is mapped (IVF)."
            )
        probe = None if inverted_file(faiss_index) is None else probe or metadata.get("probe") or DEFAULT_PROBE
        if probe is not None:
            set_probe(faiss_index, probe)
        settings = {"k": k, "index": index, "factory": metadata["factory"], "probe": probe}
        return cls(datastore, k, faiss_index, settings)


def find_absorbers(searched: NeighbourSearch, keys: KeyRows, states: SavedStates) -> np.ndarray:
    """Greedy merging, as ``cluster_greedy_merge`` says.

    Parameters
    ----------
    keys : those of all entries, which are searched for.

    Returns
    -------
    int32 or int64 (see ``entry_dtype``) ``[count]``, memory-mapped (see ``number_entries``): the entry that absorbed
    each; itself where it absorbed others; -1 where neither.
    """
    datastore = searched.datastore
    values = np.asarray(datastore.values)

    def merge(absorber: np.ndarray, begin: int, chunk: np.ndarray) -> None:
        merge_neighbours(absorber, values, search(searched.index, chunk, searched.k + 1)[1], begin)

    dtype = entry_dtype(len(datastore))
    return number_entries(keys, states, dtype, merge, "Merging near neighbours", undo=free_those_absorbed_from)


@compiled
def free_those_absorbed_from(absorber: np.ndarray, entry: int) -> None:
    """Take back what the entries from ``entry`` on have absorbed."""
    for other in range(len(absorber)):
        if absorber[other] >= entry:
            absorber[other] = -1


@compiled
def number_clusters(absorber: np.ndarray, cluster_of_entry: np.ndarray) -> int:
    """Number the entries that were not absorbed, in order; the others take their absorber's number."""
    clusters = 0
    for entry in range(len(absorber)):
        if absorber[entry] < 0 or absorber[entry] == entry:
            cluster_of_entry[entry] = clusters
            clusters += 1
    for entry in range(len(absorber)):
        if absorber[entry] >= 0:
            cluster_of_entry[entry] = cluster_of_entry[absorber[entry]]
    return clusters


@compiled
def merge_neighbours(absorber: np.ndarray, values: np.ndarray, neighbours: np.ndarray, begin: int) -> None:
    """Let the entries from ``begin`` on, whose neighbours are given, absorb them where they may.

    ``absorber`` has, for each entry, the one that absorbed it; itself where it absorbed others; else -1.
    """
    for row in range(len(neighbours)):
        entry = begin + row
        if absorber[entry] >= 0:
            continue
        for other in neighbours[row]:
            if other >= 0 and other != entry and absorber[other] < 0 and values[other] == values[entry]:
                absorber[other] = entry
                absorber[entry] = entry
