"""Log-probabilities of given tokens under the kNN-LM: one forward pass, one batched search, the mixture.

Nothing here is as large as [positions, vocabulary]: logits exist for a few positions at a time, and p_kNN only
for the tokens that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from knn_lm_eval.lm.language_model import CausalLM
from knn_lm_eval.methods.adaptive import Lmbda, lm_features_for, weights, worth_searching
from knn_lm_eval.methods.mixture import greedy_tokens, knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.system.timing import StageTimer

# Memory for logits, and for neighbours (16 bytes each). More than 32 MiB at a time glibc would hand back to the
# system whenever it is freed, and clearing the pages anew takes longer than the softmax.
LOGITS_BYTES = 2**25
NEIGHBOURS_PER_BLOCK = 2**21

# rows int64 [n] -> distances [n, k], values [n, k] and counts [n, k] or None of these rows' neighbours.
Neighbours = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


class Near(NamedTuple):
    """Neighbours of some rows, on the LM's device: distances, log weights and values ``[rows, k]``."""

    distances: Tensor
    log_weights: Tensor
    values: Tensor


@dataclass
class Passage:
    """One forward pass: the tokens to read and the positions at its end to score.

    Attributes
    ----------
    tokens : the input ids.
    continuations : what may follow; continuation c is predicted by the last ``len(c)`` positions, so all but
        its last token are the last of ``tokens``. Several share the pass where only the last token differs,
        or where the same text is split elsewhere.
    text : the number of the text that this is a window of; None for what is no window.
    """

    tokens: Sequence[int]
    continuations: list[list[int]] = field(default_factory=list)
    text: int | None = None


class Score(NamedTuple):
    """A continuation's score.

    Attributes
    ----------
    log_prob : the sum of its tokens' log-probabilities (natural logarithm).
    is_greedy : whether each token is the most probable one; False where nobody asked.
    searches : full searches made for it; None where every token is searched.
    """

    log_prob: float
    is_greedy: bool
    searches: int | None = None


