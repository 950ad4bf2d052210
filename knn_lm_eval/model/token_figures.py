"""What scoring knows of each token beside its log-probability, for those who ask for records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knn_lm_eval.lm.reading import PairsByRow, Reader, Reading
from knn_lm_eval.methods.distributions import entropies, ranks
from knn_lm_eval.methods.mixture import WeighedNeighbours
from knn_lm_eval.report.record_files import HEAVIEST, NOT_KNOWN


class TokenFigures(NamedTuple):
    """Of ``n`` tokens, each in its context; ``[n]`` where nothing else is said.

    Attributes
    ----------
    lm_log_prob, knn_log_prob, ngram_log_prob, log_prob : float32, natural logarithms, by the LM, the neighbours (minus
        infinity where none has the token, NaN where there is no neighbour), an n-gram LM (NaN where none is mixed in,
        or it has no p) and their mixture.
    entropy : float32, of the LM's distribution, in nats.
    rank : int32, of the token in it, from 1; tokens that tie have one rank.
    nearest : float32, the smallest distance; infinity where there is no neighbour.
    lmbda : float32, the weight of the neighbours; 0 where there are none.
    searched : bool, whether the index was searched.
    entries : int64 ``[n, HEAVIEST]``, the neighbours that weigh most, heaviest first; -1 where there are fewer.
    weights : float32 ``[n, HEAVIEST]``, their shares of p_kNN.
    """

    lm_log_prob: Tensor
    knn_log_prob: Tensor
    ngram_log_prob: Tensor
    log_prob: Tensor
    entropy: Tensor
    rank: Tensor
    nearest: Tensor
    lmbda: Tensor
    searched: Tensor
    entries: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> TokenFigures:
        """Of so many tokens without neighbours; what the LM says of them is undefined."""
        return cls(
            lm_log_prob=torch.empty(count, device=device),
            knn_log_prob=torch.full((count,), math.nan, device=device),
            ngram_log_prob=torch.full((count,), math.nan, device=device),
            log_prob=torch.empty(count, device=device),
            entropy=torch.empty(count, device=device),
            rank=torch.empty(count, dtype=torch.int32, device=device),
            nearest=torch.full((count,), math.inf, device=device),
            lmbda=torch.zeros(count, device=device),
            searched=torch.zeros(count, dtype=torch.bool, device=device),
            entries=torch.full((count, HEAVIEST), NOT_KNOWN, device=device),
            weights=torch.zeros(count, HEAVIEST, device=device),
        )

    def put_lm(self, here: slice, table: Tensor, at: Tensor, targets: Tensor) -> None:
        """Fill in what the LM says of the tokens ``here``.

        Parameters
        ----------
        table : its log-probabilities, ``[rows, vocabulary]``.
        at, targets : int64, the tokens' rows of the table and the tokens themselves.
        """
        self.lm_log_prob[here] = table[at, targets].float()
        self.entropy[here] = entropies(table)[at]
        self.rank[here] = ranks(table, at, targets)

    def put_mixed(
        self, here: slice, at: Tensor, neighbours: WeighedNeighbours, knn_log_prob: Tensor, lmbda: float | Tensor
    ) -> None:
        """Fill in what the neighbours say of the tokens ``here``; their rows are ``at``, as ``lmbda``'s are."""
        self.knn_log_prob[here] = knn_log_prob
        self.nearest[here] = neighbours.distances.amin(dim=-1)[at]
        weight = lmbda[at].float() if isinstance(lmbda, Tensor) else torch.full_like(knn_log_prob, lmbda)
        self.lmbda[here] = weight.masked_fill(knn_log_prob.isnan(), 0.0)

    def put_heaviest(self, here: slice, at: Tensor, log_weights: Tensor, entries: Tensor) -> None:
        """Fill in which neighbours weigh most, of ``[rows, k]``."""
        weights, slots = log_weights.topk(min(HEAVIEST, log_weights.shape[1]), dim=-1)
        chosen = entries.to(slots.device).gather(-1, slots)
        self.entries[here, : slots.shape[1]] = chosen[at]
        self.weights[here, : slots.shape[1]] = weights.exp()[at]

    def reordered(self, pairs: PairsByRow) -> TokenFigures:
        """In the order in which the pairs were given, on the CPU."""
        return TokenFigures(*(pairs.as_given(part) for part in self))

    def with_mixture(self, log_prob: Tensor, ngram_log_prob: Tensor | None) -> TokenFigures:
        """With what the whole mixture says, and n-grams alone where they are mixed in."""
        by_ngrams = self.ngram_log_prob if ngram_log_prob is None else ngram_log_prob.float()
        return self._replace(log_prob=log_prob.float(), ngram_log_prob=by_ngrams)

    def split(self, lengths: Sequence[int]) -> list[TokenFigures]:
        """Those of consecutive parts."""
        parts = (part.split(list(lengths)) for part in self)
        return [TokenFigures(*of_part) for of_part in zip(*parts, strict=True)]


class LMScores(NamedTuple):
    """What the LM alone says of the tokens of a reading, in order.

    Attributes
    ----------
    log_probs : ``[tokens]``, of the table's dtype.
    greedy : whether the token is the most probable one; None where nobody wants to know.
    figures : all the rest; the mixture is the LM.
    """

    log_probs: Tensor
    greedy: Tensor | None
    figures: TokenFigures


@torch.inference_mode()
def lm_scores(reader: Reader, reading: Reading, want_greedy: bool) -> LMScores:
    """As ``reader.target_scores``, with the tokens' figures."""
    pairs = PairsByRow(*reading.pairs(), reading.hidden.device)
    figures = TokenFigures.empty(len(pairs), reading.hidden.device)
    greedy = torch.zeros(len(pairs), dtype=torch.bool, device=reading.hidden.device) if want_greedy else None
    log_probs = None
    for start, stop, table in reader.tables(reading.hidden, 0, len(reading.hidden)):
        here, at = pairs.within(start, stop)
        if log_probs is None:
            log_probs = table.new_empty(len(pairs))
        log_probs[here] = table[at, pairs.targets[here]]
        if greedy is not None:  # it takes as long as the softmax
            greedy[here] = table.argmax(dim=-1)[at] == pairs.targets[here]
        figures.put_lm(here, table, at, pairs.targets[here])
    figures.log_prob.copy_(figures.lm_log_prob)
    assert log_probs is not None, "no batch is empty"
    of_pairs = None if greedy is None else pairs.as_given(greedy)
    return LMScores(pairs.as_given(log_probs), of_pairs, figures.reordered(pairs))
