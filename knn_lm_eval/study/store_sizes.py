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

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.pruning import positions_of_entries
from knn_lm_eval.methods.mixture import knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK, Passage, Score, Scorer
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
    lm.retriever.k = searched
    manager = find_tasks(model_args, metadata)
    for task in tasks:
        scorer = StoreSizeScorer(lm, k, fractions, seed)
        score_tasks(lm, scorer, [task], manager, limit)
        yield Sizes(task, lm.settings | {"limit": limit, "searched": searched, "seed": seed}, scorer.points)


class StoreSizeScorer(Scorer):
    """Scores every text with each part of the store; returns the base LM's scores.

    Parameters
    ----------
    lm : a loaded ``knn-hf``, whose LM, retriever and mixture settings are used.
    k : neighbours that a part has at most.
    fractions : the parts' sizes, above 0 and at most 1.
    seed : of the choice of entries.
    searched : neighbours that the one search finds; None is the ``k`` of ``lm``.
    """

    def __init__(
        self, lm: KNNHF, k: int, fractions: Sequence[float], seed: int = DEFAULT_SEED, searched: int | None = None
    ) -> None:
        if not isinstance(lm.settings["lmbda"], (int, float)):
            raise UserError("Sizes are compared with one lmbda for all tokens: give lmbda=NUMBER in --model_args.")
        if lm.settings.get("retomaton"):
            raise UserError("Sizes are compared for kNN-LM: leave retomaton out of --model_args.")
        self.constant = float(lm.settings["lmbda"])
        retriever = lm.retriever.with_settings(k=searched)
        super().__init__(lm.scorer.model, retriever, self.constant, lm.settings["knn_temp"], lm.softmax_dtype)
        if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
            raise UserError(f"The fraction {wrong[0]:g} of the datastore must be above 0 and at most 1.")
        self.k, self.seed = k, seed
        count = len(lm.retriever.datastore)
        self.base = SizePoint(0.0, 0)
        self.parts = [SizePoint(fraction, round(fraction * count)) for fraction in sorted(set(fractions))]

    @property
    def points(self) -> list[SizePoint]:
        """What has been summed up so far."""
        return [self.base, *self.parts]

    def score(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every part; the LM reads once, the index is searched once."""
        if want_greedy:
            raise UserError("Sizes are compared on tasks that score whole texts (perplexity), such as law.")
        return [scores for batch in batches for scores in self._score_sizes(batch)]

    def _score_sizes(self, batch: Sequence[Passage]) -> list[list[Score]]:
        assert self.retriever is not None
        reading = self._read(batch)
        rows, targets = reading.pairs()
        base = self._score_pairs(reading.hidden, rows, targets, None, len(reading.hidden), False)[0]
        self.base.log_prob += float(base.double().sum())
        block = max(1, NEIGHBOURS_PER_BLOCK // self.retriever.k)
        for start in range(0, len(rows), block):
            here = slice(start, start + block)
            queries = reading.queries[rows[here].to(reading.queries.device)]
            distances, values, entries, counts = self.retriever.search(queries)
            positions = torch.from_numpy(positions_of_entries(entries.numpy(), self.seed))
            for part in self.parts:
                inside = (positions < part.fraction) & (entries >= 0)
                inside &= inside.cumsum(dim=-1) <= self.k
                weights = neighbour_log_weights(distances.masked_fill(~inside, math.inf), self.knn_temp, counts)
                log_p_knn = knn_log_prob(weights, values, targets[here])
                part.log_prob += float(mix(base[here].double(), log_p_knn.double(), self.constant).sum())
                part.neighbours += int(inside.sum())
        for point in self.points:
            point.tokens += len(rows)
        return self._sum_up(reading, base, torch.zeros(len(rows), dtype=torch.bool))
