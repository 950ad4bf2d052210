"""Build a faiss index over a datastore's keys, and measure how well it serves kNN-LM."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from knn_lm_eval.cli.arguments import add_datastore, add_memory
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.cli.parsing import VerbParser

EXAMPLE = "knn-lm-eval build_index --datastore stores/law"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_datastore(parser)
    parser.add_argument(
        "--factory",
        default="auto",
        help="a faiss factory string, such as IVF4096,PQ64 (the kNN-LM papers') or Flat (exact); auto chooses by "
        "the number of entries and the budget (default)",
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        default=[],
        metavar="LIMIT",
        help="for auto, the index's bytes per entry (such as 64); and how much slower than the LM alone kNN-LM may be "
        "(such as 1.1x, which loads the datastore's LM and measures it): decides the probe that is used by default",
    )
    parser.add_argument(
        "--for",
        dest="hardware",
        default="cpu",
        choices=["cpu", "gpu"],
        help="what the index will be searched on: for a GPU, auto chooses among what faiss-gpu can hold there "
        "(default: cpu)",
    )
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB", help="with --for gpu, the GPU's memory (default: what is free here)"
    )
    parser.add_argument("--sim_func", default="l2", choices=["l2", "dot"], help="what near means (default: l2)")
    parser.add_argument("--name", default="index", help="the index's name, to have several (default: index)")
    parser.add_argument("--train_sample", type=int, help="keys to train on (default: 64 per inverted list)")
    parser.add_argument(
        "--quality_queries",
        type=int,
        default=4096,
        help="held-out queries to choose the probe by (default: 4096); 512 of them are compared with exact search",
    )
    parser.add_argument("--k", type=int, default=1024, help="neighbours for the measurement (default: 1024)")
    parser.add_argument("--knn_temp", type=float, default=1.0, help="temperature for the measurement (default: 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", type=int, help="make so many files of the index, each of a run of entries")
    add_memory(parser, "the build")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="build the parts' segments side by side on a Ray cluster: HOST:PORT, or auto for the one that runs here "
        "(none: one is started); its nodes must see the datastore's folder",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted build")
    parser.add_argument("--overwrite", action="store_true", help="replace the index of that name")
    return parser.parse_args()


@verb(parse_arguments, "INFO", kept=WITH_RESUME)
def main(arguments: argparse.Namespace) -> None:
    logging.getLogger("faiss").setLevel(logging.WARNING)

    from knn_lm_eval.search.choosing import Budget
    from knn_lm_eval.search.indexing import build_index
    from knn_lm_eval.store.fetching import open_datastore

    settings = vars(arguments)
    verify = settings.pop("verify")
    settings["budget"] = Budget.parse(arguments.budget)
    if arguments.gpu_memory is not None:
        settings["gpu_memory"] = arguments.gpu_memory * 2**30
    if settings["budget"].slowdown is not None:
        from knn_lm_eval.make.lm_speed import lm_microseconds

        settings["lm_microseconds"] = lm_microseconds
    metadata = build_index(open_datastore(settings.pop("datastore"), verify), **settings)
    print_index(metadata)


def print_index(metadata: dict[str, Any]) -> None:
    """Print what an index is, and how good, where that was measured."""
    print(
        f"{metadata['factory']}: {metadata['count']:,} entries, {metadata['bytes'] / metadata['count']:.0f} bytes each"
    )
    if metadata.get("quality"):
        print_quality(metadata)


def print_quality(metadata: dict[str, Any]) -> None:
    """Print how the index compares with exact search, probe by probe, and which probe is used by default."""
    from knn_lm_eval.report.tables import print_table

    columns = {"": "", "probe": ">", "recall": ".3f", "error of p_kNN": ".5f", "mean p_kNN": ".5f", "us/query": ".0f"}
    with_costs = "perplexity_cost" in metadata["quality"][0]
    if with_costs:
        columns |= {"cost": ".2%", "at most": ".2%"}
    rows = [
        (
            "*" if row["probe"] == metadata["probe"] else "",
            row["probe"] or "-",
            row["recall"],
            row["p_knn_error"],
            row["p_knn"],
            row["microseconds"],
            *([row["perplexity_cost"], row["perplexity_cost_bound"]] if with_costs else []),
        )
        for row in metadata["quality"]
    ]
    notes = []
    if metadata["probe"] and with_costs:
        used = next(row for row in metadata["quality"] if row["probe"] == metadata["probe"])
        notes = [
            f"* used by default (probe={used['probe']}): expected to cost {used['perplexity_cost']:.2%} of perplexity "
            f"beside probe={metadata['quality'][-1]['probe']}, with 95 % confidence at most "
            f"{used['perplexity_cost_bound']:.2%} (by {metadata['quality_queries']:,} held-out entries)"
        ]
        if "exact_cost" in used:  # not in what an earlier version measured
            notes.append(
                f"beside exact search: {used['exact_cost']:.2%} of perplexity, with 95 % confidence at most "
                f"{used['exact_cost_bound']:.2%} (by {metadata['quality_exact_queries']} of them)"
            )
        if "slowdown" in metadata:
            notes[0] += f"; larger ones may take more than {metadata['slowdown']:g} times the LM's own time"
    title = f"against exact search, k = {metadata['quality_k']}, temperature {metadata['quality_knn_temp']}:"
    print_table(title, columns, rows, notes)
