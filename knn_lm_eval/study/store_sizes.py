"""Perplexity with a part of the datastore, for parts of several sizes, from one forward pass and one search.

A part is a random choice of entries, and smaller parts lie inside larger ones. One search finds the nearest entries
of the whole store; a part's neighbours are those among them that belong to it, at most k. So a small part has fewer
than k neighbours, the nearest ones (exactly these where the search is exact): the heaviest of those that a search in
the part alone would find.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import Reader, Reading
from knn_lm_eval.make.pruning import positions_of_entries
from knn_lm_eval.methods.mixture import knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.scores import Score, sum_up
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK, PassageScorer
from knn_lm_eval.search.retriever import Found
from knn_lm_eval.study.run import find_tasks, load_knn_hf, perplexity, score_tasks

DEFAULT_SEED = 0
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class SizePoint:
    """A part of the store, and its sums over all that was scored; ``fraction`` 0 is the LM alone."""

    fraction: float
    entries: int
    log_prob: float = 0.0
    tokens: int = 0
    neighbours: int = 0

    @property
    def perplexity(self) -> float:
        """Per token of the LM's own tokenizer."""
        return perplexity(self.log_prob, self.tokens)

    def row(self) -> dict[str, Any]:
        """As it stands in tables and files."""
        return {
            "fraction": self.fraction,
            "entries": self.entries,
            "token_perplexity": round(self.perplexity, 4),
            "mean_neighbours": round(self.neighbours / self.tokens, 1),
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Sizes:
    """One task's points, the LM alone first; ``settings`` are those that hold for all."""

    task: str
    settings: dict[str, Any]
    points: list[SizePoint]


def store_sizes(
    model_args: dict[str, Any],
    tasks: Sequence[str],
    *,
    fractions: Sequence[float] = FRACTIONS,
    searched: int | None = None,
    seed: int = DEFAULT_SEED,
    metadata: dict[str, Any] | None = None,
    limit: float | None = None,
) -> Iterator[Sizes]:
    """The perplexity of each task with each part of the store.

    Parameters
    ----------
    model_args : as for ``KNNHF``; a part's neighbours are at most its ``k``.
    tasks : perplexity tasks.
    fractions : the parts' sizes, above 0 and at most 1.
    searched : neighbours that the one search finds; None is 4 k.
    seed : of the choice of entries.
    metadata, limit : as for lm-eval: what tasks ask for; documents per task.
    """
    lm = load_knn_hf(model_args)
    k = int(lm.settings["k"])
    searched = min(searched or 4 * k, len(lm.retriever.datastore))
    if searched < k:
        raise UserError(f"--searched {searched} is less than k={k}.")
    manager = find_tasks(model_args, metadata)
    for task in tasks:
        scorer = StoreSizeScorer(lm, fractions, searched, seed)
        score_tasks(lm, scorer, [task], manager, limit)
        yield Sizes(task, lm.settings | {"limit": limit, "searched": searched, "seed": seed}, scorer.points)


class StoreSizeScorer(PassageScorer):
    """Scores every text with each part of the store; returns the base LM's scores.

    Parameters
    ----------
    lm : a loaded ``knn-hf``, whose LM, retriever and mixture settings are used; a part has at most its k neighbours.
    fractions : the parts' sizes, above 0 and at most 1.
    searched : neighbours that the one search finds, at least k, as None is.
    seed : of the choice of entries.
    """

    def __init__(
        self, lm: KNNHF, fractions: Sequence[float], searched: int | None = None, seed: int = DEFAULT_SEED
    ) -> None:
        super().__init__(Reader(lm.language_model, lm.softmax_dtype))
        lmbda = lm.augmentation.mixture.weight.constant
        if lmbda is None:
            raise UserError("Sizes are compared with one lmbda for all tokens: give lmbda=NUMBER in --model_args.")
        if lm.settings.get("retomaton"):
            raise UserError("Sizes are compared for kNN-LM: leave retomaton out of --model_args.")
        if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
            raise UserError(f"The fraction {wrong[0]:g} of the datastore must be above 0 and at most 1.")
        self._lmbda, self._knn_temp = lmbda, lm.augmentation.mixture.knn_temp
        self._k, self._seed = lm.retriever.k, seed
        self._retriever = lm.retriever.with_settings(k=searched)
        count = len(lm.retriever.datastore)
        self._base = SizePoint(0.0, 0)
        self._parts = [SizePoint(fraction, round(fraction * count)) for fraction in sorted(set(fractions))]

    @property
    def points(self) -> list[SizePoint]:
        """What has been summed up so far, the LM alone first."""
        return [self._base, *self._parts]

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every part; the index is searched once."""
        if want_greedy:
            raise UserError("Sizes are compared on tasks that score whole texts (perplexity), such as law.")
        return [scores for reading in readings for scores in self._score_sizes(reading)]

    def _score_sizes(self, reading: Reading) -> list[list[Score]]:
        rows, targets = reading.pairs()
        base = self.reader.target_log_probs(reading)  # [tokens]
        self._base.log_prob += float(base.double().sum())
        block = max(1, NEIGHBOURS_PER_BLOCK // self._retriever.k)
        for start in range(0, len(rows), block):
            here = slice(start, start + block)
            queries = reading.queries[rows[here].to(reading.queries.device)]
            self._add(self._retriever.search(queries), targets[here], base[here].double())
        self.tokens_scored += len(rows)
        for point in self.points:
            point.tokens = self.tokens_scored
        return sum_up(reading, base)

    def _add(self, found: Found, targets: Tensor, base: Tensor) -> None:
        """Add tokens to each part's sums."""
        positions = torch.from_numpy(positions_of_entries(found.entries.numpy(), self._seed))  # [tokens, searched]
        for part in self._parts:
            inside = (positions < part.fraction) & (found.entries >= 0)
            inside &= inside.cumsum(dim=-1) <= self._k
            distances = found.distances.masked_fill(~inside, math.inf)
            log_weights = neighbour_log_weights(distances, self._knn_temp, found.counts)
            log_p_knn = knn_log_prob(log_weights, found.values, targets)
            part.log_prob += float(mix(base, log_p_knn.double(), self._lmbda).sum())
            part.neighbours += int(inside.sum())
