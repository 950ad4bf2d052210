"""Comparisons as tables, and as CSV with all digits."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from knn_lm_eval.report.comparison import Comparison, Row, TaskComparison
from knn_lm_eval.report.tables import WARNING, Table

REFERENCE = "†"  # marks published figures
MINUS = "−"


def tables_of(comparison: Comparison) -> list[Table]:
    """The overview (method x task) where there are several tasks, then a table for each task."""
    details = [detail_table(comparison, task) for task in comparison.tasks]
    return [overview_table(comparison), *details] if len(details) > 1 else details


def overview_table(comparison: Comparison) -> Table:
    """Methods down, tasks across; in parentheses the difference to the baseline."""
    labels = list(dict.fromkeys(row.label for task in comparison.tasks for row in task.rows))
    rows = []
    for label in labels:
        cells = [label]
        for task in comparison.tasks:
            row = next((row for row in task.rows if row.label == label), None)
            cell = "" if row is None else _figure(row.value, task)
            if row is not None and row.difference is not None:
                cell += f" ({_signed(row.difference, task)}{'*' if _is_sure(row) else ''})"
            cells.append(cell)
        rows.append(cells)
    header = ["method", *(f"{task.task} {_arrow(task)}" for task in comparison.tasks)]
    metrics = ", ".join(f"{task.task}: {task.metric}" for task in comparison.tasks)
    notes = [f"{metrics}."]
    if comparison.baseline is not None:
        notes.append(
            f"In parentheses the difference to {comparison.baseline}; * where its {comparison.confidence:.0%} "
            "interval leaves out zero."
        )
    return Table("All tasks", header, rows, notes)


def detail_table(comparison: Comparison, task: TaskComparison) -> Table:
    """One task: difference, interval, p-value, and what it cost; below them published figures."""
    columns = _columns(comparison, task)
    rows = [[show(row) for show in columns.values()] for row in task.rows]
    sources = {source: number for number, source in enumerate(dict.fromkeys(one.source for one in task.published), 1)}
    for figure in task.published:
        label = f"{REFERENCE} {figure.model}, {figure.method} [{sources[figure.source]}]"
        rows.append([label, _figure(figure.value, task), *[""] * (len(columns) - 2)])
    notes = [f"{WARNING}: {warning}." for warning in task.warnings]
    notes += [f"{note[0].upper()}{note[1:]}." for note in task.notes]
    if any(row.interval is not None for row in task.rows):
        notes.append(
            f"Intervals: jackknife and bootstrap-t; p: exchange of the methods; {comparison.resamples:,} draws, "
            f"seed {comparison.seed}."
        )
    if sources:
        listed = "; ".join(f"[{number}] {source}" for source, number in sources.items())
        notes.append(f"{REFERENCE} Published, for other LMs and tokenizers: {listed}.")
    for caveat in dict.fromkeys(one.caveat for one in task.published if one.caveat):
        figures = ", ".join(_figure(one.value, task) for one in task.published if one.caveat == caveat)
        notes.append(f"{REFERENCE} {figures}: {caveat}.")
    return Table(task.task, list(columns), rows, notes, set(range(len(task.rows), len(rows))))


def _columns(comparison: Comparison, task: TaskComparison) -> dict[str, Callable[[Row], str]]:
    """Heading -> a row's cell; what no row has is no column."""
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.label + (" (baseline)" if row.is_baseline else ""),
        f"{task.metric} {_arrow(task)}": lambda row: _figure(row.value, task),
    }
    if any(row.difference is not None for row in task.rows):
        columns["difference"] = lambda row: "" if row.difference is None else _signed(row.difference, task)
    if any(row.interval is not None for row in task.rows):
        columns[f"{comparison.confidence:.0%} interval"] = lambda row: _interval(row, task)
        columns["p"] = lambda row: "" if row.interval is None else _p(row.interval.p_value)
    if any(row.result.tokens_per_second is not None for row in task.rows):
        columns["tokens/s"] = lambda row: _or_empty(row.result.tokens_per_second, "{:,.0f}".format)
    if any(row.result.saved_searches is not None for row in task.rows):
        columns["saved"] = lambda row: _or_empty(row.result.saved_searches, "{:.0%}".format)
    if any(row.result.retrieval_bytes is not None for row in task.rows):
        columns["index"] = lambda row: _or_empty(row.result.retrieval_bytes, _size)
    return columns


def as_csv(comparison: Comparison) -> str:
    """A line for each method and task, figures unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["task", "metric", "model", "datastore", "method", "value", "baseline", "difference", "low", "high", "p_value"]
        + ["tokens_per_second", "saved_searches", "index_bytes", "documents", "seed", "resamples", "source", "file"]
    )
    for task in comparison.tasks:
        for row in task.rows:
            result, interval = row.result, row.interval
            bounds = [interval.low, interval.high, _blank(interval.p_value)] if interval else ["", "", ""]
            writer.writerow(
                [task.task, task.metric, result.model, result.datastore, result.method, row.value]
                + [comparison.baseline or "", "" if row.difference is None else row.difference, *bounds]
                + [_blank(result.tokens_per_second), _blank(result.saved_searches), _blank(result.retrieval_bytes)]
                + [_blank(result.documents), comparison.seed, comparison.resamples, "", result.file]
            )
        for one in task.published:
            empty = [""] * 11
            writer.writerow([task.task, task.metric, one.model, "", one.method, one.value, *empty, one.source, ""])
    return file.getvalue()


def _is_sure(row: Row) -> bool:
    return row.interval is not None and not row.interval.low <= 0 <= row.interval.high


def _arrow(task: TaskComparison) -> str:
    return "↑" if task.higher_is_better else "↓"


def _decimals(task: TaskComparison) -> int:
    """As many for a whole column as its smallest figure needs for about four digits."""
    smallest = min(abs(row.value) for row in task.rows)
    return 2 if smallest >= 10 else 3 if smallest >= 1 else 4


def _figure(value: float, task: TaskComparison) -> str:
    return f"{value:,.{_decimals(task)}f}".replace("-", MINUS)


def _signed(value: float, task: TaskComparison) -> str:
    return f"{value:+,.{_decimals(task)}f}".replace("-", MINUS)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _interval(row: Row, task: TaskComparison) -> str:
    interval = row.interval
    return "" if interval is None else f"[{_signed(interval.low, task)}, {_signed(interval.high, task)}]"


def _size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def _or_empty(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _blank(value: object) -> object:
    return "" if value is None else value
