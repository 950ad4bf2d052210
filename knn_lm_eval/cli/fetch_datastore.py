"""Fetch a datastore from an https address or the Hugging Face hub, or the files of one to import."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

from knn_lm_eval.cli.arguments import add_output
from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError, counted

EXAMPLE = "knn-lm-eval fetch_datastore hf://datasets/USER/NAME"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument(
        "addresses",
        nargs="+",
        metavar="address",
        help="the folder of a datastore (https://... or hf://datasets/USER/NAME[/FOLDER]), or each of the files that "
        "another program published",
    )
    add_output(parser, "the folder (default: in the cache, $KNN_LM_EVAL_CACHE)", required=False)
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:

    from knn_lm_eval.store.datastore import Datastore
    from knn_lm_eval.store.fetching import PUBLISHED_SUFFIXES, fetch_datastore, fetch_files, is_address

    addresses = arguments.addresses
    for address in addresses:
        if not is_address(address):
            raise UserError(f"{address} is no address; give https://... or hf://datasets/...")
    if all(urlsplit(address).path.endswith(PUBLISHED_SUFFIXES) for address in addresses):
        folder = fetch_files(addresses, arguments.output)
        print(f"{folder}: {counted(len(addresses), 'file')}. Next: import_datastore {folder} --output STORE")
        return
    if len(addresses) > 1:
        raise UserError("Several addresses should each be a file; give one datastore's folder at a time.")
    store = Datastore.open(fetch_datastore(addresses[0], arguments.output, repair=True))
    print(f"{store.path}: {len(store):,} entries of {store.dimension} numbers")
