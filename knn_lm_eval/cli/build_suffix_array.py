"""Build the suffix array of a datastore's text, in which n-grams and overlaps are looked up."""

from __future__ import annotations

import argparse

from knn_lm_eval.cli.arguments import add_datastore, add_memory
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.cli.parsing import VerbParser

EXAMPLE = "knn-lm-eval build_suffix_array --datastore stores/law"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_datastore(parser)
    add_memory(parser, "sorting, which takes 12 bytes a token of a part,")
    parser.add_argument("--resume", action="store_true", help="go on with what was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="replace the suffix array that is there")
    return parser.parse_args()


@verb(parse_arguments, "INFO", kept=WITH_RESUME)
def main(arguments: argparse.Namespace) -> None:
    from knn_lm_eval.make.suffix_building import build_suffix_array
    from knn_lm_eval.store.fetching import open_datastore
    from knn_lm_eval.store.suffixes import FOLDER

    datastore = open_datastore(arguments.datastore, arguments.verify)
    ngrams = build_suffix_array(datastore, arguments.memory, arguments.resume, arguments.overwrite)
    parts = f" in {len(ngrams.parts)} parts" if len(ngrams.parts) > 1 else ""
    print(f"{datastore.path / FOLDER}: {len(ngrams):,} suffixes{parts}")
