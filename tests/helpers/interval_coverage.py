"""How often intervals hold the truth, and how often p is small where there is nothing to find, on texts made up.

``python tests/helpers/interval_coverage.py documents`` (or ``windows``) prints the tables that
docs/measurements/intervals.md shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from knn_lm_eval.report.intervals import BLOCKS_AS_UNITS, blocks_of, paired_interval, standard_error

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


# Tokens of a text, those of its windows, and how far its losses hang together (tokens).
TEXTS = [
    (tokens, window, length)
    for tokens, window, lengths in (
        (10_000, 256, (0, 10, 50)),
        (40_000, 1024, (0, 50, 200)),
        (290_000, 1024, (0, 300, 1000, 4000)),
    )
    for length in lengths
]


def text(generator: np.random.Generator, tokens: int, window: int, length: float, gain: float) -> Pairs:
    """Two methods' log-likelihoods and tokens of the windows of one text, ``[windows, 2]`` each.

    Losses, and gains, are those of single tokens, skewed, and a level that goes up and down over ``length`` tokens.
    """

    def levels() -> np.ndarray:
        if length == 0:
            return generator.normal(0, 1, tokens)
        memory = np.exp(-1 / length)
        start = np.array([memory * generator.normal()])
        return lfilter([np.sqrt(1 - memory**2)], [1, -memory], generator.normal(0, 1, tokens), zi=start)[0]

    baseline = LOSS + 0.5 * levels() + 3 * (generator.exponential(1, tokens) - 1)
    gains = gain + 0.3 * levels() + generator.normal(0, 1, tokens)
    starts = np.arange(0, tokens, window)
    counts = np.diff(np.append(starts, tokens)).astype(float)
    return tuple(np.stack([-np.add.reduceat(loss, starts), counts], axis=1) for loss in (baseline - gains, baseline))  # type: ignore[return-value]


def shares_of_a_text(tokens: int, window: int, length: float, runs: int, seed: int) -> tuple[float, float, float]:
    """Of a single text: how often the truth lies within 1.96 standard errors, and in the interval of a difference.

    The third is the share of p < 0.05 where neither method is better.
    """
    generator = np.random.default_rng([seed, tokens, int(length)])
    perplexity, difference = np.exp(LOSS), np.exp(LOSS - GAIN) - np.exp(LOSS)
    within, held, found = 0, 0, 0
    for run in range(runs):
        ours, baseline = text(generator, tokens, window, length, GAIN)
        error = standard_error([baseline], AGGREGATION)
        within += abs(np.exp(-baseline[:, 0].sum() / tokens) - perplexity) <= 1.96 * error
        interval = paired_interval(*_blocks(ours, baseline), AGGREGATION, resamples=RESAMPLES, seed=run)
        held += interval.low <= difference <= interval.high
        nothing = _blocks(*text(generator, tokens, window, length, 0.0))
        found += paired_interval(*nothing, AGGREGATION, resamples=RESAMPLES, seed=run).p_value < 0.05
    return within / runs, held / runs, found / runs


def _blocks(ours: np.ndarray, baseline: np.ndarray) -> list[np.ndarray]:
    """As ``compare`` pairs a single text."""
    (blocks,) = blocks_of([np.concatenate([ours, baseline], axis=1)], BLOCKS_AS_UNITS)
    return np.split(blocks, 2, axis=1)


def print_windows(runs: int, seed: int) -> None:
    """A line for each kind of text."""
    heads = ["tokens", "in windows of", "losses hang together over", "1.96 standard errors, %", "interval, %"]
    print(f"| {' | '.join(heads)} | p < 0.05, % |\n|{'---:|' * 6}")
    for kind in TEXTS:
        shares = " | ".join(f"{100 * share:.1f}" for share in shares_of_a_text(*kind, runs, seed))
        print(f"| {' | '.join(f'{number:,}' for number in kind)} | {shares} |", flush=True)


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
    parser.add_argument("what", choices=["documents", "windows"])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    (print_documents if given.what == "documents" else print_windows)(given.runs, given.seed)
