"""Compare a datastore's indexes by speed, size, p_kNN and perplexity, at several probes and k, on real text."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from knn_lm_eval.cli.arguments import (
    add_model_arguments,
    add_output,
    add_timing_arguments,
    check_at_least_one,
    check_outputs,
    read_model_args,
    read_text,
)
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

if TYPE_CHECKING:
    from knn_lm_eval.study.index_comparison import IndexStudy

EXAMPLE = (
    "knn-lm-eval compare_indexes --model_args datastore=stores/law,lmbda=0.25 --text test.txt --indexes "
    "index:8,32 --output indexes"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser, "as for knn-hf: datastore=...,lmbda=...,knn_temp=...", max_length="at most 1024")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files, a domain each, say")
    parser.add_argument("--tokens", type=int, help="score the first so many tokens of each text (default: all)")
    parser.add_argument(
        "--indexes",
        nargs="+",
        required=True,
        metavar="NAME[:PROBE,...]",
        help="the datastore's indexes to compare, each with the probes to try (default: its own)",
    )
    parser.add_argument("--k", default="1024", help="numbers of neighbours, separated by commas (default: 1024)")
    add_timing_arguments(parser, "faiss chooses")
    add_output(parser, "the folder for CSV, JSON, PNG and SVG")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    for path in arguments.text:
        if not path.is_file():
            raise UserError(f"There is no text file {path}.")
    check_at_least_one(arguments, "tokens", "repeats", "threads")
    check_outputs(arguments.output / "indexes.json")
    ks = positive_numbers("--k", arguments.k)
    indexes: list[tuple[str, list[int | None]]] = []
    for text in arguments.indexes:
        name, _, probes = text.partition(":")
        indexes.append((name, [*positive_numbers(f"--indexes {name}:", probes)] if probes else [None]))
    model_args = read_model_args(arguments)

    from knn_lm_eval.study.index_comparison import compare_indexes
    from knn_lm_eval.system.files import disk_errors_in, held_output

    with held_output(arguments.output, is_folder=True):
        study = compare_indexes(
            model_args,
            {path.stem: read_text(path) for path in arguments.text},
            indexes,
            ks,
            arguments.output,
            tokens=arguments.tokens,
            repeats=arguments.repeats,
            threads=arguments.threads,
            cpu_time=arguments.cpu_time,
        )
        with disk_errors_in(arguments.output):
            write(arguments.output / "indexes", study)
    print_study(study)


def positive_numbers(option: str, text: str) -> list[int]:
    """Positive whole numbers separated by commas."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text} should be whole numbers separated by commas.") from error
    if min(numbers) < 1:
        raise UserError(f"{option} {text}: each must be at least 1.")
    return numbers


def write(path: Path, study: IndexStudy) -> None:
    """Write the measurements as JSON and CSV, and draw them."""
    from knn_lm_eval.report.plots import draw_indexes
    from knn_lm_eval.study.run import write_csv
    from knn_lm_eval.system.files import write_json

    rows, count = study.rows(), len(study.measured)
    write_json(path.with_suffix(".json"), {"settings": study.settings, "indexes": rows})
    write_csv(path.with_suffix(".csv"), rows)
    draw_indexes(path, rows[:count], rows[count:], study.settings["entries"])


def print_study(study: IndexStudy) -> None:
    """Print the measurements, marking those that no other beats in both speed and perplexity."""
    from knn_lm_eval.report.tables import print_table

    settings, texts = study.settings, list(study.measured[0].perplexity)
    print(f"{settings['entries']:,} entries, tokens of {settings['tokens']}, lmbda={settings['lmbda']:g}")
    print("base LM: " + ", ".join(f"{name} {value:.4f}" for name, value in settings["base_perplexity"].items()))
    columns = {
        "": "",
        "index": "",
        "bytes": ".0f",
        "probe": "d",
        "k": "d",
        f"{'CPU us' if settings['cpu_time'] else 'us'}/query": ".0f",
        "recall": ".3f",
        "p_kNN error": ".5f",
        **{f"perplexity {name}": ".4f" for name in texts},
        "tuned": ".4f",
        "T": "g",
        "lmbda": "g",
    }
    rows = [
        [
            "*" if one in study.front else "",
            one.index,
            one.bytes_per_entry,
            one.probe,
            one.k,
            median(one.microseconds),
            one.recall,
            one.p_knn_error,
            *(one.perplexity[name] for name in texts),
            one.tuned,
            one.knn_temp,
            one.lmbda,
        ]
        for one in sorted(study.measured, key=lambda one: median(one.microseconds)) + study.exact
    ]
    note = "tuned: over all texts, at the best temperature T and lmbda; * no other is as fast with a lower one"
    print_table("", columns, rows, [note])
