"""Training an index on a sample of keys, and what memory that takes."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.choosing import TWO_LEVELS_ABOVE
from knn_lm_eval.search.faiss_index import faiss_gpus, inverted_file, make_index
from knn_lm_eval.search.kmeans import FIRST_LEVEL_SAMPLE, two_level_kmeans

VECTORS_PER_LIST = 64  # training sample; faiss asks for 39 to 256 per inverted list
LEAST_SAMPLE = 2**16
RABITQ_IN_TWO_LEVELS_FROM = 512  # lists: as good as by plain k-means, in a third of the time or less
ITERATIONS, MANY_ITERATIONS = 10, 25  # of k-means in each of two levels; many beyond ``TWO_LEVELS_ABOVE``
FAISS_PER_LIST = 256  # of which faiss trains on a part, if there are more
MOST_FOR_CODES = 2**17  # at least what faiss trains product and scalar quantizers on


def sample_size(factory: str, dimension: int, sim_func: str, count: int, wanted: int | None = None) -> int:
    """How many of ``count`` keys an index is trained on; 0 where it needs no training.

    Parameters
    ----------
    wanted : as the user says; None takes ``VECTORS_PER_LIST`` for each list, and at least ``LEAST_SAMPLE``.

    Raises
    ------
    UserError
        Where it has more lists than there are keys, or faiss cannot make it.
    """
    index = make_index(factory, dimension, sim_func)
    if index.is_trained:
        return 0
    ivf = inverted_file(index)
    if ivf is not None and ivf.nlist > count:
        raise UserError(f"{factory} has more lists than the store has entries ({count}); choose fewer.")
    return min(count, wanted or max(LEAST_SAMPLE, VECTORS_PER_LIST * (ivf.nlist if ivf else 0)))


def training_bytes(factory: str, dimension: int, sim_func: str, sample: int) -> int:
    """The memory that ``train_index`` takes, with the sample: about, and rather too much."""
    index, row = make_index(factory, dimension, sim_func), 4 * dimension
    rows = sample * (1 + isinstance(index, faiss.IndexPreTransform))  # and what the transforms make of them
    if (ivf := inverted_file(index)) is not None:
        rows += 3 * ivf.nlist  # the centroids, their index, and their successors
        if _in_two_levels(ivf):
            rows += min(sample, FIRST_LEVEL_SAMPLE * round(ivf.nlist**0.5))
        if ivf.nlist <= TWO_LEVELS_ABOVE and sample > FAISS_PER_LIST * ivf.nlist:
            rows += FAISS_PER_LIST * ivf.nlist
        for_codes = ivf.train_encoder_num_vectors()
        rows += min(sample, for_codes) if for_codes > 0 else sample * ivf.by_residual
    else:
        rows += min(sample, MOST_FOR_CODES)
    return rows * row + 64 * sample


def train_index(factory: str, vectors: np.ndarray, sim_func: str, seed: int) -> faiss.Index:
    """An index that is trained and empty.

    Parameters
    ----------
    vectors : float32 ``[n, dimension]``, the sample; ``n`` may be 0 for what needs no training.
    seed : of k-means in two levels.
    """
    index = make_index(factory, vectors.shape[1], sim_func)
    if index.is_trained:
        return index
    ivf, on_gpus = inverted_file(index), None
    if ivf is not None and faiss_gpus():
        # Only k-means, the slow part of training, moves to the GPUs. faiss does not keep what it is given here alive.
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
        ivf.clustering_index = on_gpus
    with tqdm(total=len(vectors), desc=f"Training {factory} on {len(vectors):,} keys", unit=" keys") as bar:
        if ivf is not None and _in_two_levels(ivf) and not faiss_gpus():
            _place_lists(index, ivf, vectors, seed)
            # RaBitQ learns nothing from vectors, to which faiss would look for the lists all the same.
            index.train(vectors[:1] if _is_rabitq(ivf) else vectors)
        else:
            index.train(vectors)
        if ivf is not None:
            ivf.clustering_index = None  # type: ignore[assignment]
        bar.update(len(vectors))
    return index


def _in_two_levels(ivf: faiss.IndexIVF) -> bool:
    """Whether k-means is done in two levels on CPUs; what trains its own quantizer is left to faiss."""
    least = RABITQ_IN_TWO_LEVELS_FROM if _is_rabitq(ivf) else TWO_LEVELS_ABOVE + 1
    return ivf.nlist >= least and ivf.quantizer.is_trained


def _is_rabitq(ivf: faiss.IndexIVF) -> bool:
    return isinstance(faiss.downcast_index(ivf), (faiss.IndexIVFRaBitQ, faiss.IndexIVFRaBitQFastScan))


def _place_lists(index: faiss.Index, ivf: faiss.IndexIVF, vectors: np.ndarray, seed: int) -> None:
    """Give the inverted lists their centroids by k-means in two levels; ``index.train`` leaves them as they are.

    Up to ``TWO_LEVELS_ABOVE`` of them are moved once more, by an iteration that compares with all.
    """
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            transform = chain.at(number)
            if not transform.is_trained:
                transform.train(vectors)
            vectors = transform.apply(vectors)
    quantizer: Any = faiss.downcast_index(ivf.quantizer)
    spherical, iterates = ivf.cp.spherical, ivf.nlist <= TWO_LEVELS_ABOVE
    centroids = two_level_kmeans(vectors, ivf.nlist, seed, spherical, niter=ITERATIONS if iterates else MANY_ITERATIONS)
    if iterates:
        settings = {"niter": 1, "seed": seed, "spherical": spherical, "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(ivf.d, ivf.nlist, max_points_per_centroid=FAISS_PER_LIST, **settings)
        kmeans.train(vectors, init_centroids=centroids)
        centroids = np.asarray(kmeans.centroids)
    quantizer.add(centroids)
