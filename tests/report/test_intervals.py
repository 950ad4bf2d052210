"""Intervals and p-values: how often they are right on texts made up, and against closed forms and all exchanges."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from helpers.interval_coverage import coverage, level, shares_of_a_text
from helpers.results import documents

from knn_lm_eval.report.intervals import TRANSFORMS, blocks_of, paired_interval, standard_error, student_t


@pytest.mark.parametrize("lengths", ["equal", "unequal"])
@pytest.mark.parametrize("count", [2, 5, 12, 50])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int, lengths: str) -> None:
    runs = 200
    held = round(runs * coverage(count, "normal", lengths, runs, seed=5))
    assert scipy.stats.binom.cdf(held, runs, 0.95) > 0.002


@pytest.mark.parametrize("lengths", ["equal", "unequal"])
@pytest.mark.parametrize("count", [2, 5, 6, 12, 50])
def test_p_is_small_where_nothing_is_to_be_found_as_seldom_as_it_says(count: int, lengths: str) -> None:
    runs = 200
    found = round(runs * level(count, "skewed", lengths, runs, seed=5))
    assert scipy.stats.binom.sf(found - 1, runs, 0.05) > 0.002


def test_no_p_where_it_could_not_be_small() -> None:
    assert [paired_interval(*documents(count, 0.2), "mean").p_value is None for count in (2, 5, 6)] == [
        True,
        True,
        False,
    ]
    assert paired_interval(*documents(5, 0.2), "mean", confidence=0.9).p_value is not None


@pytest.mark.parametrize("resamples", [1024, 100_000])
def test_p_of_few_documents_counts_all_exchanges(resamples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knn_lm_eval.report.intervals.DRAWN_AT_ONCE", 777)
    pairs = documents(10, 0.05, seed=2)

    def difference(exchanged: tuple[bool, ...]) -> float:
        swapped = np.array(exchanged)[:, None]
        (a, b), (c, d) = (np.where(swapped, pairs[1 - m], pairs[m]).sum(axis=0) for m in (0, 1))
        return TRANSFORMS["weighted_perplexity"](a / b) - TRANSFORMS["weighted_perplexity"](c / d)

    differences = np.abs([difference(exchanged) for exchanged in itertools.product((False, True), repeat=10)])
    expected = (differences >= differences[0] * (1 - 1e-9)).mean()
    assert paired_interval(*pairs, "weighted_perplexity", resamples=resamples).p_value == expected
    drawn = paired_interval(*pairs, "weighted_perplexity", resamples=1000).p_value
    assert drawn == pytest.approx(expected, abs=0.05) and drawn != expected


def test_documents_of_no_length_count_for_nothing() -> None:
    ours, baseline = documents(8, 0.2)
    with_empty = [np.insert(pairs, 3, 0.0, axis=0) for pairs in (ours, baseline)]
    assert paired_interval(*with_empty, "weighted_perplexity") == paired_interval(ours, baseline, "weighted_perplexity")
    assert paired_interval(*(pairs[2:4] for pairs in with_empty), "weighted_perplexity") is None


def test_student_t_is_scipys() -> None:
    for degrees in (1.0, 1.3, 2.0, 4.7, 39.0, 2000.0):
        for confidence in (0.5, 0.9, 0.95, 0.99):
            expected = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
            assert student_t(degrees, confidence) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------- one text, and standard errors


@pytest.mark.parametrize("length", [0, 50])
def test_of_one_text_whose_losses_hang_together(length: float) -> None:
    runs = 200
    within, held, found = shares_of_a_text(10_000, 256, length, runs, seed=5)
    for share in (within, held):
        assert scipy.stats.binom.cdf(round(share * runs), runs, 0.94) > 0.002
        assert scipy.stats.binom.sf(round(share * runs) - 1, runs, 0.96) > 0.002
    assert scipy.stats.binom.sf(round(found * runs) - 1, runs, 0.06) > 0.002


def test_blocks_are_consecutive_windows_of_one_document_each() -> None:
    documents_ = [np.arange(count, dtype=float)[:, None] * [1, 0] + [0, 1] for count in (283, 3, 1, 100)]
    blocks = blocks_of(documents_, 40)
    assert 30 <= sum(map(len, blocks)) <= 50
    for windows, of_document in zip(documents_, blocks, strict=True):
        ends = np.cumsum(of_document[:, 1]).astype(int)
        expected = [windows[start:end].sum(axis=0) for start, end in itertools.pairwise([0, *ends])]
        assert np.array_equal(of_document, expected) and ends[-1] == len(windows)
    assert np.array_equal(blocks_of(documents_[1:2], 40)[0], documents_[1])


def test_neighbours_that_hang_together_make_the_error_larger() -> None:
    rises = np.array([[value, 1.0] for value in (-3.0, -3.0, -2.0, -2.0)])
    apart = rises[[0, 2, 1, 3]]
    usual = np.std(rises[:, 0], ddof=1) / 2
    assert standard_error([apart], "mean") == pytest.approx(usual)  # neighbours that differ make it no smaller
    assert standard_error([rises], "mean") == pytest.approx(usual * math.sqrt(1.5))
    assert standard_error([rises[:2], rises[2:]], "mean") == 0.5  # two documents say more than their windows


def test_the_standard_error_of_a_mean_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(3, 1, 25)
    documents_ = [np.array([[value, 1.0]]) for value in values]
    expected = np.std(values, ddof=1) / 5
    assert standard_error(documents_, "mean") == pytest.approx(expected)
    assert standard_error([np.concatenate(documents_)], "mean") == pytest.approx(expected, rel=0.5)
    # Windows say nothing of how many documents differ, and few documents may differ more than their windows show.
    halves = [np.repeat(windows / 2, 2, axis=0) for windows in documents_]
    assert standard_error(halves, "mean") == pytest.approx(expected)
    assert standard_error(halves[:4], "mean") == pytest.approx(np.std(values[:4], ddof=1) / 2)


def test_no_standard_error_where_nothing_can_be_told() -> None:
    window, empty = np.array([[-5.0, 2.0]]), np.array([[0.0, 0.0]])
    assert standard_error([window], "weighted_perplexity") is None
    assert standard_error([window, empty], "weighted_perplexity") is None
    assert standard_error([window, np.array([[-np.inf, 2.0]])], "weighted_perplexity") is None


# ----------------------------------------------------------------------------------------------- closed forms


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    generator = np.random.default_rng(1)
    ours, baseline = generator.normal(0.6, 1, 2000), generator.normal(0.5, 1, 2000)
    ones = np.ones_like(ours)
    interval = paired_interval(
        np.stack([ours, ones], axis=1), np.stack([baseline, ones], axis=1), "mean", resamples=20_000
    )
    difference, error = np.mean(ours - baseline), np.std(ours - baseline) / math.sqrt(2000)
    assert interval.difference == pytest.approx(difference)
    assert interval.low == pytest.approx(difference - 1.96 * error, abs=0.05 * error)
    assert interval.high == pytest.approx(difference + 1.96 * error, abs=0.05 * error)
    assert interval.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(difference) / error), rel=0.2)


@pytest.mark.parametrize("aggregation", ["weighted_perplexity", "bits_per_byte"])
def test_the_interval_of_a_ratio_is_scipys(aggregation: str) -> None:
    ours, baseline = documents(150, 0.1)
    transform = TRANSFORMS[aggregation]
    interval = paired_interval(ours, baseline, aggregation, resamples=20_000, confidence=0.9)

    def statistic(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: int) -> np.ndarray:
        return transform(a.sum(axis) / b.sum(axis)) - transform(c.sum(axis) / b.sum(axis))

    seeded = "rng" if "rng" in inspect.signature(scipy.stats.bootstrap).parameters else "random_state"  # before 1.15
    expected = scipy.stats.bootstrap(
        (ours[:, 0], ours[:, 1], baseline[:, 0]),
        statistic,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        confidence_level=0.9,
        **{seeded: np.random.default_rng(5)},
    ).confidence_interval
    width = expected.high - expected.low
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.04 * width)
    assert interval.low < interval.difference < interval.high


def test_the_p_value_agrees_with_the_interval_and_is_uniform_under_no_difference() -> None:
    for shift in (0.0, 0.02, 0.04, 0.08):
        interval = paired_interval(*documents(80, shift), "weighted_perplexity", resamples=4000)
        assert (interval.p_value < 0.05) == (not interval.low <= 0 <= interval.high)
    p_values = [
        paired_interval(*documents(60, 0.0, seed), "bits_per_byte", resamples=400).p_value for seed in range(1, 301)
    ]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.001
    same = documents(20, 0.1)[0]
    assert paired_interval(same, same, "mean", resamples=100).p_value == 1


def test_the_same_seed_gives_the_same_figures_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = documents(50, 0.1)
    first = paired_interval(*data, "weighted_perplexity", resamples=500, seed=3)
    assert first == paired_interval(*data, "weighted_perplexity", resamples=500, seed=3)
    monkeypatch.setattr("knn_lm_eval.report.intervals.DRAWN_AT_ONCE", 333)
    assert first == paired_interval(*data, "weighted_perplexity", resamples=500, seed=3)
    assert first != paired_interval(*data, "weighted_perplexity", resamples=500, seed=4)
