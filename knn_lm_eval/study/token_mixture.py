"""What is known of a text's tokens, and their mixture: neighbours and the LM's figures, whatever setting mixes them.

Nothing here is as large as [tokens, vocabulary]: of the LM's distributions what a mixture looks at is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from knn_lm_eval.lm.reading import Reader, Reading
from knn_lm_eval.methods.adaptive import Weight
from knn_lm_eval.methods.mixture import Mixture, knn_log_prob, mix
from knn_lm_eval.model.ngram_mixture import NgramReader

CPU = torch.device("cpu")


class LMFigures(NamedTuple):
    """What LM and n-grams say of ``n`` tokens; all on the CPU.

    Attributes
    ----------
    targets : int64 ``[n]``, the tokens.
    log_prob : float32 ``[n]``, log p_LM.
    features : float32 ``[n, 2]``, the weight's ``lm_features``; None where it looks at none.
    ngram_log_prob : float64 ``[n]``, NaN where there is none; None where n-grams are not mixed in.
    """

    targets: Tensor
    log_prob: Tensor
    features: Tensor | None
    ngram_log_prob: Tensor | None

    def of_rows(self, here: slice) -> LMFigures:
        """Those of some tokens."""
        return LMFigures(*(None if part is None else part[here] for part in self))  # type: ignore[arg-type]

    @classmethod
    def of_windows(cls, windows: list[LMFigures]) -> LMFigures:
        """Those of consecutive windows, as of one."""
        parts = (None if of_all[0] is None else torch.cat(of_all) for of_all in zip(*windows, strict=True))
        return cls(*parts)  # type: ignore[arg-type]


class FoundForTokens(NamedTuple):
    """What was found for ``n`` tokens, ``[n, slots]``; ``searched`` bool ``[n]``, None where all were."""

    distances: Tensor
    values: Tensor
    entries: Tensor
    counts: Tensor | None
    searched: Tensor | None

    def of_first(self, k: int) -> FoundForTokens:
        """The first ``k`` slots."""
        counts = None if self.counts is None else self.counts[:, :k]
        return FoundForTokens(
            self.distances[:, :k], self.values[:, :k], self.entries[:, :k], counts, searched=self.searched
        )


class Figures(NamedTuple):
    """Of ``n`` tokens: the neighbours' log weights ``[n, slots]``, all else ``[n]``."""

    log_weights: Tensor
    lm_log_prob: Tensor
    knn_log_prob: Tensor
    log_prob: Tensor
    searched: Tensor


@torch.inference_mode()
def lm_figures(reader: Reader, reading: Reading, weight: Weight, ngrams: NgramReader) -> LMFigures:
    """What the LM and the n-grams say of the tokens of one window, whose one continuation is all of it."""
    rows, targets = reading.pairs()
    log_prob, features = torch.empty(len(targets)), []
    for start, stop, table in reader.tables(reading.hidden, 0, len(reading.hidden)):
        of_table = targets[start:stop].to(table.device)
        log_prob[start:stop] = table.gather(-1, of_table[:, None])[:, 0].float().cpu()
        if (part := weight.lm_features(table)) is not None:
            features.append(part.cpu())
    of_ngrams = ngrams.of_reading(reading)
    return LMFigures(
        targets,
        log_prob,
        torch.cat(features) if features else None,
        None if of_ngrams is None else of_ngrams.log_probs(rows, targets),
    )


@torch.inference_mode()
def mixed_figures(mixture: Mixture, ngram_lmbda: float, lm: LMFigures, found: FoundForTokens) -> Figures:
    """The tokens' probabilities with one setting."""
    neighbours = mixture.weigh(found.distances, found.values, found.counts, CPU)
    knn = knn_log_prob(neighbours.log_weights, neighbours.values, lm.targets)
    mixed = mix(lm.log_prob.double(), knn.double(), mixture.lmbda(lm.features, neighbours))
    if lm.ngram_log_prob is not None:
        mixed = mix(mixed, lm.ngram_log_prob, ngram_lmbda)
    searched = found.searched
    if searched is None:
        wanted = mixture.weight.wants_search(lm.features)
        searched = torch.ones(len(lm.targets), dtype=torch.bool) if wanted is None else wanted
    return Figures(neighbours.log_weights, lm.log_prob, knn, mixed, searched)
