"""Draw perplexity against the datastore's size, from one forward pass per text."""

from __future__ import annotations

import argparse

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

COLUMNS = {"entries": ",", "token_perplexity": ".4f", "mean_neighbours": ".1f"}

EXAMPLE = (
    "knn-lm-eval store_sizes --model_args datastore=stores/law --tasks law --metadata data_dir=data "
    "--limit 20 --output sizes"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser, "as for lm_eval --model knn-hf: datastore=D,lmbda=0.25,...")
    add_task_arguments(parser)
    parser.add_argument("--fractions", default="0.01,0.03,0.1,0.3,1", help="parts of the store (default: %(default)s)")
    parser.add_argument(
        "--searched",
        type=int,
        help="neighbours that the first search finds; where a part has fewer than k, wider ones follow (default: 4 k)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of entries (default: %(default)s)")
    add_output(parser, "the folder for a JSON file per task")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    fractions = parse_numbers("--fractions", arguments.fractions)
    check_outputs(*(arguments.output / f"{task}.json" for task in task_names(arguments)))
    model_args = read_model_args(arguments)

    from knn_lm_eval.report.tables import print_table
    from knn_lm_eval.study.store_sizes import store_sizes
    from knn_lm_eval.system.files import disk_errors_in, held_output, write_json

    with held_output(arguments.output, is_folder=True):
        studies = store_sizes(
            model_args,
            task_names(arguments),
            fractions=fractions,
            searched=arguments.searched,
            seed=arguments.seed,
            metadata=read_metadata(arguments),
            limit=arguments.limit,
        )
        for sizes in studies:
            task, rows = sizes.task, [point.row() for point in sizes.points]
            content = {"task": task, "settings": sizes.settings, "store_sizes": rows}
            with disk_errors_in(arguments.output):
                write_json(arguments.output / f"{task}.json", content)
            print_table(task, COLUMNS, rows)
