"""Perplexity against the fraction of saved searches (FoSS): many of RetoMaton's settings from one pass and search."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import Reader, Reading
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk
from knn_lm_eval.methods.mixture import knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.model.scores import Score
from knn_lm_eval.model.scoring import PassageScorer
from knn_lm_eval.store.clusters import Clusters, cluster_names
from knn_lm_eval.study.run import find_tasks, load_knn_hf, one_store, perplexity, score_tasks, scores_of_readings

logger = logging.getLogger(__name__)

POSITIONS_AT_ONCE = 2**13  # with all their neighbours in memory: 12 bytes each
MIN_KNNS = (1, 8, 64, 256, 1024, math.inf)


@dataclass
class CurvePoint:
    """One method and setting, and its sums over all that was scored.

    Attributes
    ----------
    method : ``base``, ``knn-lm`` or ``retomaton``.
    clusters : the clustering's name; None without.
    min_knns : None where it does not apply.
    log_prob : the sum of all tokens' log-probabilities.
    distances : ``exact`` or ``approximate``, those that p_kNN is made of; empty for the base LM.
    tokens, searches, candidates : counts.
    """

    method: str
    clusters: str | None = None
    min_knns: float | None = None
    distances: str = ""
    log_prob: float = 0.0
    tokens: int = 0
    searches: int = 0
    candidates: int = 0

    @property
    def perplexity(self) -> float:
        """Per token of the LM's own tokenizer."""
        return perplexity(self.log_prob, self.tokens)

    @property
    def saved_searches(self) -> float:
        """The fraction of tokens that needed no full search."""
        return 1 - self.searches / self.tokens

    def row(self) -> dict[str, Any]:
        """As it stands in tables and files; empty where something does not apply."""
        return {
            "method": self.method,
            "clusters": self.clusters or "",
            "min_knns": "" if self.min_knns is None else self.min_knns,
            "token_perplexity": round(self.perplexity, 4),
            "saved_searches": round(self.saved_searches, 4) if self.method != "base" else "",
            "mean_candidates": round(self.candidates / self.tokens, 1) if self.method == "retomaton" else "",
            "distances": self.distances,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Curve:
    """One task's points: the base LM, kNN-LM, and RetoMaton's; ``settings`` are those that hold for all."""

    task: str
    settings: dict[str, Any]
    points: list[CurvePoint]


def foss_curves(
    model_args: dict[str, Any],
    tasks: Sequence[str],
    *,
    min_knns: Sequence[float] = MIN_KNNS,
    clusters: Sequence[str] | None = None,
    max_knns: int = 1024,
    duplicates: Literal["keep", "merge"] = "merge",
    metadata: dict[str, Any] | None = None,
    limit: float | None = None,
) -> Iterator[Curve]:
    """A curve for each task.

    Parameters
    ----------
    model_args : as for ``KNNHF``, without RetoMaton's.
    tasks : perplexity tasks.
    min_knns : the settings to walk with.
    clusters : the clusterings to walk with, ``none`` for pointers alone; None is these and all that there are.
    max_knns, duplicates : as for ``AutomatonSettings``.
    metadata, limit : as for lm-eval: what tasks ask for; documents per task.
    """
    _check_model_args(model_args)
    lm = load_knn_hf(model_args)
    store = one_store(lm, "A FoSS curve")
    names = ["none", *cluster_names(store)] if clusters is None else clusters
    clusterings = [None if name == "none" else Clusters.open(store, name) for name in names]
    settings = AutomatonSettings(lm.settings["k"], lm.settings["knn_temp"], max_knns=max_knns, duplicates=duplicates)
    manager = find_tasks(tasks, model_args, metadata)
    for task in tasks:
        scorer = CurveScorer(lm, min_knns, clusterings, settings)
        score_tasks(lm, scorer, [task], manager, limit)
        yield Curve(task, lm.settings | {"limit": limit}, scorer.points)


def _check_model_args(model_args: dict[str, Any]) -> None:
    """Raise UserError for settings of a walk, which the curve sets itself, or which it has none of."""
    for name in ("carry_state", "no_pointer"):
        if model_args.get(name):
            raise UserError(f"{name}=True is not for a curve: leave it out of --model_args.")
    for name in ("min_knns", "max_knns", "clusters", "duplicates"):
        if name in model_args:
            raise UserError(f"{name} in --model_args would not count: give --{name} instead.")


class CurveScorer(PassageScorer):
    """Scores every text by the base LM, kNN-LM, and RetoMaton with each setting; returns the base LM's scores.

    Parameters
    ----------
    lm : a loaded ``knn-hf``, whose LM, retriever and mixture settings are used.
    min_knns : the settings to walk with.
    clusterings : the clusterings to walk with; None among them stands for pointers alone.
    settings : the walks' other settings.
    """

    def __init__(
        self,
        lm: KNNHF,
        min_knns: Sequence[float],
        clusterings: Sequence[Clusters | None],
        settings: AutomatonSettings,
    ) -> None:
        super().__init__(Reader(lm.language_model, lm.softmax_dtype))
        lmbda = lm.augmentation.mixture.weight.constant
        if lmbda is None:
            raise UserError("A curve needs a number for lmbda, not an adaptive one: give lmbda=... or params=False.")
        self._lmbda, self._knn_temp = lmbda, lm.augmentation.mixture.knn_temp
        self._values = np.asarray(lm.retriever.values)
        # What the walks search with may give other distances than kNN-LM has: exact ones, as their pointers'.
        self._retriever = self._walks_retriever = lm.retriever
        self._base = CurvePoint("base")
        self._knn_lm = CurvePoint("knn-lm", distances=lm.retriever.kind_of_distances)
        self._walkers: list[tuple[CurvePoint, Automaton]] = []
        for clusters in clusterings:
            name = None if clusters is None else clusters.path.name
            automaton, self._walks_retriever = open_automaton(lm.retriever, settings, clusters)
            for number in min_knns:
                walker = automaton.with_settings(replace(settings, min_knns=number))
                point = CurvePoint("retomaton", name, number, self._walks_retriever.kind_of_distances)
                self._walkers.append((point, walker))
        if len({point.distances for point in self.points[1:]}) > 1:
            logger.warning(
                "kNN-LM is scored with approximate distances and RetoMaton with exact ones, since the index %s gives "
                "none to its pointers: for a curve that compares them add recompute_dists=True to --model_args.",
                lm.retriever.factory,
            )

    @property
    def points(self) -> list[CurvePoint]:
        """What has been summed up so far."""
        return [self._base, self._knn_lm, *(point for point, _ in self._walkers)]

    @property
    def rows_at_once(self) -> int:
        """See ``POSITIONS_AT_ONCE``."""
        return POSITIONS_AT_ONCE

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every setting; the index is searched once."""
        if want_greedy:
            raise UserError("A curve is for tasks that score whole texts (perplexity), such as wikitext103 or law.")
        base_log_probs, walks = [], []
        for reading in readings:
            base = self.reader.target_log_probs(reading).double()
            base_log_probs.append(base)
            walks += self._score_knn_lm(reading, base)
        base = torch.cat(base_log_probs)  # [tokens]
        self._base.log_prob += float(base.sum())
        for point, automaton in self._walkers:
            candidates_before = automaton.statistics.candidates
            automaton.walk(walks)
            log_p_knn = torch.from_numpy(np.concatenate([walk.log_p_knn for walk in walks]))  # [tokens]
            point.log_prob += float(mix(base, log_p_knn, self._lmbda).sum())
            point.searches += sum(walk.searches for walk in walks)
            point.candidates += automaton.statistics.candidates - candidates_before
        self.tokens_scored += len(base)
        for point in self.points:
            point.tokens = self.tokens_scored
        return scores_of_readings(readings, base)

    def _score_knn_lm(self, reading: Reading, base: Tensor) -> list[Walk]:
        """Add a batch to kNN-LM's point; returns its continuations, to walk along, with what was found."""
        rows, targets = reading.pairs()
        queries = reading.queries.float().cpu().numpy()  # [rows, dimension]
        distances, entries = self._retriever.find(queries)  # [rows, k]
        values = torch.from_numpy(self._values[np.maximum(entries, 0)])
        # A store that RetoMaton can walk over has no weights.
        log_weights = neighbour_log_weights(torch.from_numpy(distances), self._knn_temp, None)
        log_p_knn = knn_log_prob(log_weights[rows], values[rows], targets).double()
        self._knn_lm.log_prob += float(mix(base, log_p_knn, self._lmbda).sum())
        self._knn_lm.searches += len(rows)
        if self._walks_retriever is not self._retriever:
            distances, entries = self._walks_retriever.find(queries)
        places = [slice(end - len(continuation), end) for end, continuation in reading.asked]
        return [
            Walk(queries[here], np.array(continuation), found=(distances[here], entries[here]))
            for here, (_, continuation) in zip(places, reading.asked, strict=True)
        ]
