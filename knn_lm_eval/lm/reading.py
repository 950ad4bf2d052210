"""Reading text with the LM: passages -> queries and hidden states of the positions asked for -> log-probabilities.

Nothing here is as large as [positions, vocabulary]: the head gives its table some positions at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.system.timing import StageTimer

# Memory for a table of logits. More than 32 MiB at a time glibc would hand back to the system whenever it is freed,
# and clearing the pages anew takes longer than the softmax.
LOGITS_BYTES = 2**25


@dataclass(frozen=True)
class WholeText:
    """A text as far as it is read, in however many windows: but for its last token, which is only scored.

    Two of the same tokens are equal.

    Attributes
    ----------
    digest : of the tokens.
    tokens : int32 ``[tokens]``.
    """

    digest: bytes
    tokens: np.ndarray = field(compare=False, repr=False)

    @classmethod
    def of(cls, tokens: Sequence[int]) -> WholeText:
        """The text of these tokens, all of which are read."""
        array = np.array(tokens, dtype=np.int32)
        return cls(hashlib.blake2b(array.tobytes(), digest_size=16).digest(), array)


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
    whole : that text; None where the tokens are all that is known of it.
    start : the place of the first of the tokens in it; -1 where that is a prefix token, which is none of its own.
    """

    tokens: Sequence[int]
    continuations: list[list[int]] = field(default_factory=list)
    text: int | None = None
    whole: WholeText | None = None
    start: int = 0

    @property
    def rows(self) -> int:
        """How many positions are scored."""
        return max(map(len, self.continuations))


@dataclass
class Reading:
    """What the LM's body gave for a batch of passages.

    Attributes
    ----------
    queries : ``[rows, dimension]``; a row is a position that some continuation scores.
    hidden : ``[rows, width]``, what the head takes.
    asked : per continuation, passage by passage: the row after its last one, and the continuation.
    passages : the batch.
    copied : where the queries are on their way from a GPU to the CPU, what says that they are there.
    """

    queries: Tensor
    hidden: Tensor
    asked: list[tuple[int, list[int]]]
    passages: Sequence[Passage]
    copied: torch.cuda.Event | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens per continuation."""
        return [len(continuation) for _, continuation in self.asked]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The row and the target of each token of each continuation, in the order of ``asked``: int64 ``[pairs]``."""
        rows = torch.cat([torch.arange(end - len(c), end) for end, c in self.asked])
        return rows, torch.tensor([token for _, c in self.asked for token in c])


class PairsByRow:
    """(row, target) pairs in the order of their rows, so that those of a block of rows are a slice.

    Parameters
    ----------
    rows, targets : int64 ``[pairs]``, in any order.
    device : where tables over the vocabulary are.
    """

    def __init__(self, rows: Tensor, targets: Tensor, device: torch.device) -> None:
        self._order = rows.argsort(stable=True)
        self._rows, self._device = rows[self._order], device
        self.targets = targets[self._order].to(device)

    def __len__(self) -> int:
        return len(self._rows)

    def within(self, start: int, stop: int) -> tuple[slice, Tensor]:
        """Which pairs have rows from ``start`` on and before ``stop``, and their rows counted from ``start``."""
        begin, end = torch.searchsorted(self._rows, torch.tensor([start, stop])).tolist()
        return slice(begin, end), (self._rows[begin:end] - start).to(self._device)

    def as_given(self, of_pairs: Tensor) -> Tensor:
        """``of_pairs`` ``[pairs, ...]`` in the order in which the pairs were given, on the CPU."""
        return of_pairs.cpu()[self._order.argsort()]


