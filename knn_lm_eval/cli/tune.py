"""Find the best k, temperature and lmbda (and probe, min_knns, max_knns), from one pass over a validation text."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_lm_eval.cli.arguments import (
    add_model_arguments,
    add_output,
    add_task_arguments,
    check_outputs,
    read_metadata,
    read_model_args,
    task_names,
)
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

if TYPE_CHECKING:
    from knn_lm_eval.study.tuning import Tuning

GRID = "numbers separated by commas, or FIRST:LAST:COUNT (default: %s)"
AXES = ("k", "knn_temp", "lmbda", "probe", "min_knns", "max_knns", "ngram_lmbda")

EXAMPLE = (
    "knn-lm-eval tune --model_args datastore=stores/law --tasks law_valid --metadata data_dir=data --output tuned.json"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser)
    add_task_arguments(parser, "perplexity tasks on a validation split, separated by commas")
    add_output(parser, "the params file (.json); CSV and plots beside it")
    parser.add_argument("--k", help="numbers separated by commas (default: 16,64,256,1024 as far as the store has)")
    parser.add_argument("--knn_temp", help=GRID % "0.25:256:21, a constant factor apart")
    parser.add_argument("--lmbda", help=GRID % "0.02:0.98:25, evenly spaced")
    parser.add_argument("--probe", help="a search for each (default: the index's own)")
    parser.add_argument("--min_knns", help="with retomaton=True in --model_args")
    parser.add_argument("--max_knns", help="with retomaton=True in --model_args")
    parser.add_argument("--ngram_lmbda", help="weights of n-grams (default: without), such as 0:0.5:11")
    parser.add_argument(
        "--adaptive",
        choices=["none", "buckets", "gate"],
        default="none",
        help="an lmbda per token: by nearest distance, or by a small network over LM and neighbours",
    )
    parser.add_argument(
        "--saved_searches",
        type=float,
        default=0.0,
        help="the fraction of searches to do without: by a gate's threshold, or by RetoMaton's min_knns",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --adaptive (default: %(default)s)")
    parser.add_argument("--save_default", action="store_true", help="keep the result in the datastore, for all to use")
    parser.add_argument("--allow_test", action="store_true", help="tune on a test split all the same")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    if arguments.output.suffix != ".json":
        raise UserError(f"--output {arguments.output} should end in .json; CSV and plots are written beside it.")
    check_outputs(arguments.output)
    axes = {name: axis for name in AXES if (axis := getattr(arguments, name)) is not None}
    model_args = read_model_args(arguments)
    if arguments.save_default:
        check_one_store(model_args)

    from knn_lm_eval.system.files import held_output

    with held_output(arguments.output):
        from knn_lm_eval.study.tuning import tune

        found = tune(
            model_args,
            task_names(arguments),
            adaptive=arguments.adaptive,
            saved_searches=arguments.saved_searches,
            seed=arguments.seed,
            metadata=read_metadata(arguments),
            limit=arguments.limit,
            allow_test=arguments.allow_test,
            **axes,
        )
        write(found, arguments)
    print_results(found)
    print(f"Wrote {arguments.output}: use it with params={arguments.output} in --model_args.")
    if arguments.save_default:
        print(f"The datastore {found.datastore.label} has it as its default.")
    if edges := found.edges():
        logging.warning(
            "The best setting lies on the grid's edge, and a better one may lie beyond: widen %s.",
            ", ".join(f"--{name} ({value:g})" for name, value in edges.items()),
        )


def check_one_store(model_args: dict[str, Any]) -> None:
    """Raise UserError where there are several datastores, none of which can keep what is tuned for all."""
    from knn_lm_eval.store.choosing import list_stores

    if len(paths := list_stores(model_args.get("datastore"))) > 1:
        raise UserError(
            f"--save_default keeps the result in the datastore, and there are {len(paths)}: leave it out, and give "
            f"params=FILE where they are used together."
        )


def write(found: Tuning, arguments: argparse.Namespace) -> None:
    """Write the params file, the whole grid, and the plots."""
    import numpy as np

    from knn_lm_eval.model.params import STORE_DEFAULT
    from knn_lm_eval.report.plots import draw_grid
    from knn_lm_eval.system.files import disk_errors_in
    from knn_lm_eval.system.locks import locked

    surface = found.best.surface
    axes = {"knn_temp": surface.knn_temp, "k": surface.k, "lmbda": surface.lmbda}
    perplexities = np.exp(-surface.log_prob / found.tokens)
    with disk_errors_in(arguments.output.parent):
        found.params.write(arguments.output)  # first, for all else can be drawn anew
        found.write_grid(arguments.output.with_suffix(".csv"))
        draw_grid(arguments.output, arguments.tasks, perplexities, axes, found.best.place)
    if arguments.save_default:
        default = Path(found.datastore.label) / STORE_DEFAULT
        with disk_errors_in(default.parent), locked(default.with_name(f".{default.name}.lock"), str(default)):
            found.params.write(default)


def print_results(found: Tuning) -> None:
    """A table of the LM alone, the papers' defaults and the best setting, and what the grid cost."""
    from knn_lm_eval.report.tables import print_table

    rows, fit = found.summary(), found.fit
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name in ("token_perplexity", "saved_searches"))
    print_table("", {name: shown if name else "" for name in columns}, rows)
    if fit is not None and fit.tokens < found.tokens:
        print(
            f"({fit.lmbda.plain()['kind']}: on a sample of {fit.tokens:,} tokens, on which the best constant has "
            f"{math.exp(-fit.constant_log_prob):.4f})"
        )
    seconds = found.seconds
    once = [stage for stage in ("forward", "head", "search", "walk", "ngrams") if stage in seconds]
    count = sum(surface.log_prob.size for surface in found.surfaces)
    print(
        f"{found.tokens:,} tokens, {count:,} settings: {seconds['grid']:.1f} s for the grid, "
        f"{sum(seconds[stage] for stage in once):.1f} s for all else "
        f"({', '.join(f'{stage} {seconds[stage]:.1f}' for stage in once)})"
    )


def shown(value: Any) -> str:
    """Whole numbers as they are, others to four digits."""
    return f"{value:.4f}" if isinstance(value, float) and value % 1 else f"{value}"
