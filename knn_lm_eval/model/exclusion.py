"""Neighbours that are left out because the scored text stands in the datastores, or a part of it.

It is a filter of the neighbours that were found: at a position it leaves out those whose context has the last
``overlap`` tokens in common with the text, and all of documents that are the text itself (``same_documents``).
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.lm.reading import Passage, Reading, WholeText
from knn_lm_eval.methods.left_out import Contexts, TextPart, left_out
from knn_lm_eval.methods.same_documents import same_documents
from knn_lm_eval.store.joined import Store, stores_of
from knn_lm_eval.store.suffixes import open_suffixes
from knn_lm_eval.system.timing import StageTimer


class Exclusion:
    """What is left out of the neighbours in a datastore, or in several, and counts of it.

    Parameters
    ----------
    store : in text order, with suffix arrays.
    overlap : tokens of context in common from which on a neighbour is left out.

    Raises
    ------
    UserError
        Where the store is in no text order or has no suffix array, or one of another text.
    """

    def __init__(self, store: Store, overlap: int) -> None:
        store.require_text_order("exclude_overlap")
        self.overlap, self._store, self._ngrams = overlap, store, open_suffixes(store)
        stores, first = stores_of(store), 0
        self._parts = []
        for one in stores:
            self._parts.append(TextPart(one.values, one.document_starts, first))
            first += len(one)
        # Of texts that somebody has still use for: entries of documents that are left out, int64 [2, runs].
        self._runs: WeakKeyDictionary[WholeText, np.ndarray] = WeakKeyDictionary()
        self._timed = StageTimer(("overlap",), torch.device("cpu"))
        self._texts, self._documents, self._found, self._left_out = 0, 0, 0, 0

    @property
    def seconds(self) -> dict[str, float]:
        """What it took, by stage: ``overlap``."""
        return self._timed.seconds

    @property
    def counts(self) -> dict[str, float]:
        """Texts, and documents that were left out for them; neighbours that searches found, and those of them that
        were left out. (Walks count their own.)"""
        return {
            "texts_compared": self._texts,
            "documents_left_out": self._documents,
            "neighbours_found": self._found,
            "neighbours_left_out": self._left_out,
        }

    def contexts(self, reading: Reading) -> Contexts:
        """Those of a batch's rows."""
        return Contexts.joined([self._of_passage(passage) for passage in reading.passages])

    def is_left_out(self, contexts: Contexts, entries: np.ndarray) -> np.ndarray:
        """As ``left_out``, of which nothing is counted."""
        with self._timed("overlap"):
            return left_out(self._parts, contexts, entries)

    def of_found(self, contexts: Contexts, entries: Tensor) -> Tensor:
        """Which of the neighbours of some rows are left out: bool ``[n, k]``, of entries int64 ``[n, k]``."""
        marked = self.is_left_out(contexts, entries.cpu().numpy())
        self._found += int((entries >= 0).sum())
        self._left_out += int(np.count_nonzero(marked))
        return torch.from_numpy(marked).to(entries.device)

    def _of_passage(self, passage: Passage) -> Contexts:
        whole = passage.whole or WholeText.of(passage.tokens)
        runs = self._runs.get(whole)
        if runs is None:
            runs = self._runs[whole] = self._runs_of(whole)
        first = passage.start + len(passage.tokens) - passage.rows + 1
        return Contexts.of_text(whole.tokens, first, passage.rows, self.overlap, runs)

    def _runs_of(self, whole: WholeText) -> np.ndarray:
        """The entries of the documents that are this text."""
        with self._timed("overlap"):
            starts = np.asarray(self._store.document_starts)
            runs = same_documents(self._ngrams, starts, whole.tokens, self.overlap)
        self._texts += 1
        self._documents += runs.shape[1]
        return runs
