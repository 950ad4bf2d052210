"""Remove documents from a datastore (opt-out): no search finds them from now on."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.cli.arguments import check_text, read_model_args
from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError, counted

if TYPE_CHECKING:
    import numpy as np

    from knn_lm_eval.store.datastore import Datastore

EXAMPLE = "knn-lm-eval remove_documents --datastore stores/law --documents 3,17-20"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(
        __doc__,
        EXAMPLE,
        epilog="Their entries stay in the files, and searches leave them out, until compact_datastore takes them out.",
    )
    parser.add_argument("--datastore", type=Path, required=True, help="the datastore's folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--documents", help="their numbers, from 0 in the order of the text, such as 3,17-20 (20 is removed as well)"
    )
    which.add_argument(
        "--text", type=Path, help="a UTF-8 text file, cut into documents as the store's text was: those equal to one"
    )
    parser.add_argument(
        "--model_args",
        default="",
        help="with --text, whose tokens its own LM's tokenizer tells: what counts in the place of what the datastore "
        "records of that LM, such as pretrained=FOLDER",
    )
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    check_text(arguments)

    from knn_lm_eval.make.removing import remove_documents
    from knn_lm_eval.store.datastore import Datastore

    store = Datastore.open(arguments.datastore)
    if arguments.documents is None:
        numbers = documents_of_text(store, arguments)
    else:
        numbers = parse_ranges(arguments.documents, len(store.document_starts))
    report(remove_documents(arguments.datastore, numbers))


def documents_of_text(store: Datastore, arguments: argparse.Namespace) -> np.ndarray:
    """The numbers of the documents that are equal to one of the text."""
    from functools import partial

    from knn_lm_eval.make import removing
    from knn_lm_eval.make.store_lm import load_store_lm

    load_lm = partial(load_store_lm, store.manifest, **read_model_args(arguments))
    with tempfile.TemporaryDirectory(prefix="knn_lm_eval-") as folder:
        found = removing.documents_of_text(store, arguments.text, load_lm, Path(folder))
    if not len(found.documents):
        raise UserError(f"The datastore {store.path} has none of the documents of {arguments.text} ({found.wanted:,}).")
    if found.missing:
        print(f"Not in {store.path}: {found.missing:,} of {counted(found.wanted, 'document')} of {arguments.text}.")
    return found.documents


def parse_ranges(text: str, count: int) -> np.ndarray:
    """The numbers in ``3,17-20``, of ``count`` documents."""
    import numpy as np

    ranges = []
    for part in text.replace(" ", "").split(","):
        if not (match := re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)):
            raise UserError(f"--documents {text} should be numbers and ranges separated by commas, such as 3,17-20.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UserError(f"--documents {part} is no range: it should go from a smaller number to a larger one.")
        if last >= count:
            raise UserError(f"--documents {part} goes beyond the last document of the store, {count - 1:,}.")
        ranges.append(np.arange(first, last + 1))
    return np.concatenate(ranges)


def report(store: Datastore) -> None:
    removed = store.removed
    documents, entries = (0, 0) if removed is None else (len(removed.documents), len(removed))
    print(
        f"{store.path}: removed: {counted(documents, 'document')} with {entries:,} of "
        f"{counted(len(store), 'entry', 'entries')}, which no search finds. The text is still in the files: "
        f"knn-lm-eval compact_datastore --datastore {store.path} takes it out."
    )
