# mypy: disable-error-code="no-untyped-def"
"""The nearest of what several searches found: runs, each nearest first, become one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from knn_lm_eval.compiling import compiled


def nearest_of_runs(runs: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Which ``k`` of several searches' neighbours are nearest, nearest first; of equally near ones those of the earlier
    search come first, then those that it has first.

    Parameters
    ----------
    runs : float32 ``[n, k of that search]`` each, distances; infinity in empty slots. Together at least ``k`` slots.

    Returns
    -------
    int64 ``[n, k]``: slots of the runs side by side.
    """
    distances = np.concatenate(runs, axis=1)  # [n, slots]
    ends = np.cumsum([0, *(run.shape[1] for run in runs)], dtype=np.int64)
    slots = np.broadcast_to(np.arange(distances.shape[1]), distances.shape)
    if not all((run[:, 1:] >= run[:, :-1]).all() for run in runs):  # as with recompute_dists
        orders = [np.argsort(run, axis=1, kind="stable") + start for run, start in zip(runs, ends[:-1], strict=True)]
        slots = np.concatenate(orders, axis=1)
        distances = np.take_along_axis(distances, slots, 1)
    nearest = np.empty((len(distances), k), dtype=np.int64)
    _merge(distances, ends, nearest)
    return np.take_along_axis(slots, nearest, 1)


@compiled
def _merge(distances, ends, nearest):
    """Write the places of the first ``nearest.shape[1]`` of ascending runs that lie between ``ends``."""
    runs = len(ends) - 1
    heads = np.empty(runs, dtype=np.int64)
    for i in range(len(distances)):
        heads[:] = ends[:-1]
        for j in range(nearest.shape[1]):
            best = -1
            for r in range(runs):
                ahead = heads[r] < ends[r + 1]
                if ahead and (best < 0 or distances[i, heads[r]] < distances[i, heads[best]]):
                    best = r
            nearest[i, j] = heads[best]
            heads[best] += 1
