"""The compiled step of the choice of the probe: what neighbours say of a token at many temperatures at once."""

from __future__ import annotations

import math

import numpy as np

from knn_lm_eval.compiling import compiled


# Sums may be taken in any order: that is what lets them be taken several numbers at a time.
@compiled(nogil=True, fastmath={"reassoc", "contract"})
def weigh(  # type: ignore[no-untyped-def]
    distances, entries, own, values, counts, targets, k, temperature, totals, of_targets
):
    """Sum the weights exp(-d / T) of each query's neighbours at one temperature, half of it, a quarter, and so on.

    Half the temperature squares a weight, so that one exponential is enough. Weights are relative to the nearest one's.

    Parameters
    ----------
    distances, entries : float32 and int64 ``[n, neighbours]``, the nearest first; -1 in empty slots.
    own : int64 ``[n]``, an entry of each query that is none of its neighbours.
    values : int32, of all entries.
    counts : of all entries, how often each counts; empty where each counts once.
    targets : int32 ``[n]``.
    k : neighbours that count, the nearest first.
    temperature : the highest.
    totals, of_targets : float64 ``[n, temperatures]``, filled here: the sums over all neighbours, and over those whose
        value is the target.
    """
    weights, times, matches = np.empty(k), np.empty(k), np.empty(k)
    for i in range(len(distances)):
        there, nearest = 0, np.inf
        for j in range(distances.shape[1]):
            entry = entries[i, j]
            if there < k and entry >= 0 and entry != own[i]:
                weights[there] = distances[i, j]
                times[there] = counts[entry] if len(counts) else 1
                matches[there] = times[there] if values[entry] == targets[i] else 0
                nearest = min(nearest, weights[there])
                there += 1
        for j in range(there):
            weights[j] = math.exp((nearest - weights[j]) / temperature)
        for step in range(totals.shape[1]):
            total, of_target = 0.0, 0.0
            for j in range(there):
                total += weights[j] * times[j]
                of_target += weights[j] * matches[j]
                weights[j] *= weights[j]
            totals[i, step], of_targets[i, step] = total, of_target
