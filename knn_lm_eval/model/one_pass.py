"""Scoring with one search for all texts: they are all read first, then searched for together, then scored.

Where exact search reads the keys from disk in every search, the keys are so read once for a whole task.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from knn_lm_eval.lm.reading import Passage, Reader, Reading
from knn_lm_eval.methods.mixture import Mixture
from knn_lm_eval.model.exclusion import Exclusion
from knn_lm_eval.model.neighbours import FindNeighbours, Neighbours, counts_of, finding_others, seconds_of
from knn_lm_eval.model.ngram_mixture import NgramMixture
from knn_lm_eval.model.scores import Score
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK, MixedPairs, PassageScorer
from knn_lm_eval.model.spool import WaitingRows
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.system.files import cache_root, check_free_space
from knn_lm_eval.system.memory import available_bytes

logger = logging.getLogger(__name__)

# What a search takes of memory, per query and neighbour: candidates, then distances, entries, values and copies.
SEARCHED_BYTES = 64
SHARE_OF_MEMORY = 4  # a search may take one part in so many of the memory that is available
LEAST_BYTES, USUAL_BYTES = 2**27, 2**31  # that it may take at least, and where nobody knows what is available
WAITING_BYTES, ENTRY_BYTES = 20, 8  # on disk per query and neighbour, at most: distance, value and count; its entry


class _Read(NamedTuple):
    """What is left of a batch in memory: all but its queries and hidden states."""

    asked: list[tuple[int, list[int]]]
    passages: Sequence[Passage]
    first_row: int  # of its hidden states, among those that wait
    rows: int


class OnePassScorer(PassageScorer):
    """Scores passages under kNN-LM as ``KNNScorer`` does, with one search for all batches of a call.

    Queries, hidden states and then neighbours wait in files without names in ``folder``. Memory: a batch, and for
    the search a quarter of what is available; where all neighbours of all queries take more, it is several searches.

    Parameters
    ----------
    reader : as for ``PassageScorer``.
    retriever : finds the neighbours.
    mixture : how LM and neighbours are mixed.
    folder : on a disk with room; None is the cache, ``$KNN_LM_EVAL_CACHE`` or ~/.cache/knn_lm_eval.
    search_bytes : of memory that a search may take; None is as said above.
    keeps_figures : as for ``PassageScorer``; the neighbours' entries wait as well, then.
    ngrams : an n-gram LM that is mixed in.
    exclusion : what is left out of the neighbours, whose entries then wait as well; None for nothing.
    """

    reads_all_first = True

    def __init__(
        self,
        reader: Reader,
        retriever: Retriever,
        mixture: Mixture,
        folder: Path | None = None,
        search_bytes: int | None = None,
        keeps_figures: bool = False,
        ngrams: NgramMixture | None = None,
        exclusion: Exclusion | None = None,
    ) -> None:
        super().__init__(reader, keeps_figures)
        self._exclusion, self._keeps_entries = exclusion, keeps_figures or exclusion is not None
        self.retriever, self.folder, self.search_bytes = retriever, folder or cache_root(), search_bytes
        self._pairs = MixedPairs(reader, mixture, keeps_figures, ngrams)
        self._told = False

    @property
    def rows_at_once(self) -> float:
        """All there are."""
        return math.inf

    @property
    def seconds(self) -> dict[str, float]:
        return self.reader.seconds | self._pairs.seconds | seconds_of(self._exclusion)

    @property
    def counts(self) -> dict[str, float]:
        return super().counts | self._pairs.counts | counts_of(self._exclusion)

    def score(
        self, batches: Sequence[Sequence[Passage]], want_greedy: bool, following: Sequence[Passage] | None = None
    ) -> list[list[Score]]:
        self._check_disk(sum(passage.rows for batch in batches for passage in batch))
        readings = (self.reader.read(batch) for batch in batches)
        return self._score(_shown(readings, len(batches), "Reading all texts"), want_greedy)

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        return self._score(iter(readings), want_greedy)

    def try_out(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> None:
        """Read batches and run the LM's head, to see whether they fit in memory; nothing is searched for."""
        for batch in batches:
            self.reader.target_scores(self.reader.read(batch))

    def _score(self, readings: Iterator[Reading], want_greedy: bool) -> list[list[Score]]:
        with ExitStack() as files:
            queries, hidden, distances, values, counts, entries = (
                files.enter_context(WaitingRows(self.folder)) for _ in range(6)
            )
            read, wanted = self._wait(readings, queries, hidden)
            self._search(queries, distances, values, counts, entries)
            place = wanted.cumsum(0) - 1  # [rows], among the queries

            def found_for(first_row: int) -> FindNeighbours:
                def find(rows: Tensor) -> Neighbours:
                    at = place[rows + first_row]
                    some = int(at[0]), int(at[-1]) + 1  # ascending, as rows are
                    within = at - at[0]
                    return Neighbours(
                        distances.read(*some)[within],
                        values.read(*some)[within],
                        counts.read(*some)[within] if len(counts) else None,
                        entries.read(*some)[within] if len(entries) else None,
                    )

                return find

            scores = []
            for batch in _shown(read, len(read), "Scoring"):
                rows = slice(batch.first_row, batch.first_row + batch.rows)
                states = hidden.read(rows.start, rows.stop).to(self.reader.model.device)
                reading = Reading(states[:, :0], states, batch.asked, batch.passages)
                self.tokens_scored += sum(reading.lengths)
                find = finding_others(found_for(batch.first_row), reading, self._exclusion)
                scores += self._pairs.score_reading(reading, find, self._block, want_greedy)
            return scores

    def _wait(
        self, readings: Iterator[Reading], queries: WaitingRows, hidden: WaitingRows
    ) -> tuple[list[_Read], Tensor]:
        """Write down what was read: the queries of those rows that want a search, and all hidden states.

        Returns
        -------
        The batches, and of all their rows which want a search: bool ``[rows]``.
        """
        read, wanted = [], []
        for reading in readings:
            read.append(_Read(reading.asked, reading.passages, len(hidden), len(reading.hidden)))
            hidden.append(reading.hidden)
            wants = self._pairs.wanted(reading.hidden, self._block)  # [rows]
            wanted.append(wants)
            queries.append(reading.queries[wants.to(reading.queries.device)])
        return read, torch.cat(wanted)

    def _search(
        self,
        queries: WaitingRows,
        distances: WaitingRows,
        values: WaitingRows,
        counts: WaitingRows,
        entries: WaitingRows,
    ) -> None:
        """The neighbours of all queries, in as few searches as memory allows."""
        at_once = self._queries_at_once
        searches = -(-len(queries) // at_once)
        step = -(-len(queries) // max(1, searches))
        starts = range(0, len(queries), max(1, step))
        for start in _shown(starts, searches, "Searching for all"):
            found = self.retriever.search(queries.read(start, min(start + step, len(queries))))
            distances.append(found.distances)
            values.append(found.values)
            if found.counts is not None:
                counts.append(found.counts)
            if self._keeps_entries:
                entries.append(found.entries)

    @property
    def _block(self) -> int:
        return max(1, NEIGHBOURS_PER_BLOCK // self.retriever.k)

    @property
    def _queries_at_once(self) -> int:
        available = available_bytes()
        bound = max(LEAST_BYTES, USUAL_BYTES if available is None else available // SHARE_OF_MEMORY)
        of_query = SEARCHED_BYTES * self.retriever.k + 16 * self.retriever.datastore.dimension
        return max(1, (self.search_bytes or bound) // of_query)

    def _check_disk(self, rows: int) -> None:
        item = self.reader.model.inner.dtype.itemsize
        width = self.retriever.datastore.dimension + self.reader.hidden_size
        of_neighbour = WAITING_BYTES + (ENTRY_BYTES if self._keeps_entries else 0)
        needed = rows * (width * item + of_neighbour * self.retriever.k)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_free_space(self.folder, needed, "what waits for the search of all texts at once")
        if not self._told:
            self._told = True
            logger.info(
                "All texts of a task are read before one search for all of them; up to %.1f GiB wait in %s.",
                needed / 2**30,
                self.folder,
            )


def _shown(things, total: int, what: str):  # type: ignore[no-untyped-def]
    """A progress bar over ``things``, in the first process only."""
    return tqdm(things, what, total=total, disable=int(os.environ.get("RANK", 0)) != 0)