@dataclass
class Reading:
    """What the LM's body gave for a batch of passages.

    Attributes
    ----------
    queries : ``[rows, dimension]``; a row is a position that some continuation scores.
    hidden : ``[rows, width]``, what the head takes.
    asked : per continuation, passage by passage: the row after its last one, and the continuation.
    sizes : continuations per passage.
    passages : the batch, kept so that no other list can take its id.
    copied : where the queries are on their way from a GPU to the CPU, what says that they are there.
    """

    queries: Tensor
    hidden: Tensor
    asked: list[tuple[int, list[int]]]
    sizes: list[int]
    passages: Sequence[Passage]
    copied: torch.cuda.Event | None = None

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The row and the target of each token of each continuation, in the order of ``asked``."""
        rows = torch.cat([torch.arange(end - len(c), end) for end, c in self.asked])
        return rows, torch.tensor([token for _, c in self.asked for token in c])


class Scorer:
    """Scores passages under the mixture of an LM and a retriever.

    Parameters
    ----------
    model : the LM.
    retriever : None for the LM alone.
    lmbda : the weight of p_kNN, 0 to 1, or an adaptive one.
    knn_temp : the softmax temperature over distances.
    softmax_dtype : dtype of the LM's log-softmax; None is the logits' own, as in lm-eval's ``hf``.

    Attributes
    ----------
    reads_ahead : whether the LM reads the next batch while neighbours of the present one are searched for. That
        pays where the LM is on a GPU and the search is not; on a CPU both would want the same cores.
    """

    def __init__(
        self,
        model: CausalLM,
        retriever: Retriever | None,
        lmbda: Lmbda,
        knn_temp: float,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.retriever = model, retriever
        self.lmbda, self.knn_temp, self.softmax_dtype = lmbda, knn_temp, softmax_dtype
        self._table: Tensor | None = None
        self.reads_ahead = retriever is not None and model.device.type == "cuda" and not retriever.on_gpus
        self._readings: dict[int, Reading] = {}  # by the batch's id: what was read, or is being read, already
        self._following: Sequence[Passage] | None = None
        self.tokens_scored = 0
        self.rows_scored, self.rows_skipped = 0, 0  # positions, and those at which a gate wanted no search
        self.seconds = {"forward": 0.0, "head": 0.0, "mixture": 0.0}
        self._timed = StageTimer(self.seconds, model.device)

    @property
    def rows_at_once(self) -> int:
        """Positions that a call of ``score`` should bring together, in as many batches as that takes."""
        return 1

    def announce(self, following: Sequence[Passage]) -> None:
        """Tell the first batch of the call of ``score`` after the next one: it may be read ahead."""
        self._following = following

    def score(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> list[list[Score]]:
        """Score batches of passages; the LM reads a batch at a time.

        Returns
        -------
        For each passage, in order, the scores of its continuations.
        """
        scores = []
        following, self._following = self._following, None
        for batch, upcoming in zip(batches, [*batches[1:], following], strict=True):
            reading = self._read(batch)
            if self.reads_ahead and upcoming is not None and id(upcoming) not in self._readings:
                # A GPU is at work on it while this thread goes on to search.
                self._readings[id(upcoming)] = self._begin_to_read(upcoming)
            scores += self._score_reading(reading, want_greedy)
            self._readings.pop(id(batch), None)
        return scores

    def token_log_probs(self, passages: Sequence[Passage]) -> Tensor:
        """The LM's own log-probability of each token of each continuation, in order: float ``[tokens]``."""
        reading = self._read(passages)
        rows, targets = reading.pairs()
        return self._score_pairs(reading.hidden, rows, targets, None, len(reading.hidden), False)[0]

    def _score_reading(self, reading: Reading, want_greedy: bool) -> list[list[Score]]:
        neighbours, block = None, len(reading.hidden)
        if retriever := self.retriever:
            block = max(1, NEIGHBOURS_PER_BLOCK // retriever.k)

            def neighbours(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
                found = retriever.search(reading.queries[rows])
                return found.distances, found.values, found.counts

        rows, targets = reading.pairs()
        log_probs, greedy, searched = self._score_pairs(reading.hidden, rows, targets, neighbours, block, want_greedy)
        if searched is None:
            return self._sum_up(reading, log_probs, greedy)
        parts = searched.split([len(continuation) for _, continuation in reading.asked])
        return self._sum_up(reading, log_probs, greedy, [int(part.sum()) for part in parts])

    def _read(self, passages: Sequence[Passage]) -> Reading:
        reading = self._readings.get(id(passages)) or self._begin_to_read(passages)
        if reading.copied is not None:
            reading.copied.synchronize()
        return reading

    def _begin_to_read(self, passages: Sequence[Passage]) -> Reading:
        with self._timed("forward"):
            padded = pad_sequence([torch.tensor(passage.tokens) for passage in passages], batch_first=True)
            keys, hidden = self.model.encode(padded)
            lengths = [max(map(len, passage.continuations)) for passage in passages]
            scored = [slice(len(p.tokens) - n, len(p.tokens)) for p, n in zip(passages, lengths, strict=True)]
            ends = torch.tensor(lengths).cumsum(0).tolist()
            reading = Reading(
                queries=torch.cat([keys[i, rows] for i, rows in enumerate(scored)]),
                hidden=torch.cat([hidden[i, rows] for i, rows in enumerate(scored)]),
                asked=[(end, c) for end, p in zip(ends, passages, strict=True) for c in p.continuations],
                sizes=[len(passage.continuations) for passage in passages],
                passages=passages,
            )
        if self.reads_ahead and reading.queries.is_cuda:
            # Ordered now, or the copy would come after whatever the GPU is given to do next.
            reading.copied = torch.cuda.Event()
            stream = torch.cuda.current_stream(reading.queries.device)
            reading.queries = reading.queries.to("cpu", non_blocking=True)
            reading.copied.record(stream)
        return reading

    @torch.inference_mode()
    def _score_pairs(
        self,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        neighbours: Neighbours | None,
        block: int,
        want_greedy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """log p, "is the greedy token" and "was searched" (None: all were) of each (row of ``hidden``, target) pair.

        ``neighbours`` is asked for ``block`` rows at a time, or for those that are worth it; None is the LM alone.
        """
        device = hidden.device
        self.rows_scored += len(hidden)
        order = rows.argsort(stable=True)
        rows, targets = rows[order], targets[order].to(device)
        choosy = not isinstance(self.lmbda, float) and self.lmbda.threshold is not None
        # Results have their place beforehand. Small tensors that were made between two tables of logits and
        # lived on would break up the heap, which would then grow by a table again and again.
        lm_log_probs, knn_log_probs = None, torch.empty(len(rows), device=device)
        lmbdas = self.lmbda if isinstance(self.lmbda, float) else torch.empty(len(rows), device=device)
        searched = torch.empty(len(rows), dtype=torch.bool, device=device) if choosy else None
        greedy = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for block_start in range(0, len(hidden), block):
            block_end = min(block_start + block, len(hidden))
            found = None
            if neighbours and not choosy:
                found = self._weigh(*neighbours(torch.arange(block_start, block_end)), device)
            for start, stop, table in self._tables(hidden, block_start, block_end):
                begin, end = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
                at = (rows[begin:end] - start).to(device)
                if lm_log_probs is None:
                    lm_log_probs = table.new_empty(len(rows))
                lm_log_probs[begin:end] = table[at, targets[begin:end]]
                best = None
                if neighbours:
                    of_lm = lm_features_for(self.lmbda, table)
                    if found is not None:
                        near = Near(*(part[start - block_start : stop - block_start] for part in found))
                    else:
                        worth = worth_searching(self.lmbda, of_lm)
                        assert worth is not None and searched is not None
                        searched[begin:end] = worth[at]
                        self.rows_skipped += int((~worth).sum())
                        near = self._weigh(*_neighbours_where(worth.cpu(), start, neighbours), device)
                    with self._timed("mixture"):
                        lmbda = weights(self.lmbda, of_lm, near.distances, near.values)
                        if isinstance(lmbdas, Tensor) and isinstance(lmbda, Tensor):
                            lmbdas[begin:end] = lmbda[at]
                        for pairs in range(begin, end, block):  # a row may have many
                            here = slice(pairs, min(pairs + block, end))
                            of = at[here.start - begin : here.stop - begin]
                            knn_log_probs[here] = knn_log_prob(near.log_weights[of], near.values[of], targets[here])
                        if want_greedy:
                            best = greedy_tokens(table, near.log_weights, near.values, lmbda)
                elif want_greedy:
                    best = table.argmax(dim=-1)
                if best is not None:
                    greedy[begin:end] = best[at] == targets[begin:end]
        assert lm_log_probs is not None
        log_probs = lm_log_probs
        if neighbours:
            log_probs = mix(lm_log_probs.float(), knn_log_probs, lmbdas)
        back = order.argsort()
        results = log_probs.cpu()[back], greedy.cpu()[back], None if searched is None else searched.cpu()[back]
        self._timed.settle()  # the GPU has just done it all
        return results

    def _tables(self, hidden: Tensor, begin: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        """The LM's log-probabilities over the vocabulary for rows of ``hidden``, some rows (start, stop) at a time.

        The only place with tables over the vocabulary: the logits, and one for their softmax that is used again.
        """
        chunk = max(1, LOGITS_BYTES // (4 * self.model.vocabulary_size))
        # Chunks of one size, so that none is left with a few rows, for which the head is slow.
        step = math.ceil((end - begin) / math.ceil((end - begin) / chunk))
        for start in range(begin, end, step):
            stop = min(start + step, end)
            with self._timed("head"):
                logits = self.model.logits(hidden[start:stop])
                dtype = self.softmax_dtype or logits.dtype
                if self._table is None or len(self._table) < len(logits):
                    self._table = torch.empty(logits.shape, dtype=dtype, device=logits.device)
                table = torch.log_softmax(logits, dim=-1, dtype=dtype, out=self._table[: len(logits)])
                del logits
            yield start, stop, table

    def _weigh(self, distances: Tensor, values: Tensor, counts: Tensor | None, device: torch.device) -> Near:
        with self._timed("mixture"):
            distances, counts = distances.to(device), None if counts is None else counts.to(device)
            return Near(distances, neighbour_log_weights(distances, self.knn_temp, counts), values.to(device))

    def _sum_up(
        self,
        reading: Reading,
        log_probs: Tensor,
        greedy: Tensor,
        searches: Sequence[int | None] | None = None,
    ) -> list[list[Score]]:
        lengths = [len(continuation) for _, continuation in reading.asked]
        self.tokens_scored += sum(lengths)
        searches = searches or [None] * len(lengths)
        scores = (
            Score(float(log_prob.sum()), bool(is_greedy.all()), count)
            for log_prob, is_greedy, count in zip(
                log_probs.split(lengths), greedy.split(lengths), searches, strict=True
            )
        )
        return [[next(scores) for _ in range(size)] for size in reading.sizes]


def _neighbours_where(worth: Tensor, start: int, neighbours: Neighbours) -> tuple[Tensor, Tensor, Tensor | None]:
    """The neighbours of those rows from ``start`` on that are ``worth`` it; empty slots for the others."""
    (some,) = worth.nonzero(as_tuple=True)
    if not len(some):
        return torch.full((len(worth), 1), math.inf), torch.zeros(len(worth), 1, dtype=torch.int32), None
    found_distances, found_values, found_counts = neighbours(some + start)
    distances = found_distances.new_full((len(worth), found_distances.shape[1]), math.inf)
    values = found_values.new_zeros(distances.shape)
    distances[some], values[some] = found_distances, found_values
    if found_counts is None:
        return distances, values, None
    counts = found_counts.new_ones(distances.shape)
    counts[some] = found_counts
    return distances, values, counts


def score_together(
    scorers: Sequence[Scorer], batches: Sequence[Sequence[Passage]], want_greedy: bool
) -> list[list[list[Score]] | Exception]:
    """Score batches by several scorers of one LM, which reads each batch once.

    All that read keys (those with a retriever) must read the same ones. Each scorer counts the seconds of the
    reading as its own, as if it had been alone.

    Returns
    -------
    What each scorer's ``score`` gives, or the exception that it ended with. Where memory runs out it is raised,
    so that the caller can try smaller batches.
    """
    reader = next((scorer for scorer in scorers if scorer.retriever), scorers[0])
    before = reader.seconds["forward"]
    readings = {id(batch): reader._read(batch) for batch in batches}
    reader._timed.settle()
    spent = reader.seconds["forward"] - before
    results: list[list[list[Score]] | Exception] = []
    for scorer in scorers:
        if scorer is not reader:
            scorer.seconds["forward"] += spent
        scorer._readings, scorer._following = readings.copy(), None
        try:
            results.append(scorer.score(batches, want_greedy))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever it is, the others' scores are worth having
            results.append(error)
        finally:
            scorer._readings = {}
    return results
