"""Import a datastore of knn-transformers, knnlm-limits, fairseq kNN-LM, retomaton or efficient-knnlm."""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_lm_eval.cli.arguments import add_key_arguments, add_memory, add_output
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser

EXAMPLE = (
    "knn-lm-eval import_datastore checkpoints/gpt2 --output stores/gpt2 --pretrained neulab/gpt2-finetuned-wikitext103"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("sources", type=Path, nargs="+", help="the folder that holds the published files, or the files")
    add_output(parser, "the datastore's folder to make")
    parser.add_argument(
        "--layout",
        choices=["knn-transformers", "knnlm-limits", "fairseq", "efficient-knnlm"],
        help="which program's files they are (default: told from their names)",
    )
    parser.add_argument("--count", type=int, help="the number of entries, where the names do not say it")
    parser.add_argument("--dimension", type=int, help="the width of a key, where the names do not say it")
    parser.add_argument("--copy", action="store_true", help="copy keys and index instead of linking to them")
    parser.add_argument("--pretrained", help="the model that made the datastore, to check and to record")
    add_key_arguments(
        parser,
        "what the keys are (default: last_ffn_input, as published)",
        "the model's submodule whose input is the key, as for dump_datastore",
    )
    parser.add_argument(
        "--document_starts",
        type=Path,
        help="a .npy file of the entries at which documents begin (default: one stream)",
    )
    add_memory(parser, "clusters (members*.pkl), which are read whole, or the opened index")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    settings = vars(arguments)

    from knn_lm_eval.make.importing import import_datastore
    from knn_lm_eval.store.clusters import cluster_names
    from knn_lm_eval.store.index_files import index_names

    store = import_datastore(
        settings.pop("sources"), settings.pop("output"), key_type=settings.pop("knn_keytype"), **settings
    )
    has = ["keys" if store.keys is not None else "no keys"]
    has += ["weights"] if store.weights is not None else []
    has += [f"the index {name}" for name in index_names(store)] or ["no index (build_index makes one)"]
    has += [f"the clusters {name}" for name in cluster_names(store)]
    print(f"{store.path}: {len(store):,} entries of {store.dimension} numbers, with {', '.join(has)}")
    if index_names(store):
        print("How well the index retrieves was not measured: compare several probe, knn_temp and lmbda.")
    if store.manifest.fingerprint is None:
        print("No model's fingerprint is recorded: knn-hf can compare dimension and vocabulary only.")
