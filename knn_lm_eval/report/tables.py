"""Comparisons as tables: for the terminal, Markdown, CSV, LaTeX, and HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from knn_lm_eval.report.comparison import Comparison, Row, TaskComparison

REFERENCE = "†"  # marks published figures
MINUS = "−"


@dataclass
class Table:
    """Text in cells: the first column flush left, all others flush right; ``notes`` go below.

    ``marked`` are the numbers of rows that are not one's own results.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    marked: set[int] = field(default_factory=set)


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
    notes = [f"Warning: {warning}." for warning in task.warnings]
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


def as_markdown(tables: Sequence[Table]) -> str:
    """GitHub's kind."""
    blocks = []
    for table in tables:
        lines = [f"### {table.title}", ""]
        grid = [[cell.replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        aligned = [[_padded(row[i], width, i) for i, width in enumerate(widths)] for row in grid]
        rule = ["-" * (width - bool(i)) + ":" * bool(i) for i, width in enumerate(widths)]
        lines += [f"| {' | '.join(row)} |" for row in [aligned[0], rule, *aligned[1:]]]
        for note in table.notes:
            lines += ["", note]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def as_latex(tables: Sequence[Table]) -> str:
    """``tabular`` with booktabs' rules, in ``table`` environments."""
    blocks = []
    for table in tables:
        columns = "l" + "r" * (len(table.header) - 1)
        lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, table.header)) + r" \\", r"\midrule"]
        for number, row in enumerate(table.rows):
            if number in table.marked and number - 1 not in table.marked:
                lines.append(r"\midrule")
            lines.append(" & ".join(map(_latex, row)) + r" \\")
        caption = " ".join([f"{table.title}.", *table.notes])
        lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_latex(caption)}}}", r"\end{table}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


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


def as_html(table: Table) -> str:
    """A ``figure`` with the table and its notes."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    body = []
    for number, (first, *rest) in enumerate(table.rows):
        mark = ' class="reference"' if number in table.marked else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        body.append(f'<tr{mark}><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    notes = "".join(f"<p{_class(note)}>{html.escape(note)}</p>" for note in table.notes)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f'\n</tbody></table></div>\n<div class="notes">{notes}</div>\n'
    )


def print_tables(tables: Sequence[Table]) -> None:
    """On the terminal; through a pipe in full width and without colours."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables:
        rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
        for number, heading in enumerate(table.header):
            rich.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
        for number, row in enumerate(table.rows):
            rich.add_row(*map(Text, row), style="dim" if number in table.marked else "")
        console.print(rich)
        for note in table.notes:
            console.print(Text(note, style="yellow" if note.startswith("Warning") else "dim"))
        console.print()


def _class(note: str) -> str:
    return ' class="warning"' if note.startswith("Warning") else ""


def _padded(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


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


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$",
    "·": r"$\cdot$", "†": r"$\dagger$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
