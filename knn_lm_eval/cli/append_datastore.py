"""Append documents to a datastore: its LM reads them, and indexes and clusters take in their entries."""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_lm_eval.cli.arguments import (
    TEXT_ARGUMENTS,
    add_text_arguments,
    check_at_least_one,
    check_text,
    read_model_args,
)
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import counted

EXAMPLE = "knn-lm-eval append_datastore --datastore stores/law --text more.txt"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("--datastore", type=Path, required=True, help="the datastore's folder")
    add_text_arguments(parser)
    parser.add_argument("--max_tokens", type=int, help="stop after so many tokens")
    parser.add_argument(
        "--model_args",
        default="",
        help="what counts in the place of what the datastore records of its LM, such as pretrained=FOLDER, dtype=...",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--resume", action="store_true", help="go on with what was interrupted")
    return parser.parse_args()


@verb(parse_arguments, kept=WITH_RESUME)
def main(arguments: argparse.Namespace) -> None:
    check_text(arguments)
    check_at_least_one(arguments, "max_tokens")

    from knn_lm_eval.make.appending import append_documents, worth_training
    from knn_lm_eval.make.store_lm import load_store_lm
    from knn_lm_eval.make.text import TextSource
    from knn_lm_eval.store.manifest import Manifest
    from knn_lm_eval.system.processes import Processes

    source = TextSource(**{name: getattr(arguments, name) for name in TEXT_ARGUMENTS})
    processes = Processes.of_this_launch()
    before = processes.each_does(lambda: Manifest.read(arguments.datastore))
    lm = processes.each_does(lambda: load_store_lm(before, **read_model_args(arguments)))
    store = append_documents(
        arguments.datastore,
        lm,
        source.pieces(),
        max_tokens=arguments.max_tokens,
        resume=arguments.resume,
        source=source.description(),
        processes=processes,
    )
    if processes.rank == 0:
        documents = len(store.document_starts) - (before.documents or 0)
        print(
            f"{store.path}: appended: {counted(len(store) - before.count, 'entry', 'entries')} of "
            f"{counted(documents, 'document')}; it has {len(store):,} of {len(store.document_starts):,}."
        )
        for sentence in worth_training(store):
            print(sentence)
