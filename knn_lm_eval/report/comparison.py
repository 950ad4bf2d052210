"""Methods side by side: the difference to a baseline, how sure it is, and whether the two can be compared at all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.intervals import (
    BLOCKS_AS_UNITS,
    DEFAULT_RESAMPLES,
    DEFAULT_SEED,
    TRANSFORMS,
    Interval,
    blocks_of,
    paired_interval,
)
from knn_lm_eval.report.published_figures import PUBLISHED_FIGURES, PublishedFigure
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
    published: list[PublishedFigure]
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
    seed, resamples, confidence : of intervals and p-values.

    Raises
    ------
    UserError
        Where no result is the baseline's, or none has the metric.
    """
    if baseline is not None:
        _check_baseline(results, baseline)
    draws = {"resamples": resamples, "confidence": confidence, "seed": seed}
    labelled = list(zip(_labels(results), results, strict=True))
    tasks = []
    for task in dict.fromkeys(result.task for result in results):
        on_task = [(label, result) for label, result in labelled if result.task == task]
        chosen = metric or _preferred([result for _, result in on_task])
        on_task = [(label, result) for label, result in on_task if chosen in result.metrics]
        if on_task:
            figures = [one for one in PUBLISHED_FIGURES if published and (one.task, one.metric) == (task, chosen)]
            better = _higher_is_better([result for _, result in on_task], chosen)
            compared = TaskComparison(task, chosen, better, [], figures, [], [])
            _add_rows(compared, on_task, baseline, draws)
            tasks.append(compared)
    if not tasks:
        have = sorted({name for result in results for name in result.metrics})
        raise UserError(f"No result has the metric {metric}; there are {', '.join(have)}.")
    return Comparison(tasks, baseline, seed, resamples, confidence)


def _check_baseline(results: Sequence[Result], baseline: str) -> None:
    if any(_is_baseline(result, baseline) for result in results):
        return
    names = sorted({name for result in results for name in (result.method, result.kind) if name})
    near = difflib.get_close_matches(baseline, names, 1, 0.0)
    raise UserError(
        f"--baseline {baseline} is none of the methods here; did you mean {near[0]!r}? ({', '.join(names)})"
    )


def _add_rows(
    task: TaskComparison, labelled: Sequence[tuple[str, Result]], baseline: str | None, draws: dict[str, Any]
) -> None:
    """Each result beside its baseline, the baselines first; ``draws`` are settings of the intervals."""
    baselines = [result for _, result in labelled if baseline is not None and _is_baseline(result, baseline)]
    for label, result in labelled:
        row = Row(label, result, result.metrics[task.metric])
        of_its_model = [other for other in baselines if other.model == result.model] or baselines
        reference = of_its_model[0] if len(of_its_model) == 1 else None
        if len(of_its_model) > 1 and result not in of_its_model:
            _add(task.notes, f"several results are {baseline}: no differences for {label}")
        if reference is result:
            row.is_baseline = True
        elif reference is not None:
            row.difference = row.value - reference.metrics[task.metric]
            row.interval = _interval(task, result, reference, draws)
        task.rows.append(row)
    for row in task.rows:
        _warn_of_differences(task, row)
    _warn_of_distances(task)
    task.rows.sort(key=lambda row: not row.is_baseline)


def _warn_of_differences(task: TaskComparison, row: Row) -> None:
    """Warnings of all that speaks against comparing a row with its baseline, or with the first row without one."""
    baselines = [other for other in task.rows if other.is_baseline]
    of_its_model = [other for other in baselines if other.result.model == row.result.model]
    reference = (of_its_model or baselines or task.rows)[0]
    if reference is not row:
        for difference in differences(row.result, reference.result, task.metric):
            _add(task.warnings, f"{row.label} and {reference.label} may not compare: {difference}")


def _warn_of_distances(task: TaskComparison) -> None:
    """Warnings where RetoMaton has other distances than kNN-LM over the same datastore, whatever the baseline is."""
    for walk in task.rows:
        for search in task.rows:
            one, other = walk.result, search.result
            if (
                one.retomaton
                and not other.retomaton
                and one.distances
                and other.distances
                and one.distances != other.distances
                and (one.model, one.datastore) == (other.model, other.datastore)
            ):
                _add(
                    task.warnings,
                    f"{walk.label} and {search.label} may not compare: {one.distances} and {other.distances} distances "
                    f"(give both recompute_dists=True)",
                )


def differences(one: Result, other: Result, metric: str) -> list[str]:
    """Why two results on a task do not compare; empty where they do."""
    reasons = []

    def check(what: str, value: object, other_value: object) -> None:
        if value is not None and other_value is not None and value != other_value:
            reasons.append(f"{what} {value} and {other_value}")

    check("task versions", one.version, other.version)
    check("few-shot examples", one.num_fewshot, other.num_fewshot)
    if one.documents is not None and other.documents is not None:
        check("numbers of documents", one.documents, other.documents)
    elif one.limit != other.limit:
        reasons.append(f"limits {one.limit} and {other.limit}")
    if "perplexity" in metric or metric == "bits_per_byte":
        check("windows (max_length)", one.max_length, other.max_length)
        check("windows (context_len)", one.context_len, other.context_len)
    if one.model == other.model:
        for name, value in one.lm_settings.items():
            check(name, value, other.lm_settings.get(name))
    if metric == "token_perplexity":
        tokens, other_tokens = _token_count(one), _token_count(other)
        if tokens is not None and other_tokens is not None:
            if tokens != other_tokens and one.documents == other.documents:
                reasons.append(f"other tokenizers, {tokens:,} and {other_tokens:,} tokens (word_perplexity compares)")
        elif one.model != other.model and one.special_tokens != other.special_tokens:
            reasons.append("other tokenizers (word_perplexity compares)")
    return reasons


