"""How often intervals hold the truth, and how often p is small where there is nothing to find, on texts made up.

``python tests/helpers/interval_coverage.py documents`` prints the tables that docs/measurements/intervals.md shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from knn_lm_eval.report.intervals import paired_interval

COUNTS = (2, 3, 5, 8, 12, 20, 50, 200)
RESAMPLES = 999
AGGREGATION = "weighted_perplexity"
LOSS, GAIN = 4.0, 0.3  # nats a token: the baseline's, and how much better the other method is

# Deviations of documents, of mean 0.
DEVIATIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, count: generator.normal(0, 1, count),
    "skewed": lambda generator, count: generator.exponential(1, count) - 1,
    "heavy tails": lambda generator, count: generator.standard_t(3, count) / np.sqrt(3),
}
LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "equal": lambda generator, count: np.full(count, 100.0),
    "unequal": lambda generator, count: np.ceil(np.exp(generator.normal(4.5, 1.2, count))),  # the longest has most
}

Pairs = tuple[np.ndarray, np.ndarray]


def documents(generator: np.random.Generator, count: int, kind: str, lengths: str, gain: float = GAIN) -> Pairs:
    """Two methods' log-likelihoods and tokens, ``[documents, 2]`` each; the gain differs between documents."""
    tokens = LENGTHS[lengths](generator, count)
    baseline = LOSS + 0.6 * generator.normal(0, 1, count) + generator.normal(0, 2, count) / np.sqrt(tokens)
    gains = gain + 0.3 * DEVIATIONS[kind](generator, count) + generator.normal(0, 0.5, count) / np.sqrt(tokens)
    return tuple(np.stack([-tokens * loss, tokens], axis=1) for loss in (baseline - gains, baseline))  # type: ignore[return-value]


def exchangeable_documents(generator: np.random.Generator, count: int, kind: str, lengths: str) -> Pairs:
    """As ``documents``, of two methods none of which is better: each has its own deviations of the same kind."""
    tokens = LENGTHS[lengths](generator, count)
    shared = LOSS + 0.6 * generator.normal(0, 1, count)
    losses = [shared + 0.2 * DEVIATIONS[kind](generator, count) for _ in range(2)]
    return tuple(np.stack([-tokens * loss, tokens], axis=1) for loss in losses)  # type: ignore[return-value]


def coverage(count: int, kind: str, lengths: str, runs: int, seed: int) -> float:
    """The share of 95 % intervals that hold the true difference of perplexities."""
    generator = np.random.default_rng([seed, count])
    truth = np.exp(LOSS - GAIN) - np.exp(LOSS)
    held = 0
    for run in range(runs):
        pairs = documents(generator, count, kind, lengths)
        interval = paired_interval(*pairs, AGGREGATION, resamples=RESAMPLES, seed=run)
        held += interval.low <= truth <= interval.high
    return held / runs


def level(count: int, kind: str, lengths: str, runs: int, seed: int) -> float:
    """The share of comparisons of equally good methods that have p < 0.05; those without p have none."""
    generator = np.random.default_rng([seed, count])
    found = 0
    for run in range(runs):
        pairs = exchangeable_documents(generator, count, kind, lengths)
        p_value = paired_interval(*pairs, AGGREGATION, resamples=RESAMPLES, seed=run).p_value
        found += p_value is not None and p_value < 0.05
    return found / runs


def print_documents(runs: int, seed: int) -> None:
    """Both tables: kinds of documents down, their numbers across."""
    for title, share in (("held the truth, %", coverage), ("p < 0.05 without a difference, %", level)):
        print(f"\n| {title} | {' | '.join(map(str, COUNTS))} |\n|---|{'---:|' * len(COUNTS)}")
        for lengths in LENGTHS:
            for kind in DEVIATIONS:
                cells = [f"{100 * share(count, kind, lengths, runs, seed):.1f}" for count in COUNTS]
                print(f"| {lengths} lengths, {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["documents"])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print_documents(given.runs, given.seed)
