"""Publish a datastore on the Hugging Face hub, verified, with a card, for others to fetch."""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import counted

EXAMPLE = "knn-lm-eval push_datastore stores/m-train USER/NAME --license cc-by-sa-4.0 --dry_run"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(f"{__doc__} Log in first: hf auth login, or HF_TOKEN, with a token that may write.", EXAMPLE)
    parser.add_argument("datastore", type=Path, help="the datastore's folder")
    parser.add_argument("repo", metavar="USER/NAME", help="the data set on the hub, which is made where there is none")
    parser.add_argument(
        "--license",
        required=True,
        help="the hub's name of the licence under which you may give it away, such as cc-by-sa-4.0: the text's counts, "
        "of which the store holds every token, and the model's",
    )
    parser.add_argument("--model", help="the model's id on the hub, for the card (default: what the manifest says)")
    parser.add_argument("--private", action="store_true", help="for you, or your organisation, alone")
    parser.add_argument("--revision", help="the branch, which is made where there is none (default: main)")
    parser.add_argument(
        "--verify",
        default="always",
        choices=["always", "auto"],
        help="always reads all files, auto those that were not verified before or changed since (default: always)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="verify it, and print the card and the files; nothing is pushed"
    )
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    from knn_lm_eval.store.publishing import check_login, prepare_push, push

    if not arguments.dry_run:
        check_login()  # before all files are read
    package = prepare_push(
        arguments.datastore,
        arguments.repo,
        arguments.license,
        model=arguments.model,
        revision=arguments.revision,
        read_all=arguments.verify == "always",
    )
    sizes = package.sizes
    files = f"{counted(len(sizes), 'file')} of {sum(sizes.values()):,} bytes"
    if arguments.dry_run:
        print(package.card)
        width = max(map(len, sizes))
        for name, size in sizes.items():
            print(f"{name:{width}}  {size:>15,}")
        print(f"\n{package.address} would have {files}; nothing was pushed.")
        return
    push(package, arguments.private)
    print(f"{package.address}: {files}. Use it with datastore={package.address}")
