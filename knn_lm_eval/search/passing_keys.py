"""Exact nearest neighbours among keys that pass run by run and are not kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.system.checkpoints import SavedStates


class NearestOfRuns:
    """The nearest keys of some queries, kept for each run of entries until all runs have passed.

    Runs may pass in any order and in several processes. 8 bytes a run, query and neighbour are on the disk.

    Parameters
    ----------
    states : where what a run has is saved, as the state ``nearest`` with the run's number.
    queries : float32 ``[n, dimension]``.
    k : neighbours of each.
    sim_func : as for ``ExactSearch``.
    """

    def __init__(self, states: SavedStates, queries: np.ndarray, k: int, sim_func: str) -> None:
        self._states, self._queries, self._k, self._sim_func = states, queries, k, sim_func

    def take(self, number: int, keys: np.ndarray) -> None:
        """Keep what is near of a run's keys, float16 ``[entries, dimension]``."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        distances, entries = ExactSearch(keys, self._sim_func, device).search(self._queries, min(self._k, len(keys)))
        self._states.save(_state(number), distances=distances, entries=entries.astype(np.int32))

    def found(self, starts: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of all runs, which have these first entries, in order.

        Returns
        -------
        distances : float32 ``[n, k]``, as ``ExactSearch.search`` would give them of all keys at once.
        entries : int64 ``[n, k]``, of equally near ones the smaller first.
        """
        distances = np.empty((len(self._queries), 0), dtype=np.float32)
        entries = np.empty((len(self._queries), 0), dtype=np.int64)
        for number, start in enumerate(starts):
            of_run = self._states.load(_state(number))
            there = of_run["entries"].astype(np.int64)
            distances = np.concatenate([distances, of_run["distances"]], axis=1)
            entries = np.concatenate([entries, np.where(there < 0, -1, there + start)], axis=1)
            order = np.argsort(distances, axis=1, kind="stable")[:, : self._k]
            distances, entries = np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)
        return distances, entries


def _state(number: int) -> str:
    return f"nearest.{number:06d}"
