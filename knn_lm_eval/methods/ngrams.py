"""The n-gram LM of unbounded n (Liu et al. 2024, infini-gram), and overlap with a text, by the text's suffix array.

    p(y | context) = count(end + y) / count(end + any token)

where ``end`` is the longest end of the context that the text has somewhere with a token behind it in the same document.
Where not even the context's last token occurs so, there is no p (NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from knn_lm_eval.methods.ngram_kernels import common_runs, count_next, longest_runs, next_tokens, ngram_runs

MOST_TOKENS = 2**62  # of an overlap: no limit


class SortedText(NamedTuple):
    """A text, or a part of one that is cut between documents, with its suffixes in order.

    Attributes
    ----------
    text : int32 ``[count]``, the tokens; may be memory-mapped, as ``order`` and ``heads`` may.
    begins : uint8 ``[count / 8, rounded up]``: a bit for each token, the first the lowest; set where a document begins.
    order : int32 ``[suffixes]``, where each suffix begins, sorted; a document's end comes before every token. Of
        documents that do not count none is among them.
    heads : int64 ``[largest token + 2]``, where in ``order`` the suffixes begin whose first token is each.
    """

    text: np.ndarray
    begins: np.ndarray
    order: np.ndarray
    heads: np.ndarray


class Matches(NamedTuple):
    """The longest end of each of ``n`` contexts that occurs in the text.

    Attributes
    ----------
    lengths : int64 ``[n]``, in tokens; 0 where not even the last one occurs.
    lows, highs : int64 ``[parts, n]``: which suffixes of each part begin so. None of a part that has only shorter ones.
    """

    lengths: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How often each end occurs in the text, int64 ``[n]``."""
        return (self.highs - self.lows).sum(0)


class Ngrams:
    """Look-ups in a text, by its parts.

    Parameters
    ----------
    parts : each with its suffixes; a document is in one of them.
    """

    def __init__(self, parts: Sequence[SortedText]) -> None:
        self.parts = [SortedText(*map(np.asarray, part)) for part in parts]

    def __len__(self) -> int:
        """The number of tokens that count."""
        return sum(len(part.order) for part in self.parts)

    @property
    def text_length(self) -> int:
        """The number of all tokens, those of documents that do not count among them."""
        return sum(len(part.text) for part in self.parts)

    def matches(self, tokens: Sequence[int] | np.ndarray, first: int, count: int, continued: bool = True) -> Matches:
        """The longest ends of the contexts ``tokens[:first]``, ``tokens[:first + 1]`` and so on, ``count`` of them.

        Parameters
        ----------
        continued : whether only occurrences count that have a token behind them in their document.
        """
        read = np.asarray(tokens, dtype=np.int64)
        lengths, lows, highs = (np.empty((len(self.parts), count), dtype=np.int64) for _ in range(3))
        for number, part in enumerate(self.parts):
            longest_runs(*part, read, first, continued, lengths[number], lows[number], highs[number])
        longest = lengths.max(0)  # [count]
        highs = np.where(lengths == longest, highs, lows)
        return Matches(longest, lows, highs)

    def overlap_lengths(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """For each token how many of ``tokens``, it and those right before it, stand in the text as they do here.

        Returns
        -------
        int64 ``[tokens]``; 0 where the text does not have the token.
        """
        return self.matches(tokens, 1, len(tokens), continued=False).lengths

    def runs(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Which suffixes of each part begin with each ``size`` consecutive tokens.

        Returns
        -------
        lows, highs : int64 ``[parts, tokens - size + 1]``.
        """
        read = np.asarray(tokens, dtype=np.int64)
        lows, highs = (np.empty((len(self.parts), max(0, len(read) - size + 1)), dtype=np.int64) for _ in range(2))
        for number, part in enumerate(self.parts):
            ngram_runs(*part, read, size, lows[number], highs[number])
        return lows, highs

    def places(self, lows: np.ndarray, highs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the suffixes of some runs stand.

        Parameters
        ----------
        lows, highs : int64 ``[parts, n]``.

        Returns
        -------
        int64 ``[places]`` both: which of the ``n`` each is of, and its place in the text of all parts together.
        """
        of_parts, first = [], 0
        for part, low, high in zip(self.parts, lows, highs, strict=True):
            counts = high - low
            number = np.repeat(np.arange(len(low)), counts)
            at = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
            of_parts.append((number, part.order[at].astype(np.int64) + first))
            first += len(part.text)
        numbers, places = (np.concatenate(of_all) for of_all in zip(*of_parts, strict=True))
        return numbers, places

    def probabilities(self, matches: Matches, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """p of a target after some contexts.

        Parameters
        ----------
        rows, targets : int64 ``[pairs]``; a row is one of the matches'.

        Returns
        -------
        float64 ``[pairs]``; NaN where the match has no length.
        """
        found, of_part = np.zeros(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        depths = matches.lengths[rows]
        for part, lows, highs in zip(self.parts, matches.lows, matches.highs, strict=True):
            count_next(*part, lows[rows], highs[rows], depths, targets, of_part)
            found += of_part
        with np.errstate(invalid="ignore", divide="ignore"):
            p = found / matches.counts[rows]
        return np.where(depths > 0, p, np.nan)

    def next_tokens(self, matches: Matches, row: int) -> tuple[np.ndarray, np.ndarray]:
        """All tokens that come after a context's match, and p of each.

        Returns
        -------
        int64 and float64 ``[tokens]``, the tokens ascending; none where the match has no length.
        """
        depth = int(matches.lengths[row])
        if depth == 0:
            return np.empty(0, dtype=np.int64), np.empty(0)
        tokens, counts = [], []
        for part, lows, highs in zip(self.parts, matches.lows, matches.highs, strict=True):
            low, high = int(lows[row]), int(highs[row])
            room = min(high - low, len(part.heads))
            of_part, its_counts = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
            number = next_tokens(*part, low, high, depth, of_part, its_counts)
            tokens.append(of_part[:number])
            counts.append(its_counts[:number])
        distinct, place = np.unique(np.concatenate(tokens), return_inverse=True)
        summed = np.bincount(place, weights=np.concatenate(counts), minlength=len(distinct))
        return distinct, summed / summed.sum()


def common_context(
    text: np.ndarray,
    document_starts: np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    positions: np.ndarray,
    entries: np.ndarray,
    most: int = MOST_TOKENS,
) -> np.ndarray:
    """How many tokens before a position of ``tokens`` and before an entry of the text are the same.

    Neither the token at the position nor the entry's own is looked at, and nothing before the entry's document.

    Parameters
    ----------
    text : int32 ``[count]``, a datastore's values.
    document_starts : int64 ``[documents]``, ascending, the first 0.
    positions, entries : int64 of one shape.
    most : where to stop counting.

    Returns
    -------
    int64 of that shape.
    """
    lengths = np.empty(np.shape(positions), dtype=np.int64)
    read = np.asarray(tokens, dtype=np.int64)
    places = np.ascontiguousarray(entries, dtype=np.int64).ravel()
    at = np.ascontiguousarray(positions, dtype=np.int64).ravel()
    common_runs(np.asarray(text), np.asarray(document_starts), read, at, places, most, lengths.reshape(-1))
    return lengths


def begin_bits(document_starts: np.ndarray, count: int) -> np.ndarray:
    """``SortedText.begins`` of a text of ``count`` tokens."""
    starts = np.asarray(document_starts)
    bits = np.zeros(-(-count // 8), dtype=np.uint8)
    np.bitwise_or.at(bits, starts >> 3, (1 << (starts & 7)).astype(np.uint8))
    return bits
