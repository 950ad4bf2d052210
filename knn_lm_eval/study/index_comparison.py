"""What serves a kNN-LM best: indexes of one datastore compared by speed, size, p_kNN and perplexity, on real text.

The LM reads the text once. Its queries are searched exactly, and by every index with every setting; the time is
that of the search alone. Recall is reported, but what counts is how near p_kNN of the text's own tokens comes to
that of exact search, and the perplexity. Distances that are wrong at random, as a coarse quantizer's are, act like
a higher temperature and may bring a lower perplexity than exact search where the temperature was too low. So
perplexities are compared at each index's own best temperature and lmbda.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.evaluation import knn_intersection_measure
from torch import Tensor
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.mixture import knn_log_probs, mix
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.quality import search_exactly
from knn_lm_eval.search.retriever import Found, Retriever, entry_counts
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.study.grid import Surface, find_best
from knn_lm_eval.study.run import MAX_LENGTH, first_tokens, load_knn_hf, one_store
from knn_lm_eval.study.text_queries import Queries, collect_queries
from knn_lm_eval.system.arrays import read_npz
from knn_lm_eval.system.files import disk_errors_in, replace_file

logger = logging.getLogger(__name__)

EXACT = "exact"
KNN_TEMPS = tuple(float(f"{x:.3g}") for x in np.geomspace(0.5, 16, 11))
LMBDAS = tuple(round(0.05 * number, 2) for number in range(1, 17))


@dataclass
class Measurement:
    """One index with one setting.

    Attributes
    ----------
    index, factory : its name and what it is; ``exact`` for exhaustive search.
    bytes_per_entry : of the index; for exact search, of the keys.
    microseconds : per query, of each round.
    recall : the share of the k nearest entries that were found; None where they are not known.
    p_knn_error : mean absolute error of p_kNN of the text's own tokens; None likewise.
    perplexity : by text, and of all under ``all``.
    tuned, knn_temp, lmbda : the lowest perplexity of all texts over ``KNN_TEMPS`` and ``LMBDAS``, and where.
    """

    index: str
    factory: str
    bytes_per_entry: float
    probe: int | None
    k: int
    microseconds: list[float] = field(default_factory=list)
    recall: float | None = None
    p_knn_error: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    tuned: float = 0.0
    knn_temp: float = 1.0
    lmbda: float = 0.0

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {
            "index": self.index,
            "factory": self.factory,
            "bytes_per_entry": round(self.bytes_per_entry, 1),
            "probe": self.probe,
            "k": self.k,
            "microseconds": round(median(self.microseconds), 1),
            "recall": None if self.recall is None else round(self.recall, 4),
            "p_knn_error": None if self.p_knn_error is None else round(self.p_knn_error, 5),
            **{f"perplexity {name}": round(value, 4) for name, value in self.perplexity.items()},
            "tuned perplexity": round(self.tuned, 4),
            "tuned knn_temp": self.knn_temp,
            "tuned lmbda": self.lmbda,
        }


@dataclass(frozen=True)
class _ExactNeighbours:
    """Distances and entries ``[tokens, k]`` of exact search, and the CPU seconds that it took."""

    distances: Tensor
    entries: Tensor
    seconds: float

    def nearest(self, k: int) -> tuple[Tensor, Tensor]:
        return self.distances[:, :k], self.entries[:, :k]


class IndexComparison:
    """Measures searches of one datastore against exact search.

    Parameters
    ----------
    store : the datastore; without keys nothing is compared with exact search.
    queries : of the text to measure on.
    lmbda, knn_temp : of the mixture.
    sim_func : what nearness means.
    max_k : the largest k that will be asked for.
    cache : a folder that keeps the exact neighbours, which take long to find.
    """

    def __init__(
        self,
        store: Datastore,
        queries: Queries,
        *,
        lmbda: float,
        knn_temp: float,
        sim_func: str,
        max_k: int,
        cache: Path,
    ) -> None:
        self.store, self.queries, self.lmbda, self.knn_temp, self.cache = store, queries, lmbda, knn_temp, cache
        store.require_all("a comparison of indexes")
        if max_k > len(store):
            raise UserError(f"k={max_k} does not fit the datastore {store.path}, which has {len(store)} entries.")
        self._exact = None if store.keys is None else self._exact_neighbours(sim_func, max_k)

    @property
    def base_perplexity(self) -> dict[str, float]:
        """Of the LM alone."""
        return perplexities(self.queries.lm_log_probs, self.queries.texts)

    def exact(self, k: int) -> Measurement:
        """Exhaustive search."""
        keys = self.store.require_keys("exact search")
        assert self._exact is not None
        result = Measurement(EXACT, EXACT, keys.shape[1] * keys.itemsize, None, k)
        result.microseconds = [1e6 * self._exact.seconds / len(self.queries.queries)]
        self._judge(result, self._found(*self._exact.nearest(k)))
        return result

    def measure(
        self, retrievers: Sequence[Retriever], repeats: int, clock: Callable[[], float] = time.perf_counter
    ) -> Iterator[Measurement]:
        """Each retriever's search, timed in so many rounds in which they take turns, after a round that warms up.

        Parameters
        ----------
        retrievers : one per setting; those of one index should share it (see ``Retriever.with_settings``), since an
            index may fill the memory.
        """
        results = []
        queries = self.queries.queries.numpy()
        for retriever in tqdm(retrievers, desc="Measuring quality", unit=" settings"):
            size = retriever.bytes_on_disk / len(self.store)
            result = Measurement(retriever.name, retriever.factory, size, retriever.probe, retriever.k)
            distances, entries = (torch.from_numpy(array) for array in retriever.find(queries))
            self._judge(result, self._found(distances, entries))
            results.append(result)
        for _ in tqdm(range(repeats), desc="Timing", unit=" rounds"):
            for retriever, result in zip(retrievers, results, strict=True):
                start = clock()
                retriever.find(queries)
                result.microseconds.append(1e6 * (clock() - start) / len(queries))
        yield from results

    def _judge(self, result: Measurement, found: Found) -> None:
        log_p, surface = self._log_p_knn(found)
        if self._exact is not None:
            exact = self._found(*self._exact.nearest(result.k))
            exact_log_p = self._log_p_knn(exact)[0]
            result.p_knn_error = float((log_p.exp().nan_to_num(0.0) - exact_log_p.exp()).abs().mean())
            # Exact search leaves no slot empty, so that empty ones are never taken for found.
            result.recall = knn_intersection_measure(exact.entries.numpy(), found.entries.numpy())
        mixed = mix(self.queries.lm_log_probs, log_p, self.lmbda)
        result.perplexity = perplexities(mixed, self.queries.texts)
        best = find_best([surface], len(log_p), 0.0)
        result.tuned = math.exp(-best.log_prob / len(log_p))
        result.knn_temp, result.lmbda = best.settings["knn_temp"], best.settings["lmbda"]

    def _log_p_knn(self, found: Found) -> tuple[Tensor, Surface]:
        """log p_kNN of the targets at the given temperature, and the sums over the grid."""
        k = found.entries.shape[1]
        surface = Surface({}, (k,), KNN_TEMPS, LMBDAS)
        temperatures = (self.knn_temp, *KNN_TEMPS)
        step = max(1, NEIGHBOURS_PER_BLOCK // k)
        parts = []
        for start in range(0, len(found.entries), step):
            rows = slice(start, start + step)
            distances, values = found.distances[rows], found.values[rows]  # [step, k]
            counts = None if found.counts is None else found.counts[rows]  # [step, k]
            targets = self.queries.targets[rows]  # [step]
            log_p = knn_log_probs(distances, values, counts, targets, temperatures, (k,))  # [step, temperatures, 1]
            parts.append(log_p[:, 0, 0])
            surface.add(self.queries.lm_log_probs[rows], log_p[:, 1:])
        return torch.cat(parts), surface

    def _found(self, distances: Tensor, entries: Tensor) -> Found:
        values = torch.from_numpy(self.store.values[np.maximum(entries.numpy(), 0)])
        return Found(distances, values, entries, entry_counts(self.store.weights, entries.numpy()))

    def _exact_neighbours(self, sim_func: str, k: int) -> _ExactNeighbours:
        """``k`` or more, which may be kept ones."""
        queries = self.queries.queries.numpy()
        search = f"{self.store.keys_checksum} {sim_func} {hashlib.sha256(queries.tobytes()).hexdigest()}"
        path = self.cache / f"exact-{hashlib.sha256(search.encode()).hexdigest()[:16]}.npz"
        if path.is_file():
            kept = read_npz(path, "delete it")
            if kept["distances"].shape[1] >= k:
                kept_arrays = torch.from_numpy(kept["distances"]), torch.from_numpy(kept["entries"])
                return _ExactNeighbours(*kept_arrays, float(kept["seconds"]))
        start = time.process_time()
        distances, entries = search_exactly(self.store, queries, k, sim_func)
        seconds = time.process_time() - start
        with disk_errors_in(self.cache):
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.savez(file, distances=distances, entries=entries, seconds=seconds)
            replace_file(path.with_suffix(".tmp"), path)
        return _ExactNeighbours(torch.from_numpy(distances), torch.from_numpy(entries), seconds)


def perplexities(log_probs: Tensor, texts: dict[str, int]) -> dict[str, float]:
    """Perplexity per token of each text, and of all together under ``all``."""
    parts = dict(zip(texts, log_probs.split(list(texts.values())), strict=True))
    return {name: math.exp(-float(part.mean())) for name, part in {**parts, "all": log_probs}.items()}


def efficient(rows: Sequence[Measurement]) -> list[Measurement]:
    """Those that none is at least as fast and better than in tuned perplexity: the Pareto front, fastest first."""
    front: list[Measurement] = []
    for row in sorted(rows, key=lambda row: (median(row.microseconds), row.tuned)):
        if not front or row.tuned < front[-1].tuned:
            front.append(row)
    return front


@dataclass(frozen=True)
class IndexStudy:
    """What ``compare_indexes`` measured.

    Attributes
    ----------
    settings : those that hold for all, with the store's entries and the LM's own perplexities.
    measured : an index with a setting each.
    exact : exhaustive search, for each k; none of a store without keys.
    front : of ``measured``, those that ``efficient`` leaves.
    """

    settings: dict[str, Any]
    measured: list[Measurement]
    exact: list[Measurement]
    front: list[Measurement]

    def rows(self) -> list[dict[str, Any]]:
        """All as rows of a table, the exact ones last."""
        return [row.row() | {"efficient": row in self.front} for row in self.measured + self.exact]


def compare_indexes(
    model_args: dict[str, Any],
    texts: dict[str, str],
    indexes: Sequence[tuple[str, Sequence[int | None]]],
    ks: Sequence[int],
    cache: Path,
    *,
    tokens: int | None = None,
    repeats: int = 3,
    threads: int | None = None,
    cpu_time: bool = False,
) -> IndexStudy:
    """Compare the indexes of one datastore on texts.

    Parameters
    ----------
    model_args : as for ``KNNHF``; windows have at most ``MAX_LENGTH`` tokens where they don't say it.
    texts : by name, a domain each, say.
    indexes : the indexes' names, each with the probes to try; None is the index's own.
    ks : numbers of neighbours.
    cache : a folder that keeps the exact neighbours, which take long to find.
    tokens : score the first so many of each text; None is all.
    repeats : timed rounds after a warm-up.
    threads : CPU threads; None leaves it to faiss.
    cpu_time : count CPU seconds on one thread, not the clock's.

    Raises
    ------
    UserError
        Where there is no such index, k does not fit the store, or lmbda is an adaptive one.
    """
    lm = load_knn_hf({"index": indexes[0][0]} | model_args, most_tokens=MAX_LENGTH)
    mixture, own, store = lm.augmentation.mixture, lm.retriever, one_store(lm, "The comparison of indexes")
    if (lmbda := mixture.weight.constant) is None:
        raise UserError("Indexes are compared with one lmbda for all tokens: give lmbda=NUMBER in --model_args.")
    cut = {name: first_tokens(lm, text, tokens) for name, text in texts.items()}
    retrievers = _retrievers(own, store, indexes, ks)
    if threads := 1 if cpu_time else threads:
        faiss.omp_set_num_threads(threads)
    comparison = IndexComparison(
        store,
        collect_queries(lm, cut),
        lmbda=lmbda,
        knn_temp=mixture.knn_temp,
        sim_func=own.sim_func,
        max_k=max(ks),
        cache=cache,
    )
    measured = list(comparison.measure(retrievers, repeats, time.process_time if cpu_time else time.perf_counter))
    settings = {
        "entries": len(store),
        "tokens": comparison.queries.texts,
        "lmbda": lmbda,
        "knn_temp": mixture.knn_temp,
        "recompute_dists": own.recompute_dists,
        "threads": faiss.omp_get_max_threads(),
        "cpu_time": cpu_time,
        "base_perplexity": comparison.base_perplexity,
    }
    if store.keys is None:
        logger.warning(
            "The datastore %s has no keys: its indexes are compared with each other, and not with exact search.",
            store.path,
        )
        return IndexStudy(settings, measured, [], efficient(measured))
    return IndexStudy(settings, measured, [comparison.exact(k) for k in ks], efficient(measured))


def _retrievers(
    own: Retriever, store: Datastore, indexes: Sequence[tuple[str, Sequence[int | None]]], ks: Sequence[int]
) -> list[Retriever]:
    """One for each index, probe and k, with the other settings of ``own``; an index is opened once."""
    retrievers: list[Retriever] = []
    settings = own.sim_func, own.recompute_dists, own.settings.gpu
    for name, probes in indexes:
        opened = LocalRetriever(store, max(ks), None, *settings, name)
        retrievers += [opened.with_settings(probe=probe, k=k) for probe in probes for k in ks]
    return retrievers
