"""Tables of text and numbers: what one is, and how it is shown on the terminal, in Markdown and in LaTeX.

``print_table`` is how every verb shows its figures: the same look everywhere, numbers flush right, and in a pipe or a
file full width and no colours, for scripts to read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

# How a column's values are written: a format specification such as ",.2f", or a function. "" is for what needs none:
# text, and numbers as they are; ">" is for text that belongs flush right, such as "12 MiB".
Format = str | Callable[[Any], str]

WARNING = "Warning"  # a note that begins so stands out
GAP = 2  # characters between columns
NARROWEST = 20  # characters to which a column of text may be wrapped where the terminal is narrow
# Control characters could colour a terminal or tear a row apart: they are shown instead.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
SHOWN_AS = CONTROLS | {ord("\n"): "⏎", ord("\t"): " ", 0x2028: "⏎", 0x2029: "⏎"}


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


def print_table(
    title: str,
    columns: Mapping[str, Format],
    rows: Sequence[Mapping[str, Any] | Sequence[Any]],
    notes: Sequence[str] = (),
    *,
    dim: Collection[int] = (),
    file: TextIO | None = None,
) -> None:
    """Print a table.

    On a terminal, text is wrapped where there is too little room, numbers never are; elsewhere nothing is wrapped or
    cut. Text of the data is shown as it is: it cannot bring colours, control codes or rows of its own.

    Parameters
    ----------
    title : above the table; none where it is empty.
    columns : heading -> format. A column is flush right where it has a format or any number, else flush left.
    rows : values by heading (one that is missing is None), or in the order of the columns. None is an empty cell;
        text takes no format specification; ``rich``'s Text keeps its styles and its lines.
    notes : lines below the table.
    dim : numbers of rows that stand back.
    file : None for the standard output.
    """
    from rich.table import Table as RichTable

    console = _console(sys.stdout if file is None else file)
    table = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    values = [[row.get(name) for name in columns] if isinstance(row, Mapping) else row for row in rows]
    grid = []  # [columns][rows]
    width = least_width = 0  # characters, of the whole table
    for place, (heading, format_) in enumerate(columns.items()):
        cells = [_cell(row[place], format_) for row in values]
        flush_right = format_ != "" or any(isinstance(row[place], (int, float)) for row in values)
        table.add_column(_cell(heading), justify="right" if flush_right else "left", no_wrap=flush_right)
        full = GAP + max(map(_width, [_cell(heading), *cells]))
        width += full
        least_width += full if flush_right else min(full, GAP + NARROWEST)
        grid.append(cells)
    for number, row_cells in enumerate(zip(*grid, strict=True)):
        table.add_row(*row_cells, style="dim" if number in dim else "")
    if title:
        _print_line(console, title, "bold")
    # A terminal too narrow for the numbers wraps the lines itself: nothing is cut.
    _print_grid(console, table, max(console.width, least_width) if console.is_terminal else width)
    for note in notes:
        _print_line(console, note, "yellow" if note.startswith(WARNING) else "dim")


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables of text, an empty line below each."""
    for table in tables:
        first, *others = table.header
        columns = {first: "", **dict.fromkeys(others, ">")}
        print_table(table.title, columns, table.rows, table.notes, dim=table.marked)
        print()


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


def _console(file: TextIO) -> Console:
    """Colours for a terminal alone: what the environment asks for does not count, since scripts read pipes."""
    from rich.console import Console

    terminal = file.isatty()
    return Console(file=file, force_terminal=terminal, force_jupyter=False, color_system="auto" if terminal else None)


def _cell(value: Any, format_: Format = "") -> Text:
    from rich.text import Text

    if isinstance(value, Text):
        return value
    if value is None:
        return Text()
    if callable(format_):
        return Text(visible(format_(value)))
    return Text(visible(value if isinstance(value, str) else format(value, format_)))


def visible(text: str) -> str:
    """Text in one line, its control characters written out."""
    return text.translate(SHOWN_AS)


def _width(cell: Text) -> int:
    """Characters of the widest line."""
    from rich.cells import cell_len

    return max(map(cell_len, cell.plain.splitlines()), default=0)


def _print_line(console: Console, text: str, style: str) -> None:
    from rich.text import Text

    console.print(Text(visible(text), style=style), soft_wrap=not console.is_terminal)


def _print_grid(console: Console, table: RichTable, width: int) -> None:
    """Print at the given width; without the spaces that fill up lines where a script may read them."""
    console.size = (width, console.height)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def _padded(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$",
    "·": r"$\cdot$", "†": r"$\dagger$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
