"""Scoring under RetoMaton: the LM reads, the automaton walks all continuations side by side, then the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.lm.language_model import CausalLM
from knn_lm_eval.methods.adaptive import Lmbda
from knn_lm_eval.methods.automaton import Automaton, Walk
from knn_lm_eval.methods.mixture import mix
from knn_lm_eval.model.scoring import Passage, Score, Scorer
from knn_lm_eval.search.retriever import Retriever

# Memory for queries and hidden states that wait for the walk, and for neighbours kept where is_greedy is asked.
WAITING_BYTES = 2**27


class RetomatonScorer(Scorer):
    """Scores passages with RetoMaton instead of a search per token.

    Parameters
    ----------
    model, retriever, lmbda, softmax_dtype : as for ``Scorer``.
    automaton : walks over the retriever's datastore.
    carry_state : let the windows of one text continue each other's walk, instead of beginning anew.
    """

    def __init__(
        self,
        model: CausalLM,
        retriever: Retriever,
        lmbda: Lmbda,
        automaton: Automaton,
        softmax_dtype: torch.dtype | None = None,
        carry_state: bool = False,
    ) -> None:
        super().__init__(model, retriever, lmbda, automaton.settings.knn_temp, softmax_dtype)
        self.automaton, self.values = automaton, automaton.values
        self.carry_state, self.reads_ahead = carry_state, False
        self._survivors: dict[int, np.ndarray] = {}

    @property
    def rows_at_once(self) -> int:
        """As many as wait in little memory, for the walks to have company."""
        width = self.model.inner.get_input_embeddings().weight.shape[1]
        return max(1, WAITING_BYTES // (8 * max(width, self.automaton.settings.k)))

    def score(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> list[list[Score]]:
        """As ``Scorer.score``; the automaton walks all batches together, where each step's neighbours aren't kept.

        Nothing is read ahead: all batches of a call are read before they are walked.
        """
        if want_greedy or not isinstance(self.lmbda, float):
            return [scores for batch in batches for scores in self._score_with_neighbours(batch, want_greedy)]
        readings, lm_log_probs, walks = [], [], []
        for batch in batches:
            reading = self._read(batch)
            rows, targets = reading.pairs()
            lm_log_probs.append(self._score_pairs(reading.hidden, rows, targets, None, len(reading.hidden), False)[0])
            queries = reading.queries.float().cpu().numpy()
            walks += [Walk(queries[end - len(c) : end], np.array(c)) for end, c in reading.asked]
            readings.append(reading)
        self._walk(walks, [passage.text for batch in batches for passage in batch for _ in passage.continuations])
        scores, waiting = [], iter(walks)
        for reading, lm_log_prob in zip(readings, lm_log_probs, strict=True):
            mine = [next(waiting) for _ in reading.asked]
            log_p_knn = torch.from_numpy(np.concatenate([walk.log_p_knn for walk in mine]))
            log_probs = mix(lm_log_prob.double(), log_p_knn, self.lmbda)
            nobody_asked = torch.zeros(len(log_probs), dtype=torch.bool)
            scores += self._sum_up(reading, log_probs, nobody_asked, [walk.searches for walk in mine])
        return scores

    def _walk(self, walks: list[Walk], texts: list[int | None]) -> None:
        """Walk each on its own; with ``carry_state``, those of one text as one."""
        if not self.carry_state:
            self.automaton.walk(walks)
            return
        parts: dict[int | None, list[Walk]] = {}
        for walk, text in zip(walks, texts, strict=True):
            parts.setdefault(text, []).append(walk)
        joined = []
        for text, mine in parts.items():
            whole = Walk(np.concatenate([w.queries for w in mine]), np.concatenate([w.targets for w in mine]))
            if text in self._survivors:
                whole.survivors = self._survivors.pop(text)
            joined.append(whole)
        self.automaton.walk(joined)
        # Only the last text can go on in the next call.
        self._survivors = {
            text: joined[-1].survivors_at_end for text in parts if text == texts[-1] and text is not None
        }
        for whole, mine in zip(joined, parts.values(), strict=True):
            ends = np.cumsum([len(walk.queries) for walk in mine])
            for walk, log_p_knn, searched in zip(
                mine, np.split(whole.log_p_knn, ends[:-1]), np.split(whole.searched, ends[:-1]), strict=True
            ):
                walk.log_p_knn, walk.searched = log_p_knn, searched

    def _score_with_neighbours(self, passages: Sequence[Passage], want_greedy: bool) -> list[list[Score]]:
        """Scores with is_greedy or an adaptive lmbda, for which each step's neighbours must be kept."""
        reading = self._read(passages)
        queries = reading.queries.float().cpu().numpy()
        # Continuations of one length at one place differ in their last token only: they share a walk.
        walks: dict[tuple[int, int], Walk] = {}
        for end, continuation in reading.asked:
            place = end, len(continuation)
            walks.setdefault(place, Walk(queries[end - len(continuation) : end], np.array(continuation)))
        self.automaton.walk(list(walks.values()), keep_neighbours=True)
        first_step = dict(zip(walks, np.cumsum([0, *(length for _, length in walks)])[:-1].tolist(), strict=True))
        hidden = reading.hidden[torch.cat([torch.arange(end - length, end) for end, length in walks])]
        steps = [neighbours for walk in walks.values() for neighbours in walk.neighbours]

        def neighbours(rows: Tensor) -> tuple[Tensor, Tensor, None]:
            return *padded_neighbours([steps[row] for row in rows.tolist()], self.values), None

        rows = torch.cat([torch.arange(len(c)) + first_step[end, len(c)] for end, c in reading.asked])
        targets = reading.pairs()[1]
        block = max(1, WAITING_BYTES // (16 * (self.automaton.settings.k + self.automaton.settings.max_knns)))
        log_probs, greedy, _ = self._score_pairs(hidden, rows, targets, neighbours, block, want_greedy)
        return self._sum_up(reading, log_probs, greedy, [walks[end, len(c)].searches for end, c in reading.asked])


def padded_neighbours(steps: Sequence[tuple[np.ndarray, np.ndarray]], values: np.ndarray) -> tuple[Tensor, Tensor]:
    """Steps' neighbours (distances and entries, as a walk keeps them), side by side.

    Returns
    -------
    distances : float32 ``[steps, most neighbours]``; infinity in empty slots.
    values : int32, of the same shape; 0 in empty slots.
    """
    width = max(1, *(len(distances) for distances, _ in steps)) if steps else 1
    distances = np.full((len(steps), width), np.inf, dtype=np.float32)
    theirs = np.zeros((len(steps), width), dtype=np.int32)
    for i, (step_distances, entries) in enumerate(steps):
        distances[i, : len(entries)] = step_distances
        theirs[i, : len(entries)] = values[entries]
    return torch.from_numpy(distances), torch.from_numpy(theirs)
