"""Verify every file of a datastore, its indexes and clusters against their checksums."""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser

EXAMPLE = "knn-lm-eval verify_datastore stores/law"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("datastore", type=Path, help="the datastore's folder")
    parser.add_argument(
        "--verify",
        default="always",
        choices=["always", "auto"],
        help="always reads all files, auto those that were not verified before or changed since (default: always)",
    )
    return parser.parse_args()


@verb(parse_arguments, kept="nothing was changed; start again.")
def main(arguments: argparse.Namespace) -> None:
    from knn_lm_eval.store.whole_store import verify_store

    verdicts = verify_store(arguments.datastore, read_all=arguments.verify == "always")
    wrong = [verdict for verdict in verdicts if verdict.fault is not None]
    width = max(len(verdict.name) for verdict in verdicts)
    for verdict in verdicts:
        size = "" if verdict.bytes is None else f"{verdict.bytes:,}"
        result = "ok" if verdict.fault is None else "WRONG"
        print(f"{verdict.name:{width}}  {size:>15}  {verdict.how:22}  {result}")
    if wrong:
        print()
        for verdict in wrong:
            print(verdict.fault)
        raise SystemExit(1)
    print(f"\n{arguments.datastore}: {len(verdicts)} files are as they should be.")
