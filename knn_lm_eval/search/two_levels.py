"""Very many centroids: trained in two levels, and found by looking at those of the nearest few coarse clusters.

To compare each of ``count`` keys with each of ``clusters`` centroids takes days where both are large, and training ten
times that: 10^8 times 10^6 distances of 64 numbers are 10^16 operations. Here the keys fall into about
sqrt(``PROBE * clusters``) coarse clusters, each is cut into centroids of its own, and a key is compared with those of
the ``PROBE`` coarse clusters that are nearest to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.search.faiss_index import faiss_gpus
from knn_lm_eval.search.kmeans import MemoryNeeded, centroids_within, shares_of_cells
from knn_lm_eval.store.key_stream import ADD_CHUNK, KeyRows, finite_keys
from knn_lm_eval.system.checkpoints import SavedStates

PROBE = 8  # coarse clusters whose centroids a key is compared with: about 0.99 of the keys get the nearest of all
COARSE_SAMPLE = 256  # keys to train on, per coarse cluster


@dataclass(frozen=True)
class TwoLevels:
    """Centroids that lie in coarse clusters.

    Attributes
    ----------
    coarse : float32 ``[coarse clusters, dimension]``, the centres of those that have centroids.
    starts : int64 ``[coarse clusters + 1]``: the centroids of cluster c are those from ``starts[c]`` to
        ``starts[c + 1]``.
    centroids : float32 ``[clusters, dimension]``.
    """

    coarse: np.ndarray
    starts: np.ndarray
    centroids: np.ndarray

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """The nearest centroid of each vector (squared L2) among those of its ``PROBE`` nearest coarse clusters.

        All vectors that look into one coarse cluster are compared with it at once, by one product of matrices.

        Parameters
        ----------
        vectors : float32 ``[n, dimension]``.

        Returns
        -------
        int64 ``[n]``.
        """
        probe = min(PROBE, len(self.coarse))
        cells = faiss.knn(vectors, self.coarse, probe)[1].ravel()  # [n * probe]
        order = np.argsort(cells, kind="stable")
        ends = np.searchsorted(cells[order], np.arange(len(self.coarse) + 1))
        distances, found = np.empty(len(cells), dtype=np.float32), np.empty(len(cells), dtype=np.int64)
        for cell in np.flatnonzero(np.diff(ends)):
            looks = order[ends[cell] : ends[cell + 1]]
            centroids = self.centroids[self.starts[cell] : self.starts[cell + 1]]
            # The squared distances, less the vectors' own squared norms, which are the same for all centroids.
            apart = vectors[looks // probe] @ (-2 * centroids.T)  # [looks, centroids]
            apart += np.einsum("ij,ij->i", centroids, centroids)
            best = apart.argmin(axis=1)
            distances[looks], found[looks] = apart[np.arange(len(looks)), best], self.starts[cell] + best
        best = distances.reshape(-1, probe).argmin(axis=1)
        return found.reshape(-1, probe)[np.arange(len(vectors)), best]


def train_two_levels(
    keys: KeyRows, num_clusters: int, sample: int, iterations: int, seed: int, states: SavedStates
) -> TwoLevels:
    """K-means in two levels of a sample of the keys, which is spread evenly over the store and held in their dtype.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    sample : keys to train on; ``num_clusters <= sample <= count``.
    iterations : of each k-means.
    seed : of the sample and the first centroids.
    states : where the states ``coarse`` and ``centroids`` are saved, and are gone on with.

    Raises
    ------
    UserError
        Where a key holds NaN or infinity.
    """
    saved = states.load("centroids")
    if saved and len(saved["centroids"]) == num_clusters:
        return TwoLevels(saved["coarse"], saved["starts"], saved["centroids"])
    vectors = spread_sample(keys, sample, seed)
    coarse, cells = _coarse_clusters(vectors, num_clusters, iterations, seed, states)
    sizes = np.bincount(cells, minlength=len(coarse))
    shares = shares_of_cells(sizes, num_clusters)
    order, ends = np.argsort(cells, kind="stable"), np.cumsum(sizes)
    starts = np.concatenate([[0], np.cumsum(shares)])
    centroids = np.empty((num_clusters, keys.shape[1]), dtype=np.float32)
    done = 0
    if saved:
        done = len(saved["centroids"])
        centroids[:done] = saved["centroids"]
    filled = np.flatnonzero(shares)
    result = TwoLevels(coarse[filled], np.append(starts[filled], num_clusters), centroids)
    with tqdm(total=num_clusters, initial=done, desc="K-means within clusters", unit=" centroids") as bar:
        for cell in filled[starts[filled] >= done]:
            members = vectors[order[ends[cell] - sizes[cell] : ends[cell]]].astype(np.float32)
            done = int(starts[cell + 1])
            centroids[starts[cell] : done] = centroids_within(members, int(shares[cell]), seed, niter=iterations)
            bar.update(int(shares[cell]))
            if done == num_clusters or states.is_due():
                states.save("centroids", coarse=result.coarse, starts=result.starts, centroids=centroids[:done])
    return result


def memory_of_two_levels(keys: KeyRows, num_clusters: int) -> MemoryNeeded:
    """Where a key of the sample has its own dtype, its coarse cluster, and its place in their order."""
    per_key = keys.dtype.itemsize * keys.shape[1] + 4 + 2 * 8
    return MemoryNeeded.of_chunks(keys, num_clusters, per_key, ADD_CHUNK)


def spread_sample(keys: KeyRows, sample: int, seed: int) -> np.ndarray:
    """A random sample, ``[sample, dimension]`` in the keys' dtype, of which each part of the store holds its share."""
    rng = np.random.default_rng(seed)
    vectors = np.empty((sample, keys.shape[1]), dtype=keys.dtype)
    done = 0
    for begin in tqdm(range(0, len(keys), ADD_CHUNK), desc="Reading the sample", unit=" chunks"):
        size = min(ADD_CHUNK, len(keys) - begin)
        upto = (begin + size) * sample // len(keys)
        chosen = np.sort(rng.choice(size, upto - done, replace=False, shuffle=False))
        vectors[done:upto] = finite_keys(keys[begin : begin + size][chosen])
        done = upto
    return vectors


