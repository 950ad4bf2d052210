"""How much a figure, or the difference between two methods, could be due to the choice of texts.

Every metric here is a function of a ratio of sums over units (documents, or blocks of a long text), f(sum a / sum b):
a mean has b = 1, a perplexity exp(-sum of log-likelihoods / tokens). Few units, or units of very different lengths,
are what makes intervals hard: docs/measurements/intervals.md shows how often those here hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT_SEED = 0
DEFAULT_RESAMPLES = 10_000
DRAWN_AT_ONCE = 2**20  # units: about 100 bytes each
MANY_DOCUMENTS = 20  # so many say by themselves how much they differ
# Blocks of the windows of few documents, about: fewer say less of how they differ, shorter ones hang together.
BLOCKS = 40  # where it is seen how neighbours hang together
BLOCKS_AS_UNITS = 20  # where they are taken for as many documents
# Below, draws of so few units say nothing of how their differences are distributed; above, they say what is known.
BOOTSTRAPPED = range(5, 501)

Transform = Callable[[np.ndarray], np.ndarray]
# By aggregation in lm-eval's task files.
TRANSFORMS: dict[str, Transform] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}
SLOPES: dict[str, Transform] = {
    "mean": np.ones_like,
    "perplexity": lambda ratio: -np.exp(-ratio),
    "weighted_perplexity": lambda ratio: -np.exp(-ratio),
    "bits_per_byte": lambda ratio: np.full_like(ratio, -1 / math.log(2)),
}


@dataclass(frozen=True)
class Interval:
    """A difference, its confidence interval, and the p-value of its being zero (two-sided).

    Attributes
    ----------
    p_value : None where there are so few units that none of its possible values would be below 1 - confidence.
    """

    difference: float
    low: float
    high: float
    p_value: float | None


def paired_interval(
    ours: np.ndarray,
    baseline: np.ndarray,
    aggregation: str,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = 0.95,
    seed: int = DEFAULT_SEED,
) -> Interval | None:
    """The difference ``ours - baseline``, and how sure it is.

    Each limit is the outer one of two: the jackknife's, with Student's t at as many degrees of freedom as units of
    such lengths are worth, and (with 5 to 500 units) the bootstrap-t's, which knows of skewed differences. The p-value
    is that of exchanging the two methods in some units: exact where all ways of doing so are few enough to be tried.

    Parameters
    ----------
    ours, baseline : float64 ``[units, 2]``, a and b of the same units in the same order.
    aggregation : one of ``TRANSFORMS``.
    resamples : draws of the bootstrap, and of exchanges where there are more ways than that.
    confidence : of the interval.
    seed : of the draws; the same seed and number of units give the same draws.

    Returns
    -------
    None where fewer than two units have a length.
    """
    terms = np.concatenate([ours, baseline], axis=1)  # [units, 4]
    terms = terms[(terms[:, 1] > 0) & (terms[:, 3] > 0)]
    if len(terms) < 2:
        return None
    generator = np.random.default_rng(seed)
    difference, low, high = _limits(terms, aggregation, resamples, confidence, generator)
    p_value = None
    if 2.0 ** (1 - len(terms)) <= 1 - confidence:
        p_value = _exchange_p(terms, aggregation, resamples, generator)
    return Interval(difference, low, high, p_value)


def mean_interval(
    units: np.ndarray, resamples: int = DEFAULT_RESAMPLES, confidence: float = 0.95, seed: int = DEFAULT_SEED
) -> tuple[float, float, float] | None:
    """The mean sum a / sum b and its limits, which are those of ``paired_interval`` for a baseline of 0.

    Parameters
    ----------
    units : float64 ``[units, 2]``, a and b.
    resamples, confidence, seed : as for ``paired_interval``.

    Returns
    -------
    None where fewer than two units have a length.
    """
    units = units[units[:, 1] > 0]
    if len(units) < 2:
        return None
    terms = np.column_stack([units, np.zeros(len(units)), units[:, 1]])
    return _limits(terms, "mean", resamples, confidence, np.random.default_rng(seed))


def standard_error(documents: Sequence[np.ndarray], aggregation: str) -> float | None:
    """Of a metric, by the jackknife: over documents where there are many.

    Of few documents it is the larger one of two: over documents, and over blocks of consecutive windows, of which
    neighbours may hang together.

    Parameters
    ----------
    documents : float64 ``[windows, 2]`` each, a and b of consecutive parts.
    aggregation : one of ``TRANSFORMS``.

    Returns
    -------
    None where nothing can be told: of a single document in a single window, and where a log-likelihood is infinite.
    """
    errors = [_error([windows.sum(axis=0, keepdims=True) for windows in documents], aggregation)]
    if len(documents) < MANY_DOCUMENTS:
        errors.append(_error(blocks_of(documents, BLOCKS), aggregation))
    return max((error for error in errors if error is not None), default=None)


def blocks_of(documents: Sequence[np.ndarray], blocks: int) -> list[np.ndarray]:
    """Sums over about so many ``blocks`` of consecutive windows, ``[blocks, columns]`` for each document.

    Parameters
    ----------
    documents : ``[windows, columns]`` each.
    """
    size = max(1, round(sum(map(len, documents)) / blocks))
    return [
        np.array([block.sum(axis=0) for block in np.array_split(windows, max(1, round(len(windows) / size)))])
        for windows in documents
    ]


def _error(documents: Sequence[np.ndarray], aggregation: str) -> float | None:
    """The standard error over units, ``[units, 2]`` for each document, that are as like their neighbours as they look.

    None where fewer than two have a length, or one is infinite.
    """
    lengths = [int((units[:, 1] > 0).sum()) for units in documents]
    terms = np.concatenate([units[units[:, 1] > 0] for units in documents])
    if len(terms) < 2 or not np.isfinite(terms).all():
        return None
    left = terms.sum(axis=0) - terms
    without_one = TRANSFORMS[aggregation](left[:, 0] / left[:, 1])
    away = np.split(without_one - without_one.mean(), np.cumsum(lengths)[:-1])
    alike = sum(float(of_document[1:] @ of_document[:-1]) for of_document in away)
    return math.hypot(_jackknife(without_one), math.sqrt(2 * max(0.0, alike) * (len(terms) - 1) / len(terms)))


def _limits(
    terms: np.ndarray, aggregation: str, resamples: int, confidence: float, generator: np.random.Generator
) -> tuple[float, float, float]:
    """The difference of two methods, and its limits, from ``[units, 4]``."""
    sums = terms.sum(axis=0)
    difference = float(_difference(sums, aggregation))
    error = _jackknife(_difference(sums - terms, aggregation))
    bound = student_t(_degrees_of_freedom(terms), confidence) * error
    low, high = difference - bound, difference + bound
    if len(terms) in BOOTSTRAPPED and error > 0:
        lower, upper = _bootstrap_t(terms, aggregation, resamples, confidence, generator)
        # Where too many draws have no spread at all, there is no such limit.
        low, high = (min(low, lower) if math.isfinite(lower) else low), (max(high, upper) if upper < math.inf else high)
    return difference, low, high


def _difference(sums: np.ndarray, aggregation: str) -> np.ndarray:  # [..., 4] -> [...]
    transform = TRANSFORMS[aggregation]
    return transform(sums[..., 0] / sums[..., 1]) - transform(sums[..., 2] / sums[..., 3])


def _jackknife(without_one: np.ndarray) -> float:
    """The standard error, from the figure without each unit."""
    count = len(without_one)
    return math.sqrt((count - 1) / count * float(np.square(without_one - without_one.mean()).sum()))


def _degrees_of_freedom(terms: np.ndarray) -> float:
    """One less than the units of equal length that would weigh as these do, and at least one."""
    lengths = terms[:, 1] / terms[:, 1].mean()
    return max(1.0, float(lengths.sum() ** 2 / np.square(lengths).sum()) - 1)


def student_t(degrees: float, confidence: float) -> float:
    """Student's t that so much of the distribution lies within, at ``degrees`` of freedom (at least one).

    To 1e-4 of its value. scipy has it too, which takes longer to import than a comparison takes.
    """
    # The angle whose tangent is t / sqrt(degrees) has a bounded density.
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles).clip(0) ** (degrees - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence, below / below[-1], angles)))


def _bootstrap_t(
    terms: np.ndarray, aggregation: str, resamples: int, confidence: float, generator: np.random.Generator
) -> tuple[float, float]:
    """Both limits; infinite where draws without spread lie there."""
    count = len(terms)
    difference, variance = (float(value[0]) for value in _with_variance(terms[None], aggregation))
    statistics = np.empty(resamples)
    step = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, step):
        drawn = terms[generator.integers(0, count, (min(step, resamples - start), count))]  # [resamples, units, 4]
        differences, variances = _with_variance(drawn, aggregation)
        away = differences - difference
        without_spread = variances <= 1e-20 * variance
        errors = np.sqrt(np.where(without_spread, 1.0, variances))
        statistics[start : start + step] = np.where(without_spread, np.copysign(np.inf, away), away / errors)
    below, above = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
    error = math.sqrt(variance)
    return difference - error * float(above), difference - error * float(below)


def _with_variance(terms: np.ndarray, aggregation: str) -> tuple[np.ndarray, np.ndarray]:
    """The difference and its linearised variance, each ``[draws]``, from ``[draws, units, 4]``."""
    count = terms.shape[1]
    sums = terms.sum(axis=1)  # [draws, 4]
    influence = np.zeros(terms.shape[:2])
    for a, sign in ((0, 1), (2, -1)):
        ratio = sums[:, a] / sums[:, a + 1]
        residual = terms[..., a] - ratio[:, None] * terms[..., a + 1]
        influence += (sign * SLOPES[aggregation](ratio) * count / sums[:, a + 1])[:, None] * residual
    return _difference(sums, aggregation), np.square(influence).sum(axis=1) / (count * (count - 1))


def _exchange_p(terms: np.ndarray, aggregation: str, resamples: int, generator: np.random.Generator) -> float:
    """How often the methods' difference is as large when units exchange them: the sign-flip test."""
    count = len(terms)
    swapped = terms[:, [2, 3, 0, 1]] - terms  # what exchanging a unit adds to the sums
    sums = terms.sum(axis=0)
    reached = abs(float(_difference(sums, aggregation))) * (1 - 1e-9)
    is_exact = 2**count <= resamples
    tried = 2**count if is_exact else resamples
    step = max(1, DRAWN_AT_ONCE // count)
    as_large = 0
    for start in range(0, tried, step):
        rows = min(step, tried - start)
        if is_exact:  # all of them, by the bits of their numbers
            exchanges = np.arange(start, start + rows)[:, None] >> np.arange(count) & 1
        else:
            exchanges = generator.integers(0, 2, (rows, count))
        differences = _difference(sums + exchanges.astype(float) @ swapped, aggregation)
        as_large += int((np.abs(differences) >= reached).sum())
    return as_large / tried if is_exact else (1 + as_large) / (1 + tried)
