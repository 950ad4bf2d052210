"""Take removed documents out of a datastore's files: its arrays, indexes and clusters."""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import counted

EXAMPLE = "knn-lm-eval compact_datastore --datastore stores/law"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("--datastore", type=Path, required=True, help="the datastore's folder")
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    from knn_lm_eval.make.compacting import compact_datastore
    from knn_lm_eval.store.datastore import Datastore

    before = Datastore.open(arguments.datastore)
    store = compact_datastore(arguments.datastore)
    removed = before.removed
    if removed is None:
        print(f"{store.path}: no document is removed; there is nothing to take out.")
    else:
        gone, left = (counted(number, "entry", "entries") for number in (len(removed), len(store)))
        print(
            f"{store.path}: taken out: {counted(len(removed.documents), 'document')} with {gone}; it has {left} of "
            f"{counted(len(store.document_starts), 'document')}."
        )
