"""How well an index serves kNN-LM: compared with exact search on held-out queries.

The queries are entries of the store, each with itself taken out of both results. What is compared is p_kNN, because
an index that ranks well can still have distances of no use for a softmax.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.evaluation import knn_intersection_measure
from tqdm import tqdm

from knn_lm_eval.methods.mixture import knn_log_prob, neighbour_log_weights
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.faiss_index import inverted_file, search, set_probe
from knn_lm_eval.search.retriever import entry_counts
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import finite_keys

logger = logging.getLogger(__name__)

PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
# The probe recommended is the smallest whose p_kNN error exceeds the largest probe's by at most this share of
# that error, or of the mean p_kNN.
ENOUGH_OF_ERROR, ENOUGH_OF_P_KNN = 0.05, 0.01


def search_exactly(datastore: Datastore, queries: np.ndarray, k: int, sim_func: str) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest of all keys, on a GPU if torch has one; see ``ExactSearch``.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``.
    k : at most the store's entries.

    Returns
    -------
    distances : float32 ``[n, k]``, squared L2 or negated inner products.
    entries : int64 ``[n, k]``; none is -1.
    """
    keys = datastore.require_keys("exact search")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ExactSearch(keys, sim_func, device).search(queries, k, progress=True)


@dataclass(frozen=True)
class HeldOutQueries:
    """Entries of a datastore as queries, which are not to find themselves.

    Attributes
    ----------
    datastore : the store, with keys.
    entries : int64 ``[n]``, ascending.
    keys : float32 ``[n, dimension]``.
    k, knn_temp : neighbours and temperature of p_kNN.
    """

    datastore: Datastore
    entries: np.ndarray
    keys: np.ndarray
    k: int
    knn_temp: float

    @classmethod
    def draw(cls, datastore: Datastore, count: int, k: int, knn_temp: float, seed: int) -> HeldOutQueries:
        """At random; ``k`` of the other entries, or all."""
        entries = np.sort(np.random.default_rng(seed).permutation(len(datastore))[:count])  # [n]
        keys = finite_keys(datastore.require_keys("measuring an index")[entries])  # [n, dimension]
        return cls(datastore, entries, keys, min(k, len(datastore) - 1), knn_temp)

    def p_knn(self, distances: np.ndarray, entries: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """p_kNN ``[n]`` of each query's own next token, and the entries ``[n, k]`` that it rests on.

        Parameters
        ----------
        distances, entries : ``[n, k + 1]``, what was found, the query's own entry perhaps among it; -1 in empty slots.
        """
        is_itself = entries == self.entries[:, None]  # [n, k + 1]
        order = np.argsort(is_itself, axis=1, kind="stable")[:, : self.k]  # [n, k]
        distances, entries = np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)  # [n, k]
        distances[entries == self.entries[:, None]] = np.inf
        values = torch.from_numpy(self.datastore.values[np.maximum(entries, 0)])  # [n, k]
        counts = entry_counts(self.datastore.weights, entries)
        log_weights = neighbour_log_weights(torch.from_numpy(distances), self.knn_temp, counts)  # [n, k]
        targets = torch.from_numpy(self.datastore.values[self.entries].copy())  # [n]
        return knn_log_prob(log_weights, values, targets).exp().nan_to_num(0.0), entries


def measure_quality(
    datastore: Datastore, index: faiss.Index, sim_func: str, k: int, knn_temp: float, queries: int, seed: int
) -> dict[str, Any]:
    """Compare the index with exact search on held-out queries, for each probe.

    Parameters
    ----------
    index : the largest probe stays set in it.
    seed : of the training sample; the queries have one of their own.

    Returns
    -------
    ``{"probe": the one to use, "quality": [one row per probe]}``; a row has ``recall`` (the share of the exact
    ``k`` neighbours found), ``p_knn_error`` (mean absolute error of p_kNN of the query's own next token),
    ``p_knn`` (its mean by exact search) and ``microseconds`` per query. ``probe`` is None without lists.
    """
    held_out = HeldOutQueries.draw(datastore, queries, k, knn_temp, seed + 1)
    if held_out.k < 1:
        return {"probe": None, "quality": []}
    exact_p, exact_entries = held_out.p_knn(*search_exactly(datastore, held_out.keys, held_out.k + 1, sim_func))
    ivf, rows = inverted_file(index), []
    probes: list[int | None] = [p for p in PROBES if p <= ivf.nlist] if ivf is not None else [None]
    for probe in tqdm(probes, desc="Measuring the index", unit=" probe"):
        if probe is not None:
            set_probe(index, probe)
        start = time.perf_counter()
        distances, entries = search(index, held_out.keys, held_out.k + 1)
        seconds = time.perf_counter() - start
        p, entries = held_out.p_knn(distances, entries)
        rows.append(
            {
                "probe": probe,
                # Exact search leaves no slot empty, so that empty ones are never taken for found.
                "recall": round(knn_intersection_measure(exact_entries, entries), 4),
                "p_knn_error": round(float((p - exact_p).abs().mean()), 6),
                "p_knn": round(float(exact_p.mean()), 6),
                "microseconds": round(1e6 * seconds / len(held_out.keys), 1),
            }
        )
    return {"probe": good_enough(rows), "quality_k": held_out.k, "quality_knn_temp": knn_temp, "quality": rows}


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
