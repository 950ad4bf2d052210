"""Which documents of a datastore are a text, or a large part of it: found by the runs of tokens that both have.

Of a run of at least ``size`` tokens that stands in the text and in a document each token is shared, in both. A document
is the text where half of the text's tokens are shared, or more, or half of the document's. Some datastores are one
long document, which is no text that is scored: those of more than ``LONGEST`` tokens are looked at in pieces of so
many, each as if it were a document.

Any ``size`` tokens that stand in more than ``MOST_PLACES`` places of the datastore, such as a licence's, tell no
document from another: they are passed over. So a token of the text takes a look-up and at most so many places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from knn_lm_eval.methods.ngrams import Ngrams

MOST_PLACES = 1000
LONGEST = 10_000
PLACES_AT_ONCE = 2**20  # some 100 bytes each


class _Places(NamedTuple):
    """Tokens of the text that stand in documents, int64 ``[n]``.

    Attributes
    ----------
    positions, places : in the text, and in the datastore.
    documents : the places at which the documents begin.
    """

    positions: np.ndarray
    places: np.ndarray
    documents: np.ndarray


class _Shared(NamedTuple):
    """How many tokens are shared with each of some documents, int64 ``[documents]``, and where the last run begins."""

    documents: np.ndarray
    tokens: np.ndarray
    last: np.ndarray

    def with_runs(self, documents: np.ndarray, begins: np.ndarray, size: int) -> _Shared:
        """The same with runs of ``size`` tokens, of each document none before those that it has."""
        order = np.lexsort((begins, documents))
        documents, begins = documents[order], begins[order]
        known = np.union1d(self.documents, documents)
        tokens, last = np.zeros(len(known), dtype=np.int64), np.full(len(known), -size)
        before = np.searchsorted(known, self.documents)
        tokens[before], last[before] = self.tokens, self.last

        at = np.searchsorted(known, documents)
        is_first = np.diff(at, prepend=-1) > 0
        previous = np.roll(begins, 1)
        previous[is_first] = last[at[is_first]]
        # Runs of one length: each adds what lies behind the beginning of the one before, or all of it.
        added = np.bincount(at, np.minimum(begins - previous, size), len(known))
        last[at] = begins  # of several the last one's
        return _Shared(known, tokens + added.astype(np.int64), last)


NONE = np.empty(0, dtype=np.int64)


def same_documents(ngrams: Ngrams, document_starts: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    """Where the documents are that are this text.

    Memory: 16 bytes for each part and token of the text, and for each place in documents of which 1 in 2 ``size``
    tokens or more may be shared.

    Parameters
    ----------
    ngrams : of the datastore, or of several as one.
    document_starts : int64 ``[documents]``, ascending, of all together.
    tokens : ``[tokens]``, the text.
    size : of the shortest run that counts, in tokens.

    Returns
    -------
    int64 ``[2, documents]``: their first entries, ascending, and those after their last ones.
    """
    lows, highs = ngrams.runs(tokens, size)  # [parts, positions]
    counts = (highs - lows).sum(0)
    positions = np.flatnonzero((counts > 0) & (counts <= MOST_PLACES))
    if not len(positions):
        return np.stack([NONE, NONE])

    def find(some: np.ndarray) -> Iterator[_Places]:
        """Where the tokens stand that begin at some positions, ascending."""
        done = np.cumsum(counts[some])
        cuts = np.searchsorted(done, np.arange(PLACES_AT_ONCE, done[-1], PLACES_AT_ONCE))
        for block in filter(len, np.split(some, cuts)):
            numbers, places = ngrams.places(lows[:, block], highs[:, block])
            begins, ends = _documents_of(places, document_starts, ngrams.text_length)
            inside = places + size <= ends  # of a piece, too
            yield _Places(block[numbers[inside]], places[inside], begins[inside])

    of_text = _Shared(NONE, NONE, NONE)
    for found in find(positions):
        of_text = of_text.with_runs(found.documents, found.positions, size)
    documents = of_text.documents
    _, ends = _documents_of(documents, document_starts, ngrams.text_length)
    lengths = ends - documents

    # Tokens that come twice have the same places, of which each counts once.
    part = (highs > lows).argmax(0)[positions]
    _, first = np.unique(part << 32 | lows[part, positions], return_index=True)
    distinct = positions[np.sort(first)]
    runs = np.zeros(len(documents), dtype=np.int64)
    for found in find(distinct):
        runs += np.bincount(np.searchsorted(documents, found.documents), minlength=len(documents))
    may_be = documents[2 * size * runs >= lengths]
    kept = [np.stack(found[1:])[:, np.isin(found.documents, may_be)] for found in find(distinct)]
    places, of_places = np.concatenate(kept, axis=1)
    of_documents = _Shared(NONE, NONE, NONE).with_runs(of_places, places, size)

    shared = np.zeros(len(documents), dtype=np.int64)
    shared[np.searchsorted(documents, of_documents.documents)] = of_documents.tokens
    return np.stack([documents, ends])[:, (2 * of_text.tokens >= len(tokens)) | (2 * shared >= lengths)]


def _documents_of(places: np.ndarray, document_starts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents, or pieces of them, begin and end in which places are, of a text of ``count`` tokens."""
    number = np.searchsorted(document_starts, places, side="right")
    begins, last = document_starts[number - 1], len(document_starts) - 1
    ends = np.where(number <= last, document_starts[np.minimum(number, last)], count)
    begins = begins + (places - begins) // LONGEST * LONGEST
    return begins, np.minimum(begins + LONGEST, ends)
