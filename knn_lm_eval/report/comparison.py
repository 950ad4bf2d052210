"""Methods side by side: the difference to a baseline, how sure it is, and whether the two can be compared at all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.bootstrap import (
    DEFAULT_RESAMPLES,
    DEFAULT_SEED,
    TRANSFORMS,
    Interval,
    Transform,
    paired_bootstrap,
)
from knn_lm_eval.report.published_figures import PUBLISHED, Published
from knn_lm_eval.report.results import Result

# The metric that stands for a task where nobody chose one: the first of these that it has.
PREFERRED = ("token_perplexity", "word_perplexity", "perplexity", "acc_norm", "acc", "exact_match", "f1")


@dataclass
class Row:
    """One result beside the baseline's.

    Attributes
    ----------
    label : the method, with as much of model and datastore as tells it from the others.
    difference : to the baseline; None for the baseline itself, or without one.
    interval : of the difference; None where there are no samples of the same documents.
    """

    label: str
    result: Result
    value: float
    is_baseline: bool = False
    difference: float | None = None
    interval: Interval | None = None


@dataclass
class TaskComparison:
    """All methods on one task by one metric.

    Attributes
    ----------
    published : reference rows.
    warnings : why rows cannot be compared.
    notes : what else to know, such as why there are no intervals.
    """

    task: str
    metric: str
    higher_is_better: bool
    rows: list[Row]
    published: list[Published]
    warnings: list[str]
    notes: list[str]


@dataclass
class Comparison:
    """The tasks, and how intervals were computed."""

    tasks: list[TaskComparison]
    baseline: str | None
    seed: int
    resamples: int
    confidence: float


def compare(
    results: Sequence[Result],
    baseline: str | None = None,
    metric: str | None = None,
    *,
    published: bool = True,
    seed: int = DEFAULT_SEED,
    resamples: int = DEFAULT_RESAMPLES,
    confidence: float = 0.95,
) -> Comparison:
    """Compare results with a baseline, task by task.

    Parameters
    ----------
    baseline : a method's name or lm-eval's model (``hf``); None for no differences. Each LM has its own
        baseline; an LM without one takes the only one that there is.
    metric : for all tasks that have it; None chooses for each task.
    published : add published figures for the tasks at hand.
    seed, resamples, confidence : of the bootstrap.

    Raises
    ------
    UserError
        Where no result is the baseline's, or none has the metric.
    """
    if baseline is not None and not any(_is_baseline(result, baseline) for result in results):
        names = sorted({name for result in results for name in (result.method, result.kind) if name})
        near = difflib.get_close_matches(baseline, names, 1, 0.0)
        raise UserError(
            f"--baseline {baseline} is none of the methods here; did you mean {near[0]!r}? ({', '.join(names)})"
        )
    labels = _labels(results)
    tasks = []
    for task in dict.fromkeys(result.task for result in results):
        mine = [result for result in results if result.task == task]
        chosen = metric or _preferred(mine)
        mine = [result for result in mine if chosen in result.metrics]
        if not mine:
            continue
        better = _higher_is_better(mine, chosen)
        references = [one for one in PUBLISHED if published and (one.task, one.metric) == (task, chosen)]
        one = TaskComparison(task, chosen, better, [], references, [], [])
        first_baselines = [result for result in mine if baseline and _is_baseline(result, baseline)]
        for result in mine:
            row = Row(labels[id(result)], result, result.metrics[chosen])
            theirs = [other for other in first_baselines if other.model == result.model] or first_baselines
            reference = theirs[0] if len(theirs) == 1 else None
            if baseline and len(theirs) > 1 and result not in theirs:
                _say(one.notes, f"several results are {baseline}: no differences for {row.label}")
            if reference is result:
                row.is_baseline = True
            elif reference is not None:
                row.difference = row.value - reference.metrics[chosen]
                row.interval = _interval(one, result, reference, seed, resamples, confidence)
            one.rows.append(row)
        for row in one.rows:
            baselines = [other for other in one.rows if other.is_baseline]
            of_model = [other for other in baselines if other.result.model == row.result.model]
            against = (of_model or baselines or one.rows)[0]
            if against is not row:
                for difference in differences(row.result, against.result, chosen):
                    _say(one.warnings, f"{row.label} and {against.label} may not compare: {difference}")
        one.rows.sort(key=lambda row: not row.is_baseline)
        tasks.append(one)
    if not tasks:
        have = sorted({name for result in results for name in result.metrics})
        raise UserError(f"No result has the metric {metric}; there are {', '.join(have)}.")
    return Comparison(tasks, baseline, seed, resamples, confidence)


def differences(one: Result, other: Result, metric: str) -> list[str]:
    """Why two results on a task do not compare; empty where they do."""
    reasons = []

    def check(what: str, mine: object, theirs: object) -> None:
        if mine is not None and theirs is not None and mine != theirs:
            reasons.append(f"{what} {mine} and {theirs}")

    check("task versions", one.version, other.version)
    check("few-shot examples", one.num_fewshot, other.num_fewshot)
    if one.documents is not None and other.documents is not None:
        check("numbers of documents", one.documents, other.documents)
    elif one.limit != other.limit:
        reasons.append(f"limits {one.limit} and {other.limit}")
    if "perplexity" in metric or metric == "bits_per_byte":
        check("windows (max_length)", one.max_length, other.max_length)
        check("windows (context_len)", one.context_len, other.context_len)
    if metric == "token_perplexity":
        mine, theirs = (_token_count(result) for result in (one, other))
        if mine is not None and theirs is not None:
            if mine != theirs and one.documents == other.documents:
                reasons.append(f"other tokenizers, {mine:,} and {theirs:,} tokens (word_perplexity compares)")
        elif one.model != other.model and one.special_tokens != other.special_tokens:
            reasons.append("other tokenizers (word_perplexity compares)")
    return reasons


def document_values(result: Result, metric: str) -> tuple[dict[tuple[int, str], list[float]], Transform] | None:
    """What each document contributes to a metric, [a, b] by (number, hash), and the metric as a function of the
    ratio of the sums; None where that is not how it comes about, or samples are missing."""
    name, _, filter_name = metric.partition(",")
    values = {}
    for sample in result.samples:
        if sample.get("filter", "none") != (filter_name or "none") or name not in sample:
            continue
        value = sample[name]
        if isinstance(value, (list, tuple)) and len(value) == 2:
            pair = [float(value[0]), float(value[1])]
        elif isinstance(value, (int, float)):
            pair = [float(value), 1.0]
        else:
            return None
        values[int(sample["doc_id"]), str(sample.get("doc_hash", ""))] = pair
    if not values:
        return None
    sums = np.array(list(values.values())).sum(axis=0)
    # The files name the aggregation, but not always: what gives the reported figure is it.
    listed = result.aggregations.get(name, "")
    for aggregation in dict.fromkeys([listed, *TRANSFORMS]):
        transform = TRANSFORMS.get(aggregation)
        if transform is not None and sums[1]:
            with np.errstate(over="ignore"):
                value = float(transform(np.array(sums[0] / sums[1])))
            if math.isclose(value, result.metrics[metric], rel_tol=1e-6, abs_tol=1e-9):
                return values, transform
    return None


def _interval(
    task: TaskComparison, one: Result, other: Result, seed: int, resamples: int, confidence: float
) -> Interval | None:
    mine, theirs = document_values(one, task.metric), document_values(other, task.metric)
    if mine is None or theirs is None:
        _say(task.notes, "no intervals where samples were not logged (--log_samples) or the metric is no mean of them")
        return None
    if mine[0].keys() != theirs[0].keys():
        _say(task.warnings, f"{one.method} and {other.method} were run on other documents: no interval")
        return None
    if len(mine[0]) < 2:
        _say(task.notes, "no intervals: one document only")
        return None
    pairs = [np.array([values[key] for key in sorted(mine[0])]) for values in (mine[0], theirs[0])]
    return paired_bootstrap(pairs[0], pairs[1], mine[1], resamples, confidence, seed)


def _say(list_: list[str], sentence: str) -> None:
    if sentence not in list_:
        list_.append(sentence)


def _is_baseline(result: Result, baseline: str) -> bool:
    return baseline in (result.method, result.kind)


def _token_count(result: Result) -> int | None:
    pairs = [sample["token_perplexity"] for sample in result.samples if "token_perplexity" in sample]
    return sum(int(tokens) for _, tokens in pairs) if pairs else None


def _preferred(results: Sequence[Result]) -> str:
    """The metric of most results; among those, the preferred one."""
    counts: dict[str, int] = {}
    for result in results:
        for name in result.metrics:
            counts[name] = counts.get(name, 0) + 1
    most = max(counts.values())
    candidates = [name for name, count in counts.items() if count == most]
    ranked = [name for name in PREFERRED if name in candidates]
    return (ranked or candidates)[0]


def _higher_is_better(results: Sequence[Result], metric: str) -> bool:
    name = metric.partition(",")[0]
    for result in results:
        if name in result.higher_is_better:
            return result.higher_is_better[name]
    return not ("perplexity" in name or name in ("bits_per_byte", "brier_score", "ter"))


def _labels(results: Sequence[Result]) -> dict[int, str]:
    """A name for each result: its method, and what else tells it from others."""
    models = {result.model for result in results}
    short = len({Path(model).name for model in models}) == len(models)
    several_stores = len({result.datastore for result in results if result.datastore}) > 1
    labels = {}
    for result in results:
        parts = [Path(result.model).name if short else result.model] if len(models) > 1 else []
        if result.method not in parts:
            parts.append(result.method)
        if several_stores and result.datastore:
            parts.append(result.datastore)
        labels[id(result)] = " · ".join(parts)
    return labels