class Reader:
    """Reads passages with one LM, and gives its log-probabilities for what was read.

    Parameters
    ----------
    model : the LM.
    softmax_dtype : dtype of the LM's log-softmax; None is the logits' own, as in lm-eval's ``hf``.
    reads_ahead : whether a batch is read while neighbours of the one before are searched for. That pays where the LM
        is on a GPU and the search is not: queries are then copied to the CPU as soon as they are there.

    Attributes
    ----------
    seconds : by stage, ``forward`` and ``head``.
    """

    def __init__(
        self, model: LanguageModel, softmax_dtype: torch.dtype | None = None, reads_ahead: bool = False
    ) -> None:
        self.model, self.softmax_dtype, self.reads_ahead = model, softmax_dtype, reads_ahead
        self._timed = StageTimer(("forward", "head"), model.device)
        self._table: Tensor | None = None
        self._ahead: tuple[list[Passage], Reading] | None = None  # a batch that was begun, and what it is giving

    @property
    def seconds(self) -> dict[str, float]:
        return self._timed.seconds

    @property
    def hidden_size(self) -> int:
        """The LM's width."""
        return self.model.inner.get_input_embeddings().weight.shape[1]

    def read(self, passages: Sequence[Passage]) -> Reading:
        """Run the LM's body over a batch of passages, unless that was begun by ``read_ahead``."""
        if self._ahead is not None and self._ahead[0] == list(passages):
            (_, reading), self._ahead = self._ahead, None
        else:
            reading = self._begin(passages)
        if reading.copied is not None:
            reading.copied.synchronize()
        return reading

    def read_ahead(self, passages: Sequence[Passage]) -> None:
        """Have a GPU begin with a batch that will be read next; this thread goes on meanwhile."""
        self._ahead = list(passages), self._begin(passages)

    def also_took(self, forward_seconds: float) -> None:
        """Count reading that another reader of the same LM did for this one as well."""
        self._timed.add("forward", forward_seconds)

    def target_log_probs(self, reading: Reading) -> Tensor:
        """The LM's own log-probability of each token of each continuation, in order: ``[pairs]``, on the CPU."""
        return self._score_targets(reading, want_greedy=False)[0]

    def target_scores(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """The same, and whether the token is the LM's most probable one: bool ``[pairs]``."""
        log_probs, greedy = self._score_targets(reading, want_greedy=True)
        assert greedy is not None
        return log_probs, greedy

    @torch.inference_mode()
    def _score_targets(self, reading: Reading, want_greedy: bool) -> tuple[Tensor, Tensor | None]:
        pairs = PairsByRow(*reading.pairs(), reading.hidden.device)
        log_probs = None
        greedy = torch.zeros(len(pairs), dtype=torch.bool, device=reading.hidden.device) if want_greedy else None
        for start, stop, table in self.tables(reading.hidden, 0, len(reading.hidden)):
            here, at = pairs.within(start, stop)
            if log_probs is None:
                log_probs = table.new_empty(len(pairs))
            log_probs[here] = table[at, pairs.targets[here]]
            if greedy is not None:
                greedy[here] = table.argmax(dim=-1)[at] == pairs.targets[here]
        assert log_probs is not None, "no batch is empty"
        return pairs.as_given(log_probs), None if greedy is None else pairs.as_given(greedy)

    @torch.inference_mode()
    def tables(self, hidden: Tensor, begin: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        """The LM's log-probabilities over the vocabulary for rows of ``hidden``, some rows at a time.

        The only place with tables over the vocabulary: the logits, and one for their softmax that is used again. What
        is to live on should have its place before the first table: small tensors made between two tables would break
        up the heap, which would then grow by a table again and again.

        Parameters
        ----------
        hidden : ``[n, width]``.
        begin, end : the rows that are wanted.

        Yields
        ------
        start, stop : some of those rows.
        table : ``[stop - start, vocabulary]``; overwritten by the next one.
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

    def _begin(self, passages: Sequence[Passage]) -> Reading:
        with self._timed("forward"):
            padded = pad_sequence([torch.tensor(passage.tokens) for passage in passages], batch_first=True)
            keys, hidden = self.model.encode(padded)  # [batch, time, dimension], [batch, time, width]
            lengths = [passage.rows for passage in passages]
            scored = [slice(len(p.tokens) - n, len(p.tokens)) for p, n in zip(passages, lengths, strict=True)]
            ends = torch.tensor(lengths).cumsum(0).tolist()
            reading = Reading(
                queries=torch.cat([keys[i, rows] for i, rows in enumerate(scored)]),
                hidden=torch.cat([hidden[i, rows] for i, rows in enumerate(scored)]),
                asked=[(end, c) for end, p in zip(ends, passages, strict=True) for c in p.continuations],
                passages=passages,
            )
        if self.reads_ahead and reading.queries.is_cuda:
            # Ordered now, or the copy would come after whatever the GPU is given to do next.
            reading.copied = torch.cuda.Event()
            stream = torch.cuda.current_stream(reading.queries.device)
            reading.queries = reading.queries.to("cpu", non_blocking=True)
            reading.copied.record(stream)
        return reading
