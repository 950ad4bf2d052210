"""Cluster a datastore's entries for RetoMaton: k-means, greedy merging, or a published members file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from knn_lm_eval.cli.arguments import add_datastore, add_memory, check_options
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import counted

# Which arguments go with which method; the functions know the defaults.
OPTIONS = {
    "kmeans": ("num_clusters", "sample", "iterations", "seed", "index", "resume", "memory"),
    "greedy_merge": ("k", "index", "probe", "resume", "memory"),
    "import": ("memory",),
}

EXAMPLE = "knn-lm-eval cluster_datastore --datastore stores/law --method kmeans"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE, argument_default=argparse.SUPPRESS)
    add_datastore(parser)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--method",
        choices=["kmeans", "greedy_merge"],
        help="k-means of the keys, or merging near neighbours of the same value",
    )
    way.add_argument("--members", type=Path, help="take over a published members*.pkl (a pickled scipy sparse matrix)")
    parser.add_argument("--name", help="the clusters' name, to have several (default: the method's)")
    parser.add_argument("--num_clusters", type=int, help="k-means: how many (default: 1/100 of the entries)")
    parser.add_argument(
        "--sample", type=int, help="k-means: keys to train on, held in memory (default: 64 per cluster)"
    )
    parser.add_argument("--iterations", type=int, help="k-means: how many (default: 20)")
    parser.add_argument("--seed", type=int, help="k-means: of the sample and the first centroids (default: 1)")
    parser.add_argument("--k", type=int, help="greedy_merge: neighbours that an entry may absorb (default: 9)")
    parser.add_argument(
        "--index",
        help="greedy_merge: the index to search for them (default: index); kmeans: the index whose codes stand for the "
        "keys (default: the keys themselves or, of a datastore without keys, its index)",
    )
    parser.add_argument(
        "--probe", type=int, help="greedy_merge: inverted lists visited per search (default: the index's)"
    )
    add_memory(
        parser,
        "kmeans, with its sample of keys, or greedy_merge, with its index, or members, which are read whole,",
        "what it takes",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted clustering")
    parser.add_argument("--overwrite", action="store_true", help="replace the clusters of that name")
    return parser.parse_args()


@verb(parse_arguments, "INFO", kept=WITH_RESUME)
def main(arguments: argparse.Namespace) -> None:
    settings = vars(arguments)
    verify = settings.pop("verify")
    logging.getLogger("faiss").setLevel(logging.WARNING)
    method = settings.pop("method", "import")
    check_options(method, settings.keys() - {"datastore", "members", "name", "overwrite"}, OPTIONS[method])

    from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
    from knn_lm_eval.make.members import import_members
    from knn_lm_eval.store.fetching import open_datastore

    datastore = open_datastore(settings.pop("datastore"), verify)
    settings.setdefault("name", method)
    if method == "import":
        clusters = import_members(datastore, pickle_file=settings.pop("members"), **settings)
    else:
        clusters = (cluster_kmeans if method == "kmeans" else cluster_greedy_merge)(datastore, **settings)
    summary = clusters.metadata["summary"]
    members = counted(len(clusters.members), "entry", "entries")
    print(f"{clusters.path}: {counted(len(clusters), 'cluster')} of {members}")
    if len(clusters.members):
        print(
            f"sizes: mean {summary['mean']:,}, median {summary['median']:,.0f}, largest {summary['max']:,}; "
            f"{summary['singletons']:.1%} have one entry, {summary['empty']:,} none\n"
            f"{summary['purity']:.1%} of the entries have their cluster's most common value"
        )
