"""Log-probabilities of given tokens under the kNN-LM: one forward pass, one batched search, the mixture.

p_kNN exists only for the tokens that are asked for, and the LM's distribution for a few positions at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knn_lm_eval.lm.reading import PairsByRow, Passage, Reader, Reading
from knn_lm_eval.methods.adaptive import Constant
from knn_lm_eval.methods.mixture import (
    Mixture,
    WeighedNeighbours,
    greedy_tokens,
    knn_log_prob,
    mix,
    mixed_log_probs,
    take_rows,
)
from knn_lm_eval.model.exclusion import Exclusion
from knn_lm_eval.model.neighbours import (
    FindNeighbours,
    Neighbours,
    counts_of,
    find_none,
    find_some,
    finding_others,
    seconds_of,
)
from knn_lm_eval.model.ngram_mixture import NgramMixture, NgramReader, NgramRows
from knn_lm_eval.model.scores import Score, sum_up
from knn_lm_eval.model.token_figures import TokenFigures, lm_scores
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.system.timing import StageTimer

NEIGHBOURS_PER_BLOCK = 2**21  # 16 bytes each
ROWS_PER_BLOCK = 2**12  # where there are no neighbours


class PassageScorer(ABC):
    """Scores batches of passages, which a reader reads; what ``knn-hf`` gives its requests to.

    Parameters
    ----------
    reader : reads for this scorer alone.
    keeps_figures : whether scores have their tokens' figures, for records.

    Attributes
    ----------
    tokens_scored : so far.
    reads_all_first : whether a call reads all its batches before any is scored, whatever their number; trying out a
        size of batches is ``try_out`` then.
    """

    reads_all_first = False

    def __init__(self, reader: Reader, keeps_figures: bool = False) -> None:
        self.reader, self.keeps_figures = reader, keeps_figures
        self.tokens_scored = 0

    def score(
        self, batches: Sequence[Sequence[Passage]], want_greedy: bool, following: Sequence[Passage] | None = None
    ) -> list[list[Score]]:
        """Score batches of passages; the LM reads a batch at a time.

        Parameters
        ----------
        want_greedy : whether the scores' ``is_greedy`` is asked for.
        following : the first batch of the next call, which may be read ahead.

        Returns
        -------
        For each passage, in order, the scores of its continuations.
        """
        return self.score_readings([self.reader.read(batch) for batch in batches], want_greedy)

    def try_out(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> None:
        """Score batches for what that takes of memory alone."""
        self.score(batches, want_greedy)

    def begin_texts(self) -> None:
        """Forget the texts scored so far: those that come are others, whatever their numbers."""
        return None

    @abstractmethod
    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        """As ``score``, for batches that were read, by whomever."""

    @property
    def rows_at_once(self) -> float:
        """Positions that a call of ``score`` should bring together, in as many batches as that takes."""
        return 1

    @property
    def seconds(self) -> dict[str, float]:
        """What scoring took so far, by stage; searches and walks count theirs elsewhere."""
        return self.reader.seconds

    @property
    def counts(self) -> dict[str, float]:
        """What scoring did so far."""
        return {"tokens_scored": self.tokens_scored}


class LMScorer(PassageScorer):
    """Scores passages by the LM alone, or by LM and n-grams.

    Parameters
    ----------
    reader, keeps_figures : as for ``PassageScorer``.
    ngrams : an n-gram LM that is mixed in.
    """

    def __init__(self, reader: Reader, keeps_figures: bool = False, ngrams: NgramMixture | None = None) -> None:
        super().__init__(reader, keeps_figures)
        mixture = Mixture(Constant(0.0), 1.0)
        self._pairs = None if ngrams is None else MixedPairs(reader, mixture, keeps_figures, ngrams)

    @property
    def seconds(self) -> dict[str, float]:
        return self.reader.seconds | ({} if self._pairs is None else self._pairs.seconds)

    @property
    def counts(self) -> dict[str, float]:
        return super().counts | ({} if self._pairs is None else self._pairs.counts)

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        scores = []
        for reading in readings:
            if self._pairs is not None:
                self.tokens_scored += sum(reading.lengths)
                scores += self._pairs.score_reading(reading, find_none, ROWS_PER_BLOCK, want_greedy)
                continue
            greedy = figures = None
            if self.keeps_figures:
                log_probs, greedy, figures = lm_scores(self.reader, reading, want_greedy)
            elif want_greedy:
                log_probs, greedy = self.reader.target_scores(reading)
            else:
                log_probs = self.reader.target_log_probs(reading)
            self.tokens_scored += len(log_probs)
            scores += sum_up(reading, log_probs, greedy, figures=figures)
        return scores


class PairScores(NamedTuple):
    """What each (row, target) pair got, ``[pairs]``.

    Attributes
    ----------
    log_probs : float32, of the mixture.
    greedy : whether the target is the most probable token; None where nobody asked.
    searched : whether the row was searched; None where all were.
    figures : all that is known of them; None where nobody keeps records.
    """

    log_probs: Tensor
    greedy: Tensor | None
    searched: Tensor | None
    figures: TokenFigures | None


class MixedPairs:
    """Scores (row, target) pairs by the mixture of an LM and neighbours, and then of n-grams.

    Parameters
    ----------
    reader : of the LM.
    mixture : how the two are mixed.
    keeps_figures : whether the pairs' figures are kept; ``find`` is to say which entries the neighbours are, then.
    ngrams : an n-gram LM that is mixed in.

    Attributes
    ----------
    rows_scored, rows_skipped : positions, and those at which the weight wanted no search.
    """

    def __init__(
        self, reader: Reader, mixture: Mixture, keeps_figures: bool = False, ngrams: NgramMixture | None = None
    ) -> None:
        self.reader, self.mixture, self.keeps_figures = reader, mixture, keeps_figures
        self.ngrams = NgramReader(ngrams)
        self.rows_scored, self.rows_skipped = 0, 0
        self._timed = StageTimer(("mixture",), reader.model.device)

    @property
    def seconds(self) -> dict[str, float]:
        return self._timed.seconds | self.ngrams.seconds

    @property
    def counts(self) -> dict[str, float]:
        """What was scored so far."""
        return {"rows": self.rows_scored, "rows_skipped": self.rows_skipped} | self.ngrams.counts

    @torch.inference_mode()
    def score(
        self,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        find: FindNeighbours,
        block: int,
        want_greedy: bool,
        ngrams: NgramRows | None = None,
    ) -> PairScores:
        """Score each pair of a row of ``hidden`` and a target.

        Parameters
        ----------
        hidden : ``[n, width]``.
        rows, targets : int64 ``[pairs]``.
        find : is asked for ``block`` rows at a time, or for those that are worth it.
        ngrams : of the same rows.
        """
        device = hidden.device
        self.rows_scored += len(hidden)
        pairs = PairsByRow(rows, targets, device)
        chooses = self.mixture.weight.threshold is not None
        log_probs = torch.empty(len(pairs), device=device)
        greedy = torch.zeros(len(pairs), dtype=torch.bool, device=device) if want_greedy else None
        searched = torch.empty(len(pairs), dtype=torch.bool, device=device) if chooses else None
        figures = TokenFigures.empty(len(pairs), device) if self.keeps_figures else None
        for block_start in range(0, len(hidden), block):
            block_end = min(block_start + block, len(hidden))
            found = None if chooses else find(torch.arange(block_start, block_end))
            of_block = None if found is None else self._weigh(found, device)
            for start, stop, table in self.reader.tables(hidden, block_start, block_end):
                here, at = pairs.within(start, stop)
                lm_part = self.mixture.weight.lm_features(table)
                if found is not None and of_block is not None:
                    of_table = slice(start - block_start, stop - block_start)
                    neighbours = of_block.of_rows(of_table)
                    entries = None if found.entries is None else found.entries[of_table]
                else:
                    some, wanted = self._where_wanted(lm_part, start, find)
                    neighbours, entries = self._weigh(some, device), some.entries
                    assert searched is not None
                    searched[here] = wanted[at]
                with self._timed("mixture"):
                    lmbda = self.mixture.lmbda(lm_part, neighbours)
                    lm_log_probs = table[at, pairs.targets[here]].float()
                    knn_log_probs = self._knn_log_probs(neighbours, at, pairs.targets[here], block)
                    log_probs[here] = mix(lm_log_probs, knn_log_probs, take_rows(lmbda, at))
                    if greedy is not None:
                        best = self._best(table, neighbours, lmbda, ngrams, start)  # [rows]
                        greedy[here] = best[at] == pairs.targets[here]
                if figures is not None:
                    figures.put_lm(here, table, at, pairs.targets[here])
                    figures.put_mixed(here, at, neighbours, knn_log_probs, lmbda)
                    if entries is not None:
                        figures.put_heaviest(here, at, neighbours.log_weights, entries)
        mixed = pairs.as_given(log_probs)
        by_ngrams = None if ngrams is None else ngrams.log_probs(rows, targets)
        if ngrams is not None and by_ngrams is not None:
            mixed = ngrams.mixed(mixed, by_ngrams)
        if figures is not None:
            searches_all = torch.full_like(figures.searched, not self.mixture.is_lm_alone)
            figures.searched.copy_(searches_all if searched is None else searched)
            figures = figures.reordered(pairs).with_mixture(mixed, by_ngrams)
        return PairScores(
            mixed,
            None if greedy is None else pairs.as_given(greedy),
            None if searched is None else pairs.as_given(searched),
            figures,
        )

    def score_reading(self, reading: Reading, find: FindNeighbours, block: int, want_greedy: bool) -> list[list[Score]]:
        """The scores of a batch that was read; ``find`` and ``block`` as for ``score``."""
        rows, targets = reading.pairs()
        ngrams = self.ngrams.of_reading(reading)
        scored = self.score(reading.hidden, rows, targets, find, block, want_greedy, ngrams)
        log_probs, greedy, searched, figures = scored
        searches = None if searched is None else [int(part.sum()) for part in searched.split(reading.lengths)]
        return sum_up(reading, log_probs, greedy, searches, figures)

    @torch.inference_mode()
    def wanted(self, hidden: Tensor, block: int) -> Tensor:
        """Which rows of ``hidden`` ``score`` will ask for, given the same ``block``: bool ``[n]``, on the CPU."""
        wanted = torch.ones(len(hidden), dtype=torch.bool)
        if self.mixture.weight.threshold is None:
            return wanted
        for block_start in range(0, len(hidden), block):
            for start, stop, table in self.reader.tables(hidden, block_start, min(block_start + block, len(hidden))):
                wants = self.mixture.weight.wants_search(self.mixture.weight.lm_features(table))
                assert wants is not None, "asked only of a weight with a threshold"
                wanted[start:stop] = wants.cpu()
        return wanted

    def _best(
        self,
        table: Tensor,
        neighbours: WeighedNeighbours,
        lmbda: float | Tensor,
        ngrams: NgramRows | None,
        start: int,
    ) -> Tensor:
        """The most probable token of each row of the LM's ``table``, int64 ``[rows]``; the first row is ``start``."""
        if ngrams is None:
            return greedy_tokens(table, neighbours.log_weights, neighbours.values, lmbda)
        of_all = mixed_log_probs(table.float(), neighbours.log_weights, neighbours.values, lmbda)
        ngrams.mix_into(of_all, start)
        return of_all.argmax(dim=-1)

    def _knn_log_probs(self, neighbours: WeighedNeighbours, at: Tensor, targets: Tensor, block: int) -> Tensor:
        """log p_kNN of each target at its row of ``neighbours``, float32 ``[pairs]``; a row may have many."""
        found = torch.empty(len(targets), device=neighbours.log_weights.device)
        for begin in range(0, len(targets), block):
            some = slice(begin, begin + block)
            log_weights, values = neighbours.log_weights[at[some]], neighbours.values[at[some]]  # [pairs, k]
            found[some] = knn_log_prob(log_weights, values, targets[some])
        return found

    def _where_wanted(self, lm_part: Tensor | None, start: int, find: FindNeighbours) -> tuple[Neighbours, Tensor]:
        """The neighbours of the rows from ``start`` on that want a search, and which do, bool ``[rows]``."""
        wanted = self.mixture.weight.wants_search(lm_part)
        assert wanted is not None, "asked only of a weight with a threshold"
        self.rows_skipped += int((~wanted).sum())
        return find_some(wanted.cpu(), start, find), wanted

    def _weigh(self, found: Neighbours, device: torch.device) -> WeighedNeighbours:
        with self._timed("mixture"):
            return self.mixture.weigh(found.distances, found.values, found.counts, device)


