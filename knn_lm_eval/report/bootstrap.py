"""How much a difference between two methods could be due to the choice of documents: the paired bootstrap.

Every metric here is a function of a ratio of sums over documents, f(sum a / sum b): a mean has b = 1, a perplexity
exp(-sum of log-likelihoods / tokens). Documents are drawn with replacement, for both methods the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DEFAULT_SEED = 0
DEFAULT_RESAMPLES = 10_000
DRAWN_AT_ONCE = 2**21  # documents: 32 bytes each

Transform = Callable[[np.ndarray], np.ndarray]
# By aggregation in lm-eval's task files.
TRANSFORMS: dict[str, Transform] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}


@dataclass(frozen=True)
class Interval:
    """A difference, its confidence interval, and the p-value of its being zero (two-sided)."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    ours: np.ndarray,
    baseline: np.ndarray,
    transform: Transform,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = 0.95,
    seed: int = DEFAULT_SEED,
) -> Interval:
    """The difference ``ours - baseline``, with the percentile interval.

    Parameters
    ----------
    ours, baseline : float64 ``[documents, 2]``, a and b of the same documents in the same order.
    transform : f, of an array of ratios.
    resamples : draws; the p-value cannot be smaller than 2 / (resamples + 1).
    confidence : of the interval.
    seed : of the draws; the same seed and number of documents give the same draws.

    Returns
    -------
    The p-value is below 1 - ``confidence`` where the interval leaves zero out, up to the draws' granularity.
    """
    terms = np.concatenate([ours, baseline], axis=1)  # [documents, 4]

    def difference(sums: np.ndarray) -> np.ndarray:  # [..., 4] -> [...]
        return transform(sums[..., 0] / sums[..., 1]) - transform(sums[..., 2] / sums[..., 3])

    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    count = len(terms)
    step = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, step):
        documents = generator.integers(0, count, (min(step, resamples - start), count))  # [resamples, documents]
        drawn[start : start + step] = difference(terms[documents].sum(axis=1))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    on_the_other_side = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p_value = min(1.0, 2 * (1 + on_the_other_side) / (resamples + 1))
    return Interval(float(difference(terms.sum(axis=0))), float(low), float(high), p_value)
