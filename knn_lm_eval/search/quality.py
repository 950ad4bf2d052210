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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.mixture import knn_log_prob, neighbour_log_weights
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.faiss_index import inverted_file, search, set_probe
from knn_lm_eval.search.probe_choice import (
    TEMPERATURES,
    add_costs,
    best_log_probs,
    bigram_log_probs,
    good_enough,
    highest_temperature,
    perplexity_cost,
)
from knn_lm_eval.search.probe_kernels import weigh
from knn_lm_eval.search.retriever import entry_counts
from knn_lm_eval.search.sign_codes import SignSearch
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import finite_keys
from knn_lm_eval.system.sampling import draw_entries

logger = logging.getLogger(__name__)

PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
NOT_MEASURED: dict[str, Any] = {"probe": None, "quality": []}  # of a store whose entries have no others
QUERIES_AT_ONCE = 2**10  # whose neighbours are held, of an index with lists
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

    def of_rows(self, rows: slice) -> HeldOutQueries:
        """Some of them."""
        return replace(self, entries=self.entries[rows], keys=self.keys[rows])

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

    def log_p_knn(self, distances: np.ndarray, entries: np.ndarray, temperature: float) -> torch.Tensor:
        """log p_kNN of each query's own next token, at a temperature, half of it, and so on.

        Parameters
        ----------
        distances, entries : ``[n, k or more]``, what was found, the query's own entry perhaps among it.

        Returns
        -------
        float64 ``[n, TEMPERATURES]``; minus infinity where no neighbour has the token, NaN where there is none.
        """
        weights, values = self.datastore.weights, self.datastore.values
        counts = np.empty(0, dtype=np.int32) if weights is None else weights
        of_all, of_targets = np.empty((2, len(entries), TEMPERATURES))
        targets = values[self.entries]
        weigh(distances, entries, self.entries, values, counts, targets, self.k, temperature, of_all, of_targets)
        return (torch.from_numpy(of_targets) / torch.from_numpy(of_all)).log()


Found = tuple[np.ndarray, np.ndarray]  # distances and entries [n, k]
# Finds the k nearest of queries at each of ascending probes, with the seconds that each search takes.
Searches = Callable[[np.ndarray, int, list[int | None]], Iterator[tuple[Found, float]]]


@contextmanager
def searching(index: faiss.Index) -> Iterator[Searches]:
    """How an index that is under way will be searched: its codes are laid out among temporary files if need be."""
    with tempfile.TemporaryDirectory(prefix="knn_lm_eval-") as folder:
        codes = None
        try:
            if (codes := SignSearch.of(index, Path(folder))) is not None:
                codes.search(np.zeros((1, index.d), dtype=np.float32), 1, 1)  # compiled, if it was not yet
        except UserError as error:
            logger.warning("The index is measured as faiss searches it, which takes longer (TMPDIR): %s", error)

        def searches(queries: np.ndarray, k: int, probes: list[int | None]) -> Iterator[tuple[Found, float]]:
            begun, prepared = time.perf_counter(), None
            if codes is not None and codes.compares_lists and probes[-1] is not None:
                prepared = codes.prepare(queries, probes[-1])
            shared = time.perf_counter() - begun
            for probe in probes:
                begun = time.perf_counter()
                if codes is None or probe is None:
                    found = _search_by_faiss(index, queries, k, probe)
                elif prepared is None:
                    found = codes.search(queries, k, probe)[:2]
                else:
                    found = codes.search_prepared(prepared, k, probe)[:2]
                yield found, shared + time.perf_counter() - begun

        yield searches


def _search_by_faiss(index: faiss.Index, queries: np.ndarray, k: int, probe: int | None) -> Found:
    if probe is not None:
        set_probe(index, probe)
    return search(index, queries, k)


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
    temperature = highest_temperature(exact_distances)
    measured = _measured(index, held_out, is_compared, probes, temperature)
    rows: list[dict[str, Any]] = []
    for probe, one in zip(probes, measured, strict=True):
        distances, entries = compared.others(*map(np.concatenate, zip(*one.compared, strict=True)))  # [compared, k]
        p = compared.p_knn(distances, entries)  # [compared]
        rows.append(
            {
                "probe": probe,
                "recall": round(_share_found(exact_entries, entries), 4),
                "p_knn_error": round(float((p - exact_p).abs().mean()), 6),
                "p_knn": round(float(exact_p.mean()), 6),
                "microseconds": round(1e6 * one.seconds / len(held_out.keys), 1),
            }
        )
    if ivf is not None:
        base = bigram_log_probs(datastore, held_out.entries)  # [n]
        log_probs = [best_log_probs(torch.cat(one.log_p_knn), base) for one in measured]
        exact_log_p_knn = compared.log_p_knn(exact_distances, exact_entries, temperature)
        exact_log_p = best_log_probs(exact_log_p_knn, base[is_compared])  # [compared]
        for row, log_p in zip(rows, log_probs, strict=True):
            row["exact_cost"], row["exact_cost_bound"] = perplexity_cost(exact_log_p - log_p[is_compared])
        add_costs(rows, log_probs)
    return {
        "probe": good_enough(rows),
        "quality_k": held_out.k,
        "quality_knn_temp": held_out.knn_temp,
        "quality_queries": len(held_out.entries),
        "quality_exact_queries": len(compared.entries),
        "quality": rows,
    }


@dataclass
class _Measured:
    """What searches with a probe took and found: of the compared queries as it is, of all by log p_kNN."""

    seconds: float = 0.0
    compared: list[Found] = field(default_factory=list)
    log_p_knn: list[torch.Tensor] = field(default_factory=list)


def _measured(
    index: faiss.Index, held_out: HeldOutQueries, is_compared: np.ndarray, probes: list[int | None], temperature: float
) -> list[_Measured]:
    """Search at each probe, some queries at a time; log p_kNN is of an index with lists alone."""
    measured = [_Measured() for _ in probes]
    count, has_lists = len(held_out.entries), inverted_file(index) is not None
    at_once = QUERIES_AT_ONCE if has_lists else count
    with searching(index) as searches, tqdm(total=count, desc="Measuring the index", unit=" queries") as bar:
        for start in range(0, count, at_once):
            rows = slice(start, start + at_once)
            some, compared = held_out.of_rows(rows), is_compared[rows]
            for one, (found, seconds) in zip(measured, searches(some.keys, held_out.k + 1, probes), strict=True):
                one.seconds += seconds
                one.compared.append((found[0][compared], found[1][compared]))
                if has_lists:
                    one.log_p_knn.append(some.log_p_knn(*found, temperature))
            bar.update(len(compared))
    return measured


def _share_found(exact: np.ndarray, found: np.ndarray) -> float:
    """How many of the exact neighbours were found, of all; int64 ``[n, k]``, no entry twice, -1 in empty slots."""
    both = np.sort(np.concatenate([exact, found], axis=1), axis=1)
    return float(((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum() / exact.size)
