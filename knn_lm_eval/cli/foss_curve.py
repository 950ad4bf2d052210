"""Draw perplexity against the fraction of saved searches (FoSS) for RetoMaton, from one forward pass per text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.cli.arguments import (
    add_model_arguments,
    add_output,
    add_task_arguments,
    check_outputs,
    parse_numbers,
    read_metadata,
    read_model_args,
    task_names,
)
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser

if TYPE_CHECKING:
    from knn_lm_eval.study.foss_curve import Curve

COLUMNS = {"min_knns": "g", "token_perplexity": ".4f", "saved_searches": ".4f", "mean_candidates": ".1f"}

EXAMPLE = (
    "knn-lm-eval foss_curve --model_args datastore=stores/law --tasks law --metadata data_dir=data "
    "--limit 20 --output foss"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--min_knns", default="1,8,64,256,1024,inf", help="the settings to walk with")
    parser.add_argument(
        "--clusters",
        help="clusterings to walk with, `none` for pointers alone (default: none and all that there are)",
    )
    parser.add_argument("--max_knns", type=int, default=1024)
    parser.add_argument("--duplicates", choices=["keep", "merge"], default="merge")
    add_output(parser, "the folder for CSV, JSON, PNG and SVG")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    min_knns = parse_numbers("--min_knns", arguments.min_knns)
    check_outputs(*(arguments.output / f"{task}.json" for task in task_names(arguments)))
    model_args = read_model_args(arguments)

    from knn_lm_eval.study.foss_curve import foss_curves
    from knn_lm_eval.system.files import disk_errors_in, held_output

    with held_output(arguments.output, is_folder=True):
        curves = foss_curves(
            model_args,
            task_names(arguments),
            min_knns=min_knns,
            clusters=arguments.clusters.split(",") if arguments.clusters else None,
            max_knns=arguments.max_knns,
            duplicates=arguments.duplicates,
            metadata=read_metadata(arguments),
            limit=arguments.limit,
        )
        with disk_errors_in(arguments.output):
            for curve in curves:
                write(arguments.output / curve.task, curve)


def write(path: Path, curve: Curve) -> None:
    """Print the table, write it as CSV and JSON, and draw it."""
    from knn_lm_eval.report.plots import draw_foss_curve
    from knn_lm_eval.report.tables import print_table
    from knn_lm_eval.study.run import write_csv
    from knn_lm_eval.system.files import write_json

    rows = [point.row() for point in curve.points]
    write_csv(path.with_suffix(".csv"), rows)
    write_json(path.with_suffix(".json"), {"task": curve.task, "settings": curve.settings, "points": rows})
    print_table(curve.task, {name: COLUMNS.get(name, "") for name in rows[0]}, rows)
    draw_foss_curve(path, curve.task, rows)
