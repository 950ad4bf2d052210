"""How well an index serves kNN-LM: compared with exact search on held-out queries.

The queries are entries of the store, each with itself taken out of both results. What is compared is p_kNN, because
an index that ranks well can still have distances of no use for a softmax.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.exhaustive_search import knn_ground_truth
from tqdm import tqdm

from knn_lm_eval.methods.mixture import knn_log_prob, neighbour_log_weights
from knn_lm_eval.search.faiss_index import METRICS, inverted_file, search, set_probe
from knn_lm_eval.search.retriever import entry_counts
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import ADD_CHUNK, finite_keys, key_chunks

logger = logging.getLogger(__name__)

PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
# The probe recommended is the smallest whose p_kNN error exceeds the largest probe's by at most this share of
# that error, or of the mean p_kNN.
ENOUGH_OF_ERROR, ENOUGH_OF_P_KNN = 0.05, 0.01


def measure_quality(
    datastore: Datastore, index: faiss.Index, sim_func: str, k: int, knn_temp: float, queries: int, seed: int
) -> dict[str, Any]:
    """Compare the index with exact search on held-out queries, for each probe.

    Returns
    -------
    ``{"probe": the one to use, "quality": [one row per probe]}``; a row has ``recall`` (the share of the exact
    ``k`` neighbours found), ``p_knn_error`` (mean absolute error of p_kNN of the query's own next token),
    ``p_knn`` (its mean by exact search) and ``microseconds`` per query. ``probe`` is None without lists.
    """
    chosen = np.sort(np.random.default_rng(seed + 1).permutation(len(datastore))[:queries])
    all_keys = datastore.require_keys("measuring an index")
    keys, targets = finite_keys(all_keys[chosen]), torch.from_numpy(datastore.values[chosen].copy())
    k = min(k, len(datastore) - 1)
    if k < 1:
        return {"probe": None, "quality": []}

    def held_out_p_knn(distances: np.ndarray, entries: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """p_kNN of each query's own next token and the entries it rests on, without the query's own entry."""
        order = np.argsort(entries == chosen[:, None], axis=1, kind="stable")[:, :k]
        distances, entries = np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)
        distances[entries == chosen[:, None]] = np.inf
        values = torch.from_numpy(datastore.values[np.maximum(entries, 0)])
        counts = entry_counts(datastore.weights, entries)
        log_weights = neighbour_log_weights(torch.from_numpy(distances), knn_temp, counts)
        return knn_log_prob(log_weights, values, targets).exp(), entries

    bar = tqdm(
        key_chunks(all_keys), total=-(-len(datastore) // ADD_CHUNK), desc="Exact search to compare with", unit=" chunks"
    )
    scores, entries = knn_ground_truth(keys, bar, k + 1, METRICS[sim_func])
    exact_p, exact_entries = held_out_p_knn(-scores if sim_func == "dot" else scores, entries)
    ivf, rows = inverted_file(index), []
    probes: list[int | None] = [p for p in PROBES if p <= ivf.nlist] if ivf is not None else [None]
    for probe in tqdm(probes, desc="Measuring the index", unit=" probe"):
        if probe is not None:
            set_probe(index, probe)
        start = time.perf_counter()
        distances, entries = search(index, keys, k + 1)
        seconds = time.perf_counter() - start
        p, entries = held_out_p_knn(distances, entries)
        found = sum(len(np.intersect1d(a, b)) for a, b in zip(exact_entries, entries, strict=True))
        rows.append(
            {
                "probe": probe,
                "recall": round(found / exact_entries.size, 4),
                "p_knn_error": round(float((p - exact_p).abs().mean()), 6),
                "p_knn": round(float(exact_p.mean()), 6),
                "microseconds": round(1e6 * seconds / len(keys), 1),
            }
        )
    return {"probe": good_enough(rows), "quality_k": k, "quality_knn_temp": knn_temp, "quality": rows}


def good_enough(rows: list[dict[str, Any]]) -> int | None:
    """The smallest probe after which p_kNN comes hardly nearer to that of exact search."""
    best = rows[-1]["p_knn_error"]
    enough = best + max(ENOUGH_OF_ERROR * best, ENOUGH_OF_P_KNN * rows[-1]["p_knn"])
    return next(row["probe"] for row in rows if row["p_knn_error"] <= enough)


def fastest_enough(rows: list[dict[str, Any]], microseconds: float) -> int | None:
    """The smallest good enough probe among those whose search takes at most so long; the fastest where none does."""
    allowed = [row for row in rows if row["microseconds"] <= microseconds]
    if allowed:
        return good_enough(allowed)
    fastest = min(rows, key=lambda row: row["microseconds"])
    logger.warning(
        "No probe keeps to the budget of %.0f us a query; probe=%s takes %.0f us. A smaller k, fewer bytes per entry "
        "or RetoMaton take less.",
        microseconds,
        fastest["probe"],
        fastest["microseconds"],
    )
    return fastest["probe"]
