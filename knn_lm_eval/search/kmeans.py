"""K-means of keys: in two levels for many centroids."""

from __future__ import annotations

import math

import faiss
import numpy as np
from tqdm import tqdm


def two_level_kmeans(vectors: np.ndarray, count: int, seed: int, spherical: bool = False) -> np.ndarray:
    """About sqrt(count) clusters of the vectors, each cut into a number of clusters that its size earns it.

    (faiss.contrib.clustering has the like, but stops where a cluster is too small to be cut.)

    Parameters
    ----------
    vectors : float32 ``[n, dimension]``, at least ``count`` of them.

    Returns
    -------
    float32 ``[count, dimension]``, the centroids.
    """
    settings = {"seed": seed, "spherical": spherical, "min_points_per_centroid": 1}
    coarse = faiss.Kmeans(vectors.shape[1], round(math.sqrt(count)), max_points_per_centroid=1024, **settings)
    coarse.train(vectors)
    cluster = coarse.assign(vectors)[1]
    sizes = np.bincount(cluster, minlength=coarse.k)
    # Each gets the floor of its share, at least one if it has members; what that leaves or owes, the largest bear.
    shares = np.maximum(sizes * count // len(vectors), sizes > 0)
    while (left := count - shares.sum()) != 0:
        room = sizes - shares if left > 0 else shares - 1
        largest = np.argsort(-sizes, kind="stable")
        largest = largest[room[largest] > 0][: abs(left)]
        shares[largest] += np.sign(left)
    order, ends = np.argsort(cluster, kind="stable"), np.cumsum(sizes)
    centroids = []
    for number in tqdm(np.flatnonzero(shares), desc="K-means within clusters", unit=" clusters"):
        fine = faiss.Kmeans(vectors.shape[1], int(shares[number]), **settings)
        fine.train(vectors[order[ends[number] - sizes[number] : ends[number]]])
        centroids.append(np.asarray(fine.centroids))
    return np.concatenate(centroids)