def _coarse_clusters(
    vectors: np.ndarray, num_clusters: int, iterations: int, seed: int, states: SavedStates
) -> tuple[np.ndarray, np.ndarray]:
    """The coarse centroids, float32 ``[coarse clusters, dimension]``, and the nearest of each vector, int32 ``[n]``."""
    saved = states.load("coarse")
    if saved:
        return saved["coarse"], saved["cells"]
    count = min(round(math.sqrt(PROBE * num_clusters)), num_clusters)
    chosen = np.random.default_rng(seed).choice(len(vectors), min(COARSE_SAMPLE * count, len(vectors)), replace=False)
    bounds = {"min_points_per_centroid": 1, "max_points_per_centroid": COARSE_SAMPLE}
    kmeans = faiss.Kmeans(vectors.shape[1], count, niter=iterations, seed=seed, gpu=faiss_gpus(), **bounds)
    kmeans.train(vectors[np.sort(chosen)].astype(np.float32))
    coarse = np.asarray(kmeans.centroids)
    cells = np.empty(len(vectors), dtype=np.int32)
    for begin in tqdm(
        range(0, len(vectors), ADD_CHUNK), desc=f"Assigning to {count:,} coarse clusters", unit=" chunks"
    ):
        chunk = vectors[begin : begin + ADD_CHUNK].astype(np.float32)
        cells[begin : begin + len(chunk)] = faiss.knn(chunk, coarse, 1)[1][:, 0]
    states.save("coarse", coarse=coarse, cells=cells)
    return coarse, cells
