"""K-means of keys: iteration by iteration on a sample, or in two levels where there are many centroids."""

from __future__ import annotations

import logging
import math
import os
from typing import Any, NamedTuple

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import faiss_gpus
from knn_lm_eval.store.key_stream import SEARCH_CHUNK, keys_of
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.memory import size_text
from knn_lm_eval.system.sampling import draw_entries

logger = logging.getLogger(__name__)

SAMPLE_PER_CLUSTER = 64  # keys to train on, by default; faiss asks for 39 to 256 per centroid
FIRST_LEVEL_SAMPLE = 1024  # of two, keys to train on per cluster
LEAST_PER_CLUSTER = 39
MEMORY_SHARE = 0.8  # of the machine's, that k-means may take


def train_kmeans(
    keys: np.ndarray, num_clusters: int, sample: int, iterations: int, seed: int, states: SavedStates
) -> np.ndarray:
    """The centroids of a random sample of the keys, by k-means on all GPUs that faiss sees, or the CPU.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    sample : keys to train on, all in memory as float32; ``num_clusters <= sample <= count``.
    iterations : of k-means, at least 1.
    seed : of the sample and the first centroids.
    states : where the state ``centroids`` is saved between iterations, and is gone on with.

    Returns
    -------
    float32 ``[num_clusters, dimension]``.

    Raises
    ------
    UserError
        Where a key holds NaN or infinity.
    """
    state = states.load("centroids")
    centroids, done = state.get("centroids"), int(state.get("iterations", 0))
    if centroids is not None and done == iterations:
        return centroids
    dimension = keys.shape[1]
    # faiss would draw fewer than asked, or print warnings, outside of these bounds.
    bounds = {"min_points_per_centroid": 1, "max_points_per_centroid": sample}
    kmeans = faiss.Kmeans(dimension, num_clusters, niter=1, seed=seed, gpu=faiss_gpus(), **bounds)
    description = f"Training {num_clusters:,} centroids on {sample:,} keys"
    with tqdm(total=iterations, initial=done, desc=description, unit=" iterations") as bar:
        vectors = keys_of(keys, draw_entries(len(keys), sample, seed))  # [sample, dimension]
        while done < iterations:
            kmeans.train(vectors, init_centroids=centroids)
            centroids, done = kmeans.centroids, done + 1
            bar.update()
            if done == iterations or states.is_due():
                states.save("centroids", centroids=centroids, iterations=done)
    assert centroids is not None
    return centroids


class MemoryNeeded(NamedTuple):
    """Bytes that k-means takes: for each key that it trains on, for its centroids, and for the keys that it reads."""

    per_key: int
    centroids: int
    chunks: int

    @classmethod
    def of_chunks(cls, keys: np.ndarray, num_clusters: int, per_key: int, chunk: int) -> MemoryNeeded:
        """Of the centroids, their index and their successors, and of so many keys at a time in three forms."""
        row = 4 * keys.shape[1]
        return cls(int(per_key), int(3 * num_clusters * row), int(3 * min(chunk, len(keys)) * row))


def memory_of_kmeans(keys: np.ndarray, num_clusters: int) -> MemoryNeeded:
    """Of ``train_kmeans``, where a key of the sample is float32 and has a cluster and a distance."""
    return MemoryNeeded.of_chunks(keys, num_clusters, 4 * keys.shape[1] + 12, SEARCH_CHUNK)


def sample_within(memory: int, sample: int, needed: MemoryNeeded, num_clusters: int) -> int:
    """The sample that fits the memory: ``sample``, or fewer keys down to 39 per cluster, with a warning."""
    least = min(LEAST_PER_CLUSTER * num_clusters, sample)
    fits = max(least, (memory - needed.centroids - needed.chunks) // needed.per_key)
    if fits >= sample:
        return sample
    logger.warning(
        "K-means trains on %d keys (%.0f per cluster) instead of %d: %s of memory hold no more.",
        *(fits, fits / num_clusters, sample, size_text(memory)),
    )
    return fits


def check_memory(memory: int | None, sample: int, needed: MemoryNeeded, num_clusters: int) -> None:
    """Raise UserError where k-means would take more than the memory; None is ``MEMORY_SHARE`` of the machine's."""
    held = needed.centroids + (0 if memory is None else needed.chunks)
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = int(MEMORY_SHARE * of_machine) if memory is None else memory
    if (total := held + sample * needed.per_key) <= allowed:
        return
    fits = (allowed - held) // needed.per_key
    advice = f"--sample {fits} or less" if fits >= num_clusters else "fewer --num_clusters"
    has = f"this machine has {of_machine / 2**30:.1f} GiB" if memory is None else f"--memory is {size_text(memory)}"
    more = "" if memory is None else f", or give --memory {size_text(total)} or more"
    raise UserError(
        f"k-means of {sample:,} keys into {num_clusters:,} clusters takes {total / 2**30:.1f} GiB of memory, {has}; "
        f"choose {advice}{more}."
    )


def two_level_kmeans(
    vectors: np.ndarray, count: int, seed: int, spherical: bool = False, niter: int = 25
) -> np.ndarray:
    """About sqrt(count) clusters of the vectors, each cut into a number of clusters that its size earns it.

    (faiss.contrib.clustering has the like, but stops where a cluster is too small to be cut.)

    Parameters
    ----------
    vectors : float32 ``[n, dimension]``, at least ``count`` of them. Beside them it takes their copies for the first
        level's sample (``FIRST_LEVEL_SAMPLE`` a cluster) and for one cluster, twice the centroids, and some 40 bytes
        a vector.
    niter : iterations of each k-means.

    Returns
    -------
    float32 ``[count, dimension]``, the centroids.
    """
    settings = {"seed": seed, "spherical": spherical, "niter": niter, "min_points_per_centroid": 1}
    coarse = faiss.Kmeans(
        vectors.shape[1], round(math.sqrt(count)), max_points_per_centroid=FIRST_LEVEL_SAMPLE, **settings
    )
    coarse.train(vectors)
    cluster = coarse.assign(vectors)[1]  # [n]
    sizes = np.bincount(cluster, minlength=coarse.k)  # [coarse clusters]
    shares = shares_of_cells(sizes, count)
    order, ends = np.argsort(cluster, kind="stable"), np.cumsum(sizes)
    centroids = []
    for number in tqdm(np.flatnonzero(shares), desc="K-means within clusters", unit=" clusters"):
        members = vectors[order[ends[number] - sizes[number] : ends[number]]]
        centroids.append(centroids_within(members, int(shares[number]), seed, spherical=spherical, niter=niter))
    return np.concatenate(centroids)


def shares_of_cells(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many of ``count`` centroids each coarse cluster gets, int64, by its size; ``sizes.sum()`` is no smaller.

    Each gets the floor of its share, at least one if it has members; what that leaves or owes, the largest bear.
    """
    shares = np.maximum(sizes * count // sizes.sum(), sizes > 0)  # [coarse clusters]
    while (left := count - shares.sum()) != 0:
        room = sizes - shares if left > 0 else shares - 1
        largest = np.argsort(-sizes, kind="stable")
        largest = largest[room[largest] > 0][: abs(left)]
        shares[largest] += np.sign(left)
    return shares


def centroids_within(members: np.ndarray, count: int, seed: int, **settings: Any) -> np.ndarray:
    """``count`` centroids of one coarse cluster's members, float32; ``settings`` are those of faiss's k-means."""
    fine = faiss.Kmeans(members.shape[1], count, seed=seed, min_points_per_centroid=1, **settings)
    fine.train(members)
    return np.asarray(fine.centroids)
