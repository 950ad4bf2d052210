"""Tables on the terminal, in pipes and in files: aligned, whole, and safe from what the data hold."""

from __future__ import annotations

import io
import os

import pytest
from rich.text import Text

from knn_lm_eval.report.tables import print_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(*arguments: object, file: io.StringIO | None = None, **options: object) -> str:
    file = io.StringIO() if file is None else file
    print_table(*arguments, file=file, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_numbers_are_flush_right_and_formatted_and_none_is_empty() -> None:
    columns = {"": "", "index": "", "bytes": ",.0f", "probe": "", "size": lambda n: f"{n} MiB"}
    rows = [
        {"": "*", "index": "a", "bytes": 1234.5, "probe": None, "size": 3},
        ["", "longer", "-", 16, 12],
        {"index": "b", "bytes": 7},
    ]
    assert printed("Indexes", columns, rows, ["A note."]) == (
        "Indexes\n"
        "   index   bytes  probe    size\n"
        "*  a       1,234          3 MiB\n"
        "   longer      -     16  12 MiB\n"
        "   b           7\n"
        "A note.\n"
    )


def test_an_empty_table_is_its_headings_and_a_title_is_optional() -> None:
    assert printed("", {"a": "", "b": ".2f"}, []) == "a  b\n"


@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "40"}, {"TERM": "dumb"}])
def test_nothing_is_wrapped_or_coloured_in_a_pipe(monkeypatch: pytest.MonkeyPatch, forced: dict[str, str]) -> None:
    for name, value in forced.items():
        monkeypatch.setenv(name, value)
    row = ["a method with a long name " * 20, *range(10**9, 10**9 + 30)]
    columns = dict.fromkeys(["method", *map(str, range(30))], ",")
    text = printed("A title " * 30, columns, [row], ["Warning: " + "a note " * 50], dim={0})
    assert text.count("\n") == 4 and "\x1b" not in text and "…" not in text
    assert text.splitlines()[2].split()[-1] == "1,000,000,029"


def test_what_the_data_hold_is_shown_and_does_nothing() -> None:
    hostile = "[red]x[/red] \x1b[31m :smile: \n[link=http://x]\x85\x9b\u2028end"
    text = printed(hostile, {hostile: "", "n": ""}, [[hostile, 1]], [hostile])
    shown = "[red]x[/red] \\x1b[31m :smile: ⏎[link=http://x]\\x85\\x9b⏎end"
    assert text == f"{shown}\n{shown}  n\n{shown}  1\n{shown}\n"


def test_a_narrow_terminal_wraps_text_and_leaves_numbers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    rows = [["a method with a long name " * 4, 123456789.25], ["short", 2.5]]
    text = printed("", {"method": "", "a figure": ",.2f"}, rows, file=Terminal())
    assert "\x1b" in text  # bold headings
    lines = text.splitlines()
    assert len(lines) == 5 and max(map(len, lines[1:])) == 60
    assert "123,456,789.25" in text and "…" not in text
    # Too narrow for the numbers alone: the terminal may wrap, but no digit is lost.
    monkeypatch.setenv("COLUMNS", "30")
    text = printed("", {"method": "", **dict.fromkeys("abc", ",.2f")}, [["x", *[123456789.25] * 3]], file=Terminal())
    assert text.count("123,456,789.25") == 3


def test_styled_cells_keep_their_lines() -> None:
    cell = Text("first", style="bold")
    cell.append("\nsecond")
    assert printed("", {"token": "", "found": ""}, [["t", cell]]) == "token  found\nt      first\n       second\n"


def test_the_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t", {"a": ""}, [[1]])
    assert capsys.readouterr().out == "t\na\n1\n"


def test_a_table_reaches_a_pseudo_terminal_in_its_width() -> None:
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as file:
        print_table("", {"a": "", "b": ".1f"}, [["x", 1.5]], file=file)
    assert "1.5" in os.read(reader, 1000).decode()
    os.close(reader)
