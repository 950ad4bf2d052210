"""Comparisons as tables, and as CSV with all digits."""

from __future__ import annotations

import csv
import io

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
    """One task: difference, interval, p-value, and what it cost."""
    columns = ["method", f"{task.metric} {_arrow(task)}"]
    with_difference = any(row.difference is not None for row in task.rows)
    with_interval = any(row.interval is not None for row in task.rows)
    if with_difference:
        columns.append("difference")
    if with_interval:
        columns += [f"{comparison.confidence:.0%} interval", "p"]
    optional: dict[str, list[float | None]] = {
        "tokens/s": [row.result.tokens_per_second for row in task.rows],
        "saved": [row.result.saved_searches for row in task.rows],
        "index": [row.result.retrieval_bytes for row in task.rows],
    }
    shown = [name for name, values in optional.items() if any(value is not None for value in values)]
    rows = []
    for number, row in enumerate(task.rows):
        cells = [row.label + (" (baseline)" if row.is_baseline else ""), _figure(row.value, task)]
        if with_difference:
            cells.append("" if row.difference is None else _signed(row.difference, task))
        if with_interval:
            interval = row.interval
            cells += (
                ["", ""]
                if interval is None
                else [f"[{_signed(interval.low, task)}, {_signed(interval.high, task)}]", _p(interval.p_value)]
            )
        cells += [_cost(name, optional[name][number]) for name in shown]
        rows.append(cells)
    own = len(rows)
    sources: dict[str, int] = {}
    for one in task.published:
        number = sources.setdefault(one.source, len(sources) + 1)
        label = f"{REFERENCE} {one.model}, {one.method} [{number}]"
        rows.append([label, _figure(one.value, task), *[""] * (len(columns) + len(shown) - 2)])
    notes = [f"{WARNING}: {warning}." for warning in task.warnings]
    notes += [f"{note[0].upper()}{note[1:]}." for note in task.notes]
    if with_interval:
        notes.append(
            f"Intervals and p: paired bootstrap over documents, {comparison.resamples:,} resamples, "
            f"seed {comparison.seed}."
        )
    if sources:
        listed = "; ".join(f"[{number}] {source}" for source, number in sources.items())
        notes.append(f"{REFERENCE} Published, for other LMs and tokenizers: {listed}.")
    return Table(task.task, columns + shown, rows, notes, set(range(own, len(rows))))


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
            bounds = [interval.low, interval.high, interval.p_value] if interval else ["", "", ""]
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


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "tokens/s":
        return f"{value:,.0f}"
    if name == "saved":
        return f"{value:.0%}"
    return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"


def _blank(value: object) -> object:
    return "" if value is None else value
