"""Analyse token records: which tokens retrieval helped and hurt, by how much, and what they have in common."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from knn_lm_eval.cli.arguments import add_output, check_at_least_one, check_outputs
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

EXAMPLE = "knn-lm-eval analyse records/knn records/retomaton --html what.html --output what.json"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument(
        "records", type=Path, nargs="+", help="folders that evaluations with records=FOLDER wrote, one for each method"
    )
    parser.add_argument("--datastore", type=Path, help="the store's folder (default: where it was)")
    parser.add_argument("--tokenizer", help="what decodes the examples (default: the one that the records name)")
    parser.add_argument(
        "--examples", type=int, default=2, help="tokens shown of each cell, helped and hurt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=2000, help="draws for intervals (default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    add_output(parser, "write all figures and examples to this JSON file", required=False)
    parser.add_argument("--html", type=Path, help="write a page with tables, charts and examples to this file")
    parser.add_argument("--title", default="What retrieval brought, token by token", help="of the page")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "resamples")
    if arguments.examples < 0:
        raise UserError(f"--examples {arguments.examples} must be at least 0.")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} must be at least 0.")
    if not 0 < arguments.confidence < 1:
        raise UserError(f"--confidence {arguments.confidence} must be between 0 and 1.")
    check_outputs(arguments.output, arguments.html)

    from knn_lm_eval.report.analysis_page import analysis_page
    from knn_lm_eval.report.analysis_tables import analysis_tables
    from knn_lm_eval.report.tables import print_tables
    from knn_lm_eval.report.token_analysis import Draws
    from knn_lm_eval.study.analysis import analyse
    from knn_lm_eval.system.files import check_writable, write_text

    for path in filter(None, (arguments.output, arguments.html)):
        check_writable(path)
    draws = Draws(arguments.resamples, arguments.confidence, arguments.seed)
    analysis = analyse(arguments.records, arguments.datastore, arguments.tokenizer, arguments.examples, draws)
    print_tables(analysis_tables(analysis))
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(analysis, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        print(f"Wrote {arguments.output}.")
    if arguments.html is not None:
        write_text(arguments.html, analysis_page(analysis, arguments.title))
        print(f"Wrote {arguments.html}.")
