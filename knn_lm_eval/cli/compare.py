"""Compare lm-eval results: a table of methods and tasks, with differences to a baseline and how sure they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_lm_eval.cli.arguments import add_output, check_at_least_one, check_outputs
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

EXAMPLE = "knn-lm-eval compare results/law --baseline base --report report.html"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("results", type=Path, nargs="+", help="folders with results files of lm-eval, or such files")
    parser.add_argument("--baseline", help="the method to compare with, such as hf (default: no differences)")
    parser.add_argument("--metric", help="for all tasks that have it (default: one for each task)")
    parser.add_argument("--format", choices=["terminal", "markdown", "csv", "latex"], default="terminal")
    add_output(parser, "the file for Markdown, CSV or LaTeX (default: print it)", required=False)
    parser.add_argument("--report", type=Path, help="write a page with tables and charts to this HTML file as well")
    parser.add_argument("--no_published", action="store_true", help="leave out published figures")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--resamples", type=int, default=10_000, help="draws for intervals and p (default: %(default)s)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    check(arguments)

    from knn_lm_eval.report.comparison import compare
    from knn_lm_eval.report.comparison_tables import as_csv, tables_of
    from knn_lm_eval.report.results import read_folder
    from knn_lm_eval.report.tables import as_latex, as_markdown, print_tables

    results, others = read_folder(arguments.results)
    comparison = compare(
        results,
        arguments.baseline,
        arguments.metric,
        published=not arguments.no_published,
        seed=arguments.seed,
        resamples=arguments.resamples,
        confidence=arguments.confidence,
    )
    if arguments.report is not None:
        from knn_lm_eval.report.page import report_page

        grids = [file for folder in arguments.results for file in sorted(folder.rglob("*.csv"))]
        title = "Results in " + ", ".join(path.name or str(path) for path in arguments.results)
        write(arguments.report, report_page(comparison, others, grids, title))
    tables = tables_of(comparison)
    if arguments.format == "terminal":
        print_tables(tables)
        return
    text = {
        "markdown": lambda: as_markdown(tables),
        "csv": lambda: as_csv(comparison),
        "latex": lambda: as_latex(tables),
    }[arguments.format]()
    if arguments.output is None:
        print(text, end="")
    else:
        write(arguments.output, text)
        print(f"Wrote {arguments.output}.")


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError where an argument is out of range or does not fit another."""
    check_at_least_one(arguments, "resamples")
    if not 0 < arguments.confidence < 1:
        raise UserError(f"--confidence {arguments.confidence:g} must be between 0 and 1.")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} must be 0 or more.")
    if arguments.output is not None and arguments.format == "terminal":
        raise UserError(f"--output {arguments.output} needs --format markdown, csv or latex.")
    check_outputs(arguments.output, arguments.report)


def write(path: Path, text: str) -> None:
    """Write a file, and its folder where there is none."""
    from knn_lm_eval.system.files import disk_errors_in, write_text

    with disk_errors_in(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
