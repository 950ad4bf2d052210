"""Perplexity with a part of the datastore, for parts of several sizes, from one forward pass.

A part is a random choice of entries, and smaller parts lie inside larger ones. One search finds the nearest entries
of the whole store; a part's neighbours are the k nearest of those among them that belong to it. Where fewer belong to
it, wider searches follow, for these tokens and this part, until there are k (or all of the store was searched).
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
from knn_lm_eval.search.retriever import Found, Retriever
from knn_lm_eval.study.run import find_tasks, load_knn_hf, one_store, perplexity, score_tasks

DEFAULT_SEED = 0
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class SizePoint:
    """A part of the store, and its sums over all that was scored; ``fraction`` 0 is the LM alone.

    ``neighbours`` are those that p_kNN is made of, ``searched`` those among which they were found.
    """

    fraction: float
    entries: int
    log_prob: float = 0.0
    tokens: int = 0
    neighbours: int = 0
    searched: int = 0

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
            "mean_searched": round(self.searched / self.tokens, 1),
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
    searched : neighbours that the first search finds; None is 4 k.
    seed : of the choice of entries.
    metadata, limit : as for lm-eval: what tasks ask for; documents per task.
    """
    lm = load_knn_hf(model_args)
    one_store(lm, "The comparison of a store's parts")
    k = int(lm.settings["k"])
    searched = min(searched or 4 * k, lm.retriever.datastore.kept)
    if searched < k:
        raise UserError(f"--searched {searched} is less than k={k}.")
    manager = find_tasks(tasks, model_args, metadata)
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
    searched : neighbours that the first search finds, at least k, as None is.
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
        self._widened: dict[tuple[int, int | None], Retriever] = {}
        count = lm.retriever.datastore.kept
        self._base = SizePoint(0.0, 0)
        self._parts = [SizePoint(fraction, round(fraction * count)) for fraction in sorted(set(fractions))]

    @property
    def points(self) -> list[SizePoint]:
        """What has been summed up so far, the LM alone first."""
        return [self._base, *self._parts]

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every part."""
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
            self._add(self._parts, self._retriever, queries, targets[here], base[here].double())
        self.tokens_scored += len(rows)
        for point in self.points:
            point.tokens = self.tokens_scored
        return sum_up(reading, base)

    def _add(
        self, parts: Sequence[SizePoint], retriever: Retriever, queries: Tensor, targets: Tensor, base: Tensor
    ) -> None:
        """Add tokens to the sums of some parts, by one search, and by wider ones for those that lack neighbours."""
        found = retriever.search(queries)
        empty = bool((found.entries < 0).any())
        positions = torch.from_numpy(positions_of_entries(found.entries.numpy(), self._seed))  # [tokens, searched]
        for part in parts:
            inside = (positions < part.fraction) & (found.entries >= 0)
            inside &= inside.cumsum(dim=-1) <= self._k
            lacking = inside.sum(dim=-1) < min(self._k, part.entries)  # [tokens]
            wider = self._wider(retriever, empty) if lacking.any() else None
            if wider is None:
                lacking[:] = False
            self._add_found(part, found, inside, targets, base, ~lacking)
            if wider is not None:
                (some,) = lacking.nonzero(as_tuple=True)
                for few in some.split(max(1, NEIGHBOURS_PER_BLOCK // wider.k)):
                    self._add([part], wider, queries[few.to(queries.device)], targets[few], base[few])

    def _add_found(
        self, part: SizePoint, found: Found, inside: Tensor, targets: Tensor, base: Tensor, tokens: Tensor
    ) -> None:
        """Add those of the ``tokens``, bool ``[n]``, to a part, by the neighbours that are ``inside`` of it."""
        counts = None if found.counts is None else found.counts[tokens]
        distances = found.distances.masked_fill(~inside, math.inf)[tokens]
        log_weights = neighbour_log_weights(distances, self._knn_temp, counts)
        log_p_knn = knn_log_prob(log_weights, found.values[tokens], targets[tokens])
        part.log_prob += float(mix(base[tokens], log_p_knn.double(), self._lmbda).sum())
        part.neighbours += int(inside[tokens].sum())
        part.searched += int((found.entries[tokens] >= 0).sum())

    def _wider(self, retriever: Retriever, empty: bool) -> Retriever | None:
        """A retriever for twice the neighbours, and from twice the lists where those searched hold no more; None where
        all of the store was searched."""
        k, probe = retriever.k, retriever.probe
        wider_k = min(2 * k, retriever.datastore.kept)
        wider_probe = 2 * probe if empty and probe is not None else probe
        if (wider := self._widened.get((k, wider_probe))) is None:
            wider = self._widened[k, wider_probe] = retriever.with_settings(k=wider_k, probe=wider_probe)
        return None if (wider.k, wider.probe) == (k, probe) else wider
