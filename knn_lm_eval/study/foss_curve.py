"""Perplexity against the fraction of saved searches (FoSS): many of RetoMaton's settings from one pass and search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk
from knn_lm_eval.methods.mixture import knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.model.scoring import Passage, Score, Scorer
from knn_lm_eval.store.clusters import Clusters, cluster_names
from knn_lm_eval.study.run import find_tasks, load_knn_hf, perplexity, score_tasks

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
    tokens, searches, candidates : counts.
    """

    method: str
    clusters: str | None = None
    min_knns: float | None = None
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
    lm = load_knn_hf(model_args)
    store = lm.retriever.datastore
    names = ["none", *cluster_names(store)] if clusters is None else clusters
    clusterings = [None if name == "none" else Clusters.open(store, name) for name in names]
    settings = AutomatonSettings(lm.settings["k"], lm.settings["knn_temp"], max_knns=max_knns, duplicates=duplicates)
    manager = find_tasks(model_args, metadata)
    for task in tasks:
        scorer = CurveScorer(lm, min_knns, clusterings, settings)
        score_tasks(lm, scorer, [task], manager, limit)
        yield Curve(task, lm.settings | {"limit": limit}, scorer.points)


class CurveScorer(Scorer):
    """Scores every text by the base LM, kNN-LM, and RetoMaton with each setting; returns the base LM's scores.

    Parameters
    ----------
    lm : a loaded ``knn-hf``, whose LM, retriever and mixture settings are used.
    min_knns : the settings to walk with.
    clusterings : the clusterings to walk with; None among them stands for pointers alone.
    max_knns, duplicates : as for ``AutomatonSettings``.
    """

    def __init__(
        self,
        lm: KNNHF,
        min_knns: Sequence[float],
        clusterings: Sequence[Clusters | None],
        settings: AutomatonSettings,
    ) -> None:
        if not isinstance(lm.settings["lmbda"], float):
            raise UserError("A curve needs a number for lmbda, not an adaptive one: give lmbda=... or params=False.")
        self.constant: float = lm.settings["lmbda"]
        super().__init__(lm.scorer.model, lm.retriever, self.constant, lm.settings["knn_temp"], lm.softmax_dtype)
        self.values = np.asarray(lm.retriever.values)
        self.base, self.knn_lm = CurvePoint("base"), CurvePoint("knn-lm")
        self.walkers: list[tuple[CurvePoint, Automaton]] = []
        for clusters in clusterings:
            name = None if clusters is None else clusters.path.name
            automaton, self.retriever = open_automaton(lm.retriever, settings, clusters)
            for number in min_knns:
                walker = automaton.with_settings(replace(settings, min_knns=number))
                self.walkers.append((CurvePoint("retomaton", name, number), walker))

    @property
    def points(self) -> list[CurvePoint]:
        """What has been summed up so far."""
        return [self.base, self.knn_lm, *(point for point, _ in self.walkers)]

    @property
    def rows_at_once(self) -> int:
        """See ``POSITIONS_AT_ONCE``."""
        return POSITIONS_AT_ONCE

    def score(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every setting; the LM reads once, the index is searched once."""
        if want_greedy:
            raise UserError("A curve is for tasks that score whole texts (perplexity), such as wikitext103 or law.")
        assert self.retriever is not None
        sizes, log_probs, walks = [], [], []
        for batch in batches:
            reading = self._read(batch)
            rows, targets = reading.pairs()
            base = self._score_pairs(reading.hidden, rows, targets, None, len(reading.hidden), False)[0].double()
            queries = reading.queries.float().cpu().numpy()
            distances, entries = self.retriever.find(queries)
            values = torch.from_numpy(self.values[np.maximum(entries, 0)])
            # A store that RetoMaton can walk over has no weights.
            weights = neighbour_log_weights(torch.from_numpy(distances), self.knn_temp, None)
            knn = mix(base, knn_log_prob(weights[rows], values[rows], targets).double(), self.constant)
            self.base.log_prob += float(base.sum())
            self.knn_lm.log_prob += float(knn.sum())
            self.knn_lm.searches += len(rows)
            for end, continuation in reading.asked:
                here = slice(end - len(continuation), end)
                walks.append(Walk(queries[here], np.array(continuation), found=(distances[here], entries[here])))
            log_probs.append(base)
            sizes += reading.sizes
        base = torch.cat(log_probs)
        for point, automaton in self.walkers:
            before = automaton.statistics.candidates
            automaton.walk(walks)
            log_p_knn = torch.from_numpy(np.concatenate([walk.log_p_knn for walk in walks]))
            point.log_prob += float(mix(base, log_p_knn, self.constant).sum())
            point.searches += sum(walk.searches for walk in walks)
            point.candidates += automaton.statistics.candidates - before
        for point in self.points:
            point.tokens += len(base)
        # lm-eval's own report is of the base LM; the points are what was asked for.
        scores = iter([Score(float(part.sum()), False) for part in base.split([len(w.targets) for w in walks])])
        return [[next(scores) for _ in range(size)] for size in sizes]