class KNNScorer(PassageScorer):
    """Scores passages under kNN-LM: every position that is asked for is searched.

    Parameters
    ----------
    reader : as for ``PassageScorer``.
    retriever : finds the neighbours.
    mixture : how LM and neighbours are mixed.
    keeps_figures : as for ``PassageScorer``.
    ngrams : an n-gram LM that is mixed in.
    exclusion : what is left out of the neighbours; None for nothing.
    """

    def __init__(
        self,
        reader: Reader,
        retriever: Retriever,
        mixture: Mixture,
        keeps_figures: bool = False,
        ngrams: NgramMixture | None = None,
        exclusion: Exclusion | None = None,
    ) -> None:
        super().__init__(reader, keeps_figures)
        self.retriever, self._exclusion = retriever, exclusion
        self._pairs = MixedPairs(reader, mixture, keeps_figures, ngrams)

    def score(
        self, batches: Sequence[Sequence[Passage]], want_greedy: bool, following: Sequence[Passage] | None = None
    ) -> list[list[Score]]:
        scores = []
        for batch, upcoming in zip(batches, [*batches[1:], following], strict=True):
            reading = self.reader.read(batch)
            if self.reader.reads_ahead and upcoming is not None:
                self.reader.read_ahead(upcoming)  # a GPU is at work on it while this thread goes on to search
            scores += self.score_readings([reading], want_greedy)
        return scores

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        return [scores for reading in readings for scores in self._score_reading(reading, want_greedy)]

    @property
    def seconds(self) -> dict[str, float]:
        return self.reader.seconds | self._pairs.seconds | seconds_of(self._exclusion)

    @property
    def counts(self) -> dict[str, float]:
        return super().counts | self._pairs.counts | counts_of(self._exclusion)

    def _score_reading(self, reading: Reading, want_greedy: bool) -> list[list[Score]]:
        def search(rows: Tensor) -> Neighbours:
            found = self.retriever.search(reading.queries[rows])
            return Neighbours(found.distances, found.values, found.counts, found.entries)

        find = finding_others(search, reading, self._exclusion)
        self.tokens_scored += sum(reading.lengths)
        block = max(1, NEIGHBOURS_PER_BLOCK // self.retriever.k)
        return self._pairs.score_reading(reading, find, block, want_greedy)
