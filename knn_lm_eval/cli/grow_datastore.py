"""Make a large datastore for measuring indexes: real datastores, and noisy copies of their entries."""

from __future__ import annotations

import argparse

from knn_lm_eval.cli.arguments import add_output, add_verify, check_at_least_one
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

EXAMPLE = "knn-lm-eval grow_datastore stores/law stores/wiki --entries 10000000 --output stores/large"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("datastores", nargs="+", help="datastores of one model, a domain each, say")
    add_output(parser, "the folder to write")
    add_verify(parser)
    parser.add_argument("--entries", type=int, required=True, help="how many entries to make")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.3,
        help="how much of the difference between two contexts of the same next token is added (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "entries")
    if arguments.noise < 0:
        raise UserError(f"--noise {arguments.noise} must not be negative.")

    from knn_lm_eval.make.growing import grow_datastore
    from knn_lm_eval.store.fetching import open_datastore

    store = grow_datastore(
        [open_datastore(path, arguments.verify) for path in arguments.datastores],
        arguments.output,
        arguments.entries,
        noise=arguments.noise,
        seed=arguments.seed,
    )
    print(f"{store.path}: {len(store):,} entries. Next: build_index --datastore {store.path}")
