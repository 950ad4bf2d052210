"""Whether what was made of a large store names the entries that it should, wherever in the store they lie.

    python tests/helpers/large_check.py STORE [--index index] [--clusters kmeans] [--entries 300]

Entries are drawn at random, half of them from the last thousandth of the store. What searches, laid-out codes and
clusters say of each is compared with what the plain arrays on disk say.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore

TOLERANCE = 1e-3  # relative, of float32 distances computed in another order
K = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--index", default="index")
    parser.add_argument("--clusters")
    parser.add_argument("--entries", type=int, default=300)
    arguments = parser.parse_args()
    store = Datastore.open(arguments.store, verify="never")
    rng, count = np.random.default_rng(7), len(store)
    half = arguments.entries // 2
    chosen = np.concatenate([rng.integers(0, count, half), rng.integers(count - max(1, count // 1000), count, half)])
    chosen = np.unique(np.append(chosen, count - 1))
    print(f"{len(chosen)} of {count:,} entries, from {chosen[0]:,} to {chosen[-1]:,}")
    check_search(store, arguments.index, chosen)
    if arguments.clusters:
        check_clusters(store, arguments.clusters, chosen)


def check_search(store: Datastore, index: str, chosen: np.ndarray) -> None:
    """Neighbours are entries with the values that they are said to have, in the order of their true distances, nearly;
    pointers' distances are those that the search found."""
    queries = store.require_keys("checking")[chosen].astype(np.float32)  # [n, dimension]
    retriever = LocalRetriever(store, min(K, len(store)), index=index)
    exact = retriever.with_settings(recompute_dists=True)
    distances, entries = retriever.find(queries)  # [n, k]
    found = entries >= 0
    assert found[:, 0].all() and entries.max() < len(store)
    print(f"searched: the largest entry found is {entries.max():,}; {np.mean(entries[found] >= 2**31):.2f} are >= 2^31")
    true = exact.find(queries[:8])
    for row in range(8):
        there = true[1][row] >= 0  # the lists that were visited may have fewer
        keys = store.require_keys("checking")[true[1][row][there]].astype(np.float64)
        expected = ((queries[row].astype(np.float64) - keys) ** 2).sum(1)
        np.testing.assert_allclose(true[0][row][there], expected, rtol=TOLERANCE, atol=TOLERANCE)
    closest = np.linspace(0, len(store) - 1, 10_000).astype(np.int64)
    usual = np.median(((store.require_keys("checking")[closest].astype(np.float32) - queries[0]) ** 2).sum(1))
    assert np.median(true[0][0][true[1][0] >= 0]) < usual / 2, "neighbours are no nearer than any entries"
    with_codes, distance_to = retriever.with_distances()
    counts = found.sum(1)
    again = distance_to(queries, np.where(found, entries, 0), counts)
    apart = np.abs(again - distances)[found] / np.abs(distances[found]).max()
    print(f"pointers' distances beside the search's: {apart.mean():.1e} of the largest off, at most {apart.max():.1e}")
    assert apart.mean() < 0.02, apart.mean()  # the search rounds queries, to 8 bits
    assert (with_codes.values[entries[found]] == store.values[entries[found]]).all()


def check_clusters(store: Datastore, name: str, chosen: np.ndarray) -> None:
    """Each entry is a member of its cluster, whose members are entries of that cluster, ascending."""
    clusters = Clusters.open(store, name)
    starts, members = clusters.member_starts, clusters.members
    assert starts[0] == 0 and starts[-1] == len(members) == len(store)
    for entry in chosen:
        cluster = int(clusters.cluster_of_entry[entry])
        of_cluster = members[starts[cluster] : starts[cluster + 1]]
        place = np.searchsorted(of_cluster, entry)
        assert of_cluster[place] == entry, f"entry {entry} is no member of its cluster {cluster}"
        some = of_cluster[:: max(1, len(of_cluster) // 1000)]
        assert (np.diff(some) > 0).all() and (clusters.cluster_of_entry[some] == cluster).all()
    print(f"clusters: {len(starts) - 1:,}, members up to {int(members[-1]):,}")


if __name__ == "__main__":
    main()