def document_values(result: Result, metric: str) -> tuple[dict[tuple[int, str], list[float]], str] | None:
    """How a metric comes about from its documents; None where samples are missing, or where it is no mean of them.

    Returns
    -------
    values : what each document contributes, [a, b] by its number and hash.
    aggregation : the metric as a function of sum a / sum b, by its name in ``TRANSFORMS``.
    """
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
    aggregation = _aggregation(result, metric, np.array(list(values.values())).sum(axis=0))
    return None if aggregation is None else (values, aggregation)


def _aggregation(result: Result, metric: str, sums: np.ndarray) -> str | None:
    """What gives the reported figure from the sums ``[2]``: the files name the aggregation, but not always."""
    listed = result.aggregations.get(metric.partition(",")[0], "")
    for aggregation in dict.fromkeys([listed, *TRANSFORMS]):
        transform = TRANSFORMS.get(aggregation)
        if transform is not None and sums[1]:
            with np.errstate(over="ignore"):
                value = float(transform(np.array(sums[0] / sums[1])))
            if math.isclose(value, result.metrics[metric], rel_tol=1e-6, abs_tol=1e-9):
                return aggregation
    return None


def _interval(task: TaskComparison, result: Result, reference: Result, draws: dict[str, Any]) -> Interval | None:
    """Of the difference to the reference; None, and the reason among the task's notes, where there is none."""
    found, found_of_reference = document_values(result, task.metric), document_values(reference, task.metric)
    if found is None or found_of_reference is None:
        _add(task.notes, "no intervals where samples were not logged (--log_samples) or the metric is no mean of them")
        return None
    (values, aggregation), (reference_values, _) = found, found_of_reference
    if values.keys() != reference_values.keys():
        _add(task.warnings, f"{result.method} and {reference.method} were run on other documents: no interval")
        return None
    documents = sorted(values)
    ours, theirs = (np.array([of[key] for key in documents]) for of in (values, reference_values))
    units = "documents"
    if len(documents) == 1:
        blocks = _paired_blocks(_windows(result, task.metric), _windows(reference, task.metric))
        if blocks is None:
            _add(task.notes, "no intervals: one document only, and no sums over the same windows of it")
            return None
        (ours, theirs), units = blocks, "blocks of consecutive windows"
        _add(task.notes, f"one document: intervals are over its {len(ours)} {units}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        _add(task.notes, f"no intervals: {units} of {result.method} or {reference.method} have no finite score")
        return None
    interval = paired_interval(ours, theirs, aggregation, **draws)
    if interval is None:
        _add(task.notes, "no intervals: one document only that is not empty")
    elif interval.p_value is None:
        _add(task.notes, f"no p: with {len(ours)} {units} not even the clearest difference could have a small one")
    return interval


def _windows(result: Result, metric: str) -> np.ndarray:
    """What the windows of a single document contribute, ``[windows, 2]``; empty where its sample does not say."""
    name, _, filter_name = metric.partition(",")
    of_filter = (one for one in result.samples if one.get("filter", "none") == (filter_name or "none"))
    pairs = next(of_filter, {}).get(f"{name}_stderr")
    try:
        return np.array(pairs or [], dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        return np.empty((0, 2))


def _paired_blocks(windows: np.ndarray, of_reference: np.ndarray) -> list[np.ndarray] | None:
    """Both in the same blocks, ``[blocks, 2]`` each; None where there are not several windows, the same in both."""
    if not 2 <= len(windows) == len(of_reference) or not np.allclose(windows[:, 1], of_reference[:, 1]):
        return None
    (blocks,) = blocks_of([np.concatenate([windows, of_reference], axis=1)], BLOCKS_AS_UNITS)
    return np.split(blocks, 2, axis=1)


def _add(sentences: list[str], sentence: str) -> None:
    if sentence not in sentences:
        sentences.append(sentence)


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


def _labels(results: Sequence[Result]) -> list[str]:
    """A name for each result: its method, and what else tells it from others."""
    models = {result.model for result in results}
    short = len({Path(model).name for model in models}) == len(models)
    several_stores = len({result.datastore for result in results if result.datastore}) > 1
    labels = []
    for result in results:
        parts = [Path(result.model).name if short else result.model] if len(models) > 1 else []
        if result.method not in parts:
            parts.append(result.method)
        if several_stores and result.datastore:
            parts.append(result.datastore)
        labels.append(" · ".join(parts))
    return labels
