"""Scoring under RetoMaton: the LM reads, the automaton walks all continuations side by side, then the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.lm.reading import Passage, Reader, Reading
from knn_lm_eval.methods.automaton import Automaton, Walk, padded_neighbours
from knn_lm_eval.methods.left_out import Contexts
from knn_lm_eval.methods.mixture import Mixture, mix
from knn_lm_eval.model.exclusion import Exclusion
from knn_lm_eval.model.neighbours import Neighbours, counts_of, seconds_of
from knn_lm_eval.model.ngram_mixture import NgramMixture
from knn_lm_eval.model.scores import Score, sum_up
from knn_lm_eval.model.scoring import MixedPairs, PassageScorer
from knn_lm_eval.model.token_figures import TokenFigures, lm_scores
from knn_lm_eval.report.record_files import HEAVIEST

# Memory for queries and hidden states that wait for the walk, and for neighbours kept where is_greedy is asked.
WAITING_BYTES = 2**27


class RetomatonScorer(PassageScorer):
    """Scores passages with RetoMaton instead of a search per token.

    Nothing is read ahead: all batches of a call are read before they are walked.

    Parameters
    ----------
    reader : as for ``PassageScorer``.
    automaton : walks over the datastore.
    mixture : how LM and neighbours are mixed.
    carry_state : let the windows of one text continue each other's walk, instead of beginning anew; for a weight
        that is the same for all tokens.
    keeps_figures : as for ``PassageScorer``.
    ngrams : an n-gram LM that is mixed in.
    exclusion : what the automaton leaves out; None for nothing.
    """

    def __init__(
        self,
        reader: Reader,
        automaton: Automaton,
        mixture: Mixture,
        carry_state: bool = False,
        keeps_figures: bool = False,
        ngrams: NgramMixture | None = None,
        exclusion: Exclusion | None = None,
    ) -> None:
        super().__init__(reader, keeps_figures)
        self.automaton, self.mixture, self.carry_state = automaton, mixture, carry_state
        self._pairs = MixedPairs(reader, mixture, keeps_figures, ngrams)
        self._exclusion = exclusion
        self._survivors: dict[int, np.ndarray] = {}  # of the last text, which may go on in the next call

    @property
    def rows_at_once(self) -> int:
        """As many as wait in little memory, for the walks to have company."""
        return max(1, WAITING_BYTES // (8 * max(self.reader.hidden_size, self.automaton.settings.k)))

    def score(
        self, batches: Sequence[Sequence[Passage]], want_greedy: bool, following: Sequence[Passage] | None = None
    ) -> list[list[Score]]:
        if self._needs_neighbours(want_greedy):  # which take memory: a batch at a time
            return [s for batch in batches for s in self._score_with_neighbours(self.reader.read(batch), want_greedy)]
        return super().score(batches, want_greedy)

    def begin_texts(self) -> None:
        self._survivors.clear()

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        if self._needs_neighbours(want_greedy):
            return [scores for reading in readings for scores in self._score_with_neighbours(reading, want_greedy)]
        return self._score_by_walks(readings)

    @property
    def seconds(self) -> dict[str, float]:
        # The retriever counts the walks' searches as well, but not the distances of pointers.
        walking = {name: value for name, value in self.automaton.statistics.seconds.items() if name != "search"}
        return self.reader.seconds | self._pairs.seconds | walking | seconds_of(self._exclusion)

    @property
    def counts(self) -> dict[str, float]:
        walks = self.automaton.statistics
        walked: dict[str, float] = {
            "steps": walks.steps,
            "walk_searches": walks.searches,
            "candidates": walks.candidates,
        }
        if self._exclusion is not None:
            found = {"neighbours_found": walks.candidates + walks.left_out, "neighbours_left_out": walks.left_out}
            walked |= counts_of(self._exclusion) | found
        return super().counts | walked | self._pairs.ngrams.counts

    @property
    def _heaviest(self) -> int:
        """Of how many candidates a walk is to keep which weigh most."""
        return HEAVIEST if self.keeps_figures else 0

    def _needs_neighbours(self, want_greedy: bool) -> bool:
        return want_greedy or self.mixture.weight.constant is None

    def _score_by_walks(self, readings: Sequence[Reading]) -> list[list[Score]]:
        """All continuations walk together, and leave log p_kNN of their targets alone."""
        lmbda = self.mixture.weight.constant
        assert lmbda is not None, "other weights look at each step's neighbours"
        of_lm: list[tuple[Tensor, TokenFigures | None]] = []
        walks: list[Walk] = []
        for reading in readings:
            if self.keeps_figures:
                scored = lm_scores(self.reader, reading, want_greedy=False)
                of_lm.append((scored.log_probs, scored.figures))
            else:
                of_lm.append((self.reader.target_log_probs(reading), None))
            queries = reading.queries.float().cpu().numpy()  # [rows, dimension]
            contexts = None if self._exclusion is None else self._exclusion.contexts(reading)
            walks += [_walk_along(queries, contexts, end, c) for end, c in reading.asked]
        self._walk(walks, [p.text for reading in readings for p in reading.passages for _ in p.continuations])
        scores, waiting = [], iter(walks)
        for reading, (lm_log_prob, figures) in zip(readings, of_lm, strict=True):
            walked = [next(waiting) for _ in reading.asked]
            log_p_knn = torch.from_numpy(np.concatenate([walk.log_p_knn for walk in walked]))  # [tokens]
            self.tokens_scored += len(log_p_knn)
            log_probs = mix(lm_log_prob.double(), log_p_knn, lmbda)
            by_ngrams = None
            if (ngrams := self._pairs.ngrams.of_reading(reading)) is not None:
                by_ngrams = ngrams.log_probs(*reading.pairs())
                log_probs = ngrams.mixed(log_probs, by_ngrams)
            if figures is not None:
                figures = _with_walks(figures, walked, log_p_knn, lmbda).with_mixture(log_probs, by_ngrams)
            scores += sum_up(reading, log_probs, searches=[walk.searches for walk in walked], figures=figures)
        return scores

    def _walk(self, walks: list[Walk], texts: list[int | None]) -> None:
        """Walk each on its own; with ``carry_state``, those of one text as one."""
        if not self.carry_state:
            self.automaton.walk(walks, keep_heaviest=self._heaviest)
            return
        windows: dict[int | None, list[Walk]] = {}
        for walk, text in zip(walks, texts, strict=True):
            windows.setdefault(text, []).append(walk)
        joined = []
        for text, of_text in windows.items():
            whole = Walk(np.concatenate([w.queries for w in of_text]), np.concatenate([w.targets for w in of_text]))
            if self._exclusion is not None:
                whole.contexts = Contexts.joined([w.contexts for w in of_text if w.contexts is not None])
            if text in self._survivors:
                whole.survivors = self._survivors.pop(text)
            joined.append(whole)
        self.automaton.walk(joined, keep_heaviest=self._heaviest)
        # Only the last text can go on in the next call.
        last = texts[-1]
        self._survivors = {} if last is None else {last: joined[list(windows).index(last)].survivors_at_end}
        for whole, of_text in zip(joined, windows.values(), strict=True):
            ends = np.cumsum([len(walk.queries) for walk in of_text])[:-1]
            for walk, log_p_knn, searched in zip(
                of_text, np.split(whole.log_p_knn, ends), np.split(whole.searched, ends), strict=True
            ):
                walk.log_p_knn, walk.searched = log_p_knn, searched
            if whole.heaviest is not None:
                for walk, heaviest in zip(of_text, whole.heaviest.split(ends), strict=True):
                    walk.heaviest = heaviest

    def _score_with_neighbours(self, reading: Reading, want_greedy: bool) -> list[list[Score]]:
        """Scores with is_greedy or an adaptive weight, for which each step's neighbours must be kept."""
        queries = reading.queries.float().cpu().numpy()  # [rows, dimension]
        # Continuations of one length at one place differ in their last token only: they share a walk.
        walks: dict[tuple[int, int], Walk] = {}
        contexts = None if self._exclusion is None else self._exclusion.contexts(reading)
        for end, continuation in reading.asked:
            walks.setdefault((end, len(continuation)), _walk_along(queries, contexts, end, continuation))
        self.automaton.walk(list(walks.values()), keep_neighbours=True)
        first_step = dict(zip(walks, np.cumsum([0, *(length for _, length in walks)])[:-1].tolist(), strict=True))
        row_of_step = torch.cat([torch.arange(end - length, end) for end, length in walks])  # [steps]
        hidden, ngrams = reading.hidden[row_of_step], self._pairs.ngrams.of_reading(reading)
        ngrams = None if ngrams is None else ngrams.of_rows(row_of_step)
        steps = [neighbours for walk in walks.values() for neighbours in walk.neighbours]

        def find(rows: Tensor) -> Neighbours:
            distances, values, entries = padded_neighbours([steps[row] for row in rows.tolist()], self.automaton.values)
            return Neighbours(distances, values, None, entries)

        rows = torch.cat([torch.arange(len(c)) + first_step[end, len(c)] for end, c in reading.asked])
        targets = reading.pairs()[1]
        self.tokens_scored += len(targets)
        block = max(1, WAITING_BYTES // (16 * (self.automaton.settings.k + self.automaton.settings.max_knns)))
        log_probs, greedy, _, figures = self._pairs.score(hidden, rows, targets, find, block, want_greedy, ngrams)
        if figures is not None:
            searched = np.concatenate([walks[end, len(c)].searched for end, c in reading.asked])
            figures = figures._replace(searched=torch.from_numpy(searched))
        return sum_up(reading, log_probs, greedy, [walks[end, len(c)].searches for end, c in reading.asked], figures)


def _walk_along(queries: np.ndarray, contexts: Contexts | None, end: int, continuation: list[int]) -> Walk:
    """The walk along a continuation, whose last row of a batch's queries ``[rows, dimension]`` is before ``end``."""
    rows = slice(end - len(continuation), end)
    return Walk(queries[rows], np.array(continuation), contexts=None if contexts is None else contexts.of_rows(rows))


def _with_walks(figures: TokenFigures, walks: Sequence[Walk], log_p_knn: Tensor, lmbda: float) -> TokenFigures:
    """The LM's figures of some tokens, with what walks along them found; all of the tokens' order."""
    heaviest = [walk.heaviest.parts() for walk in walks if walk.heaviest is not None]
    nearest, entries, weights = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*heaviest, strict=True))
    return figures._replace(
        knn_log_prob=log_p_knn.float(),
        nearest=nearest,
        lmbda=torch.full(log_p_knn.shape, lmbda).masked_fill(log_p_knn.isnan(), 0.0),
        searched=torch.from_numpy(np.concatenate([walk.searched for walk in walks])),
        entries=entries,
        weights=weights,
    )
