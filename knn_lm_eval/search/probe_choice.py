"""Which probe an index needs: the smallest whose cost in perplexity is surely small.

What is measured is log p of held-out entries' values under a mixture, which is what perplexity is made of, for each
probe at the temperature that is best for it. There is no LM here: bigrams of the store's text stand in its place. The
weight is that which evaluations have by default, and not the best: a bigram model leaves more to the neighbours than an
LM does, and at its own best weight a probe costs several times as much as under an LM.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.methods.mixture import mix
from knn_lm_eval.store.datastore import Datastore

logger = logging.getLogger(__name__)

ENOUGH = 0.01  # of perplexity: what the recommended probe costs at most, beside the largest
ONE_SIDED_95 = 1.645  # standard errors
SMOOTHING = 0.5  # added to each token's count
PRIOR = 5.0  # how many times a predecessor counts as seen with tokens by their frequency
VALUES_AT_ONCE = 2**22  # counted
# The highest is how much farther neighbours are than the nearest: of it, all weigh nearly the same. Each further one is
# half of the one before.
TEMPERATURES = 10
LMBDA = 0.25  # as in evaluations by default


def bigram_log_probs(datastore: Datastore, entries: np.ndarray) -> Tensor:
    """log p of entries' values by the store's other text: float64 ``[n]``.

    How often the value comes after its predecessor, smoothed by how often it comes at all.

    Parameters
    ----------
    entries : int64 ``[n]``.
    """
    values, size = datastore.values, int(datastore.values.max()) + 1
    pairs = _pairs(values, entries, size)  # [n]
    wanted, contexts = np.unique(pairs), np.unique(pairs // size)
    of_tokens, of_pairs, of_contexts = np.zeros(size), np.zeros(len(wanted)), np.zeros(len(contexts))
    for start in range(0, len(values), VALUES_AT_ONCE):
        run = np.arange(start, min(start + VALUES_AT_ONCE, len(values)))
        weights = None if datastore.weights is None else datastore.weights[run]
        found = _pairs(values, run, size)
        of_tokens += np.bincount(values[run], weights, minlength=size)
        of_pairs += _count(found, wanted, weights)
        of_contexts += _count(found // size, contexts, weights)
    own = np.ones(len(entries)) if datastore.weights is None else datastore.weights[entries]
    frequency = (of_tokens[pairs % size] - own + SMOOTHING) / (of_tokens.sum() - own + SMOOTHING * size)  # [n]
    after = of_pairs[np.searchsorted(wanted, pairs)] - own  # [n]
    contexts_after = of_contexts[np.searchsorted(contexts, pairs // size)] - own  # [n]
    return torch.from_numpy(np.log((after + PRIOR * frequency) / (contexts_after + PRIOR)))


def _pairs(values: np.ndarray, entries: np.ndarray, size: int) -> np.ndarray:
    """Each entry's value and that before it, as one number, int64 ``[n]``."""
    return values[np.maximum(entries - 1, 0)].astype(np.int64) * size + values[entries]


def _count(numbers: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """How often, or with what weight, each of the ``wanted`` (ascending) is among the numbers."""
    place = np.minimum(np.searchsorted(wanted, numbers), len(wanted) - 1)
    there = wanted[place] == numbers
    return np.bincount(place[there], None if weights is None else weights[there], minlength=len(wanted))


def highest_temperature(distances: np.ndarray) -> float:
    """The highest to try, by the distances ``[n, k]`` that a search found; infinity in empty slots."""
    farther = distances - distances.min(1, keepdims=True)  # NaN where nothing was found
    return float(farther[np.isfinite(farther)].mean(dtype=np.float64)) or 1.0


def best_log_probs(log_p_knn: Tensor, base: Tensor) -> Tensor:
    """log p of targets under the mixture, at the temperature with the highest mean: float64 ``[n]``.

    Parameters
    ----------
    log_p_knn : float64 ``[n, temperatures]``; NaN where nothing was found.
    base : float64 ``[n]``, log p of what the neighbours are mixed with.
    """
    mixed = mix(base[:, None], log_p_knn, LMBDA)  # [n, temperatures]
    return mixed[:, mixed.mean(0).argmax()]


def add_costs(rows: list[dict[str, Any]], log_probs: list[Tensor]) -> None:
    """Note in each probe's row what it costs beside the last.

    ``perplexity_cost`` is the relative increase of perplexity that is expected, and with 95 % confidence it is at most
    ``perplexity_cost_bound``. Queries are entries drawn at random, so that they count as independent.

    Parameters
    ----------
    rows : by ascending probe.
    log_probs : float64 ``[n]`` of each.
    """
    for row, log_p in zip(rows, log_probs, strict=True):
        row["perplexity_cost"], row["perplexity_cost_bound"] = perplexity_cost(log_probs[-1] - log_p)


def perplexity_cost(lost: Tensor) -> tuple[float, float]:
    """The relative increase of perplexity that is expected, and at most with 95 % confidence, by log p lost ``[n]``."""
    error = float(lost.std(correction=0)) / math.sqrt(max(len(lost) - 1, 1))
    return round(math.expm1(float(lost.mean())), 5), round(math.expm1(float(lost.mean()) + ONE_SIDED_95 * error), 5)


def good_enough(rows: list[dict[str, Any]]) -> int | None:
    """The smallest probe that surely costs little, or the one that surely costs least; None without lists."""
    if rows[0]["probe"] is None:
        return None
    enough = [row for row in rows if row["perplexity_cost_bound"] <= ENOUGH]
    return (enough[0] if enough else min(rows, key=lambda row: row["perplexity_cost_bound"]))["probe"]


def fastest_enough(rows: list[dict[str, Any]], microseconds: float) -> int | None:
    """The good enough probe among those whose search takes at most so long; the fastest where none does."""
    allowed = [row for row in rows if row["microseconds"] <= microseconds]
    if allowed:
        return good_enough(allowed)
    fastest = min(rows, key=lambda row: row["microseconds"])
    logger.warning(
        "No probe keeps to the budget of %.0f us a query; probe=%s takes %.0f us. A smaller k, fewer bytes per entry "
        "or RetoMaton take less.",
        microseconds,
        fastest["probe"],
        fastest["microseconds"],
    )
    return fastest["probe"]
