"""Texts as lists of documents, what occurs in them found in plain loops, and stores of them without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from knn_lm_eval.methods.ngrams import Ngrams, SortedText, begin_bits
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import FORMAT, FORMAT_VERSION
from knn_lm_eval.system.files import sha256, write_json

Documents = Sequence[Sequence[int] | np.ndarray]


def make_text_store(folder: Path, documents: Documents) -> Datastore:
    """A datastore of these tokens, whose keys are zeros."""
    folder.mkdir(parents=True)
    lengths = [len(document) for document in documents]
    values = np.concatenate([np.asarray(document, dtype=np.int32) for document in documents])
    np.save(folder / "keys.npy", np.zeros((len(values), 2), dtype=np.float16))
    np.save(folder / "values.npy", values)
    np.save(folder / "document_starts.npy", np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64))
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in folder.glob("*.npy")}
    shape = {"count": len(values), "dimension": 2, "documents": len(documents)}
    write_json(
        folder / "manifest.json",
        {"format": FORMAT, "format_version": FORMAT_VERSION, **shape, "files": files},
    )
    return Datastore.open(folder)


def count(documents: Documents, wanted: Sequence[int], continued: bool = False) -> int:
    """How often some tokens occur in the documents (where ``continued``, with one behind them)."""
    length, found = len(wanted), 0
    for document in documents:
        for start in range(len(document) - length + (0 if continued else 1)):
            found += list(document[start : start + length]) == list(wanted)
    return found


def longest_end(documents: Documents, context: Sequence[int], continued: bool) -> int:
    """How many of the context's last tokens occur."""
    for length in range(len(context), 0, -1):
        if count(documents, context[len(context) - length :], continued):
            return length
    return 0


def ngram_p(documents: Documents, context: Sequence[int], target: int) -> float:
    """p of the unbounded n-gram LM; NaN where the context's last token occurs nowhere with one behind it."""
    length = longest_end(documents, context, continued=True)
    if length == 0:
        return float("nan")
    end = list(context[len(context) - length :])
    return count(documents, [*end, target]) / count(documents, end, continued=True)


def sorted_text(documents: Documents) -> SortedText:
    """A text of these documents, sorted as lists are."""
    text = np.array([token for document in documents for token in document], dtype=np.int32)
    starts = np.cumsum([0, *(len(document) for document in documents)])
    suffixes = [
        (list(document[at:]), start + at)
        for document, start in zip(documents, starts.tolist(), strict=False)
        for at in range(len(document))
    ]
    order = np.array([place for _, place in sorted(suffixes)], dtype=np.int32)
    heads = np.concatenate([[0], np.cumsum(np.bincount(text))])
    return SortedText(text, begin_bits(starts[:-1], len(text)), order, heads)


def in_parts(documents: Documents, cut: int) -> Ngrams:
    """Look-ups in these documents, in two parts or in one."""
    cut %= len(documents)
    return Ngrams([sorted_text(part) for part in (documents[:cut], documents[cut:]) if part])
