"""What a clustering is like: the sizes of its clusters, and how far they are of one value."""

from __future__ import annotations

from collections import Counter

import numpy as np

from knn_lm_eval.compiling import compiled
from knn_lm_eval.store.clusters import Clusters

CHUNK = 2**20  # clusters at a time


def summarize(clusters: Clusters, values: np.ndarray) -> dict[str, float]:
    """Describe a clustering, in memory that does not grow with it.

    Parameters
    ----------
    values : int32 ``[count]``, the store's.

    Returns
    -------
    ``mean``, ``median`` and ``max`` size of the clusters that are not empty, how many are ``empty``, the
    share of those not empty that have one entry (``singletons``), and ``purity``: the share of clustered
    entries whose value is the most common one of their cluster.
    """
    how_many: Counter[int] = Counter()  # clusters, by their size
    common = 0
    for first in range(0, len(clusters), CHUNK):
        starts = np.asarray(clusters.member_starts[first : first + CHUNK + 1])
        sizes, counts = np.unique(np.diff(starts), return_counts=True)
        how_many.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
        common += _most_common_values(np.asarray(values), starts, np.asarray(clusters.members))
    empty = how_many.pop(0, 0)
    if not how_many:
        return {"empty": empty}
    filled, total = sum(how_many.values()), len(clusters.members)
    return {
        "mean": round(total / filled, 2),
        "median": _median(how_many),
        "max": max(how_many),
        "empty": empty,
        "singletons": round(how_many[1] / filled, 4),
        "purity": round(common / total, 4),
    }


def _median(how_many: Counter[int]) -> float:
    """Of sizes, given how often each occurs."""
    count = sum(how_many.values())
    middle: list[int] = []
    seen = 0
    for size in sorted(how_many):
        seen += how_many[size]
        while len(middle) < 2 and seen > (count - 1 + len(middle)) // 2:
            middle.append(size)
    return sum(middle) / 2


@compiled
def _most_common_values(values: np.ndarray, member_starts: np.ndarray, members: np.ndarray) -> int:
    """How many entries have the most common value of their cluster."""
    total = 0
    for cluster in range(len(member_starts) - 1):
        ordered = np.sort(values[members[member_starts[cluster] : member_starts[cluster + 1]]])
        longest = run = 0
        for place in range(len(ordered)):
            run = run + 1 if place > 0 and ordered[place] == ordered[place - 1] else 1
            longest = max(longest, run)
        total += longest
    return total
