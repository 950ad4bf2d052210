"""Make a datastore of narrower keys of an existing one: a projection to the directions in which its keys vary most."""

from __future__ import annotations

import argparse

from knn_lm_eval.cli.arguments import add_datastore, add_output, check_at_least_one
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser

EXAMPLE = "knn-lm-eval project_datastore --datastore stores/law --keys 128 --output stores/law-128"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_datastore(parser, "; it stays as it is")
    add_output(parser, "the new datastore's folder")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--keys", type=int, help="how many numbers a key keeps, such as 128")
    how.add_argument(
        "--projection_of",
        metavar="DATASTORE",
        help="instead, a datastore whose projection is taken, so that both can be grown into one",
    )
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "keys")

    from knn_lm_eval.make.projecting import project_datastore
    from knn_lm_eval.store.fetching import open_datastore

    keys = arguments.keys or open_datastore(arguments.projection_of, arguments.verify)
    store = project_datastore(open_datastore(arguments.datastore, arguments.verify), arguments.output, keys)
    record = store.manifest.projection
    share = f", which keep {record['variance_kept']:.1%} of the variance" if record and arguments.keys else ""
    print(
        f"{store.path}: {len(store):,} entries of {store.dimension} numbers{share}. "
        f"Next: build_index --datastore {store.path}"
    )
