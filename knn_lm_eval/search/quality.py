"""How well an index serves kNN-LM: compared with exact search on held-out queries.

The queries are entries of the store, each with itself taken out of both results. What is compared is p_kNN, because
an index that ranks well can still have distances of no use for a softmax. Which probe is used by default is chosen by
what it costs in perplexity, see ``probe_choice``.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.evaluation import knn_intersection_measure
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.mixture import knn_log_prob, neighbour_log_weights
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.faiss_index import inverted_file, search, set_probe
from knn_lm_eval.search.probe_choice import (
    add_costs,
    best_log_probs,
    bigram_log_probs,
    good_enough,
    perplexity_cost,
    temperatures,
)
from knn_lm_eval.search.retriever import entry_counts
from knn_lm_eval.search.sign_codes import SignSearch
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import finite_keys
from knn_lm_eval.system.sampling import draw_entries

logger = logging.getLogger(__name__)

PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
NOT_MEASURED: dict[str, Any] = {"probe": None, "quality": []}  # of a store whose entries have no others
EXACT_QUERIES = 512  # at most, that are searched for among all keys; the rest is for the choice of the probe


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
    datastore : the store.
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
        datastore.require_all("measuring an index")
        entries = draw_entries(len(datastore), count, seed)  # [n]
        keys = finite_keys(datastore.require_keys("measuring an index")[entries])  # [n, dimension]
        return cls(datastore, entries, keys, min(k, len(datastore) - 1), knn_temp)

    def first(self, count: int) -> HeldOutQueries:
        """So many of them, evenly spread over the store."""
        some = np.linspace(0, len(self.entries) - 1, min(count, len(self.entries))).astype(np.int64)
        return replace(self, entries=self.entries[some], keys=self.keys[some])

    def compared(self, index: faiss.Index) -> HeldOutQueries:
        """Those whose exact neighbours are looked for: all, or of an index with lists ``EXACT_QUERIES``."""
        return self.first(EXACT_QUERIES if inverted_file(index) is not None else len(self.entries))

    def others(self, distances: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What was found without the query's own entry: the nearest ``[n, k]``.

        Parameters
        ----------
        distances, entries : ``[n, k + 1]``, what was found, the query's own entry perhaps among it; -1 in empty slots.
        """
        is_itself = entries == self.entries[:, None]  # [n, k + 1]
        order = np.argsort(is_itself, axis=1, kind="stable")[:, : self.k]  # [n, k]
        distances, entries = np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)  # [n, k]
        distances[entries == self.entries[:, None]] = np.inf
        return distances, entries

    @property
    def targets(self) -> torch.Tensor:
        """The queries' own next tokens ``[n]``."""
        return torch.from_numpy(self.datastore.values[self.entries].copy())

    def values_and_counts(self, entries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The values of entries ``[n, k]``, and how often each counts."""
        values = torch.from_numpy(self.datastore.values[np.maximum(entries, 0)])
        return values, entry_counts(self.datastore.weights, entries)

    def p_knn(self, distances: np.ndarray, entries: np.ndarray) -> torch.Tensor:
        """p_kNN ``[n]`` of each query's own next token, by ``others``."""
        values, counts = self.values_and_counts(entries)
        log_weights = neighbour_log_weights(torch.from_numpy(distances), self.knn_temp, counts)  # [n, k]
        return knn_log_prob(log_weights, values, self.targets).exp().nan_to_num(0.0)

    def log_p(
        self, distances: np.ndarray, entries: np.ndarray, base: torch.Tensor, knn_temps: list[float]
    ) -> torch.Tensor:
        """log p ``[n]`` of each query's own next token by the best mixture of ``others`` with ``base``."""
        values, counts = self.values_and_counts(entries)
        return best_log_probs(torch.from_numpy(distances), values, counts, self.targets, base, knn_temps)


@contextmanager
def searching(index: faiss.Index) -> Iterator[Callable[[np.ndarray, int, int | None], tuple[np.ndarray, np.ndarray]]]:
    """How an index that is under way will be searched: its codes are laid out among temporary files if need be."""
    with tempfile.TemporaryDirectory(prefix="knn_lm_eval-") as folder:
        codes = None
        try:
            if (codes := SignSearch.of(index, Path(folder))) is not None:
                codes.search(np.zeros((1, index.d), dtype=np.float32), 1, 1)  # compiled, if it was not yet
        except UserError as error:
            logger.warning("The index is measured as faiss searches it, which takes longer (TMPDIR): %s", error)

        def search_at(queries: np.ndarray, k: int, probe: int | None) -> tuple[np.ndarray, np.ndarray]:
            if codes is not None and probe is not None:
                return codes.search(queries, k, probe)[:2]
            if probe is not None:
                set_probe(index, probe)
            return search(index, queries, k)

        yield search_at


def measure_quality(
    datastore: Datastore, index: faiss.Index, sim_func: str, k: int, knn_temp: float, queries: int, seed: int
) -> dict[str, Any]:
    """Compare the index with exact search on held-out queries, for each probe.

    Parameters
    ----------
    index : as it was trained and filled; it may have another probe set afterwards.
    seed : of the training sample; the queries have one of their own.

    Returns
    -------
    As ``compare_with_exact``.
    """
    held_out = HeldOutQueries.draw(datastore, queries, k, knn_temp, seed + 1)
    if held_out.k < 1:
        return NOT_MEASURED
    compared = held_out.compared(index)
    exact = search_exactly(datastore, compared.keys, held_out.k + 1, sim_func)
    return compare_with_exact(index, held_out, compared, exact)


def compare_with_exact(
    index: faiss.Index, held_out: HeldOutQueries, compared: HeldOutQueries, exact: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """How well the index serves held-out queries, for each probe.

    Parameters
    ----------
    index : as it was trained and filled; it may have another probe set afterwards.
    held_out : the queries; ``k`` at least 1.
    compared : those of them that are compared with exact search.
    exact : distances float32 and entries int64 ``[compared, k + 1]`` that exact search finds for them.

    Returns
    -------
    ``{"probe": the one to use, "quality": [one row per probe]}``; a row has ``recall`` (the share of the exact
    ``k`` neighbours found), ``p_knn_error`` (mean absolute error of p_kNN of the query's own next token),
    ``p_knn`` (its mean by exact search) and ``microseconds`` per query; with lists also what ``add_costs`` notes, and
    ``exact_cost`` and ``exact_cost_bound``, the same beside exact search.
    ``probe`` is None without lists. What is beside exact search is of ``compared``.
    """
    ivf, datastore = inverted_file(index), held_out.datastore
    probes: list[int | None] = [p for p in PROBES if p <= ivf.nlist] if ivf is not None else [None]
    is_compared = np.isin(held_out.entries, compared.entries)  # [n]
    exact_distances, exact_entries = compared.others(*exact)
    exact_p = compared.p_knn(exact_distances, exact_entries)  # [compared]
    base = bigram_log_probs(datastore, held_out.entries)  # [n]
    knn_temps = temperatures(torch.from_numpy(exact_distances))
    exact_log_p = compared.log_p(exact_distances, exact_entries, base[is_compared], knn_temps)  # [compared]
    rows, log_probs = [], []
    with searching(index) as search_at:
        for probe in tqdm(probes, desc="Measuring the index", unit=" probe"):
            start = time.perf_counter()
            found = search_at(held_out.keys, held_out.k + 1, probe)
            seconds = time.perf_counter() - start
            distances, entries = held_out.others(*found)  # [n, k]
            p = compared.p_knn(distances[is_compared], entries[is_compared])  # [compared]
            row = {
                "probe": probe,
                # Exact search leaves no slot empty, so that empty ones are never taken for found.
                "recall": round(knn_intersection_measure(exact_entries, entries[is_compared]), 4),
                "p_knn_error": round(float((p - exact_p).abs().mean()), 6),
                "p_knn": round(float(exact_p.mean()), 6),
                "microseconds": round(1e6 * seconds / len(held_out.keys), 1),
            }
            if probe is not None:
                log_probs.append(held_out.log_p(distances, entries, base, knn_temps))
                lost = exact_log_p - log_probs[-1][is_compared]  # [compared]
                row["exact_cost"], row["exact_cost_bound"] = perplexity_cost(lost)
            rows.append(row)
    if ivf is not None:
        add_costs(rows, log_probs)
    return {
        "probe": good_enough(rows),
        "quality_k": held_out.k,
        "quality_knn_temp": held_out.knn_temp,
        "quality_queries": len(held_out.entries),
        "quality_exact_queries": len(compared.entries),
        "quality": rows,
    }
