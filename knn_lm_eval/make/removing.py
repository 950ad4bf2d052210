"""Removing documents from a datastore: from now on no search finds their entries, which stay in the files until
``compact_datastore`` takes them out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.make.tokens import write_values
from knn_lm_eval.store.change import Change, one_change_of
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, REMOVED, VALUES, file_record, held_manifest
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.store.suffixes import FOLDER as SUFFIXES
from knn_lm_eval.store.suffixes import has_suffixes, without_suffixes

logger = logging.getLogger(__name__)

WAITING = ".removing"
TOKENS_COMPARED = 8  # of a document, before all of it


class Found(NamedTuple):
    """Documents of a store that are equal to some of a text.

    Attributes
    ----------
    documents : int64, their numbers, ascending.
    wanted, missing : how many the text has, and how many of them the store has not.
    """

    documents: np.ndarray
    wanted: int
    missing: int


def remove_documents(folder: str | Path, documents: Sequence[int] | np.ndarray) -> Datastore:
    """Have the datastore's searches leave out documents, by their numbers from 0.

    Those that were removed before stay so.

    Raises
    ------
    UserError
        Where there is no such document, none would stay, the store has lost its text's order, or another process is
        changing it.
    """
    folder, wanted = Path(folder), np.unique(np.asarray(documents, dtype=np.int64))
    with one_change_of(folder):
        store = Datastore.open(folder)
        store.require_text_order("removing documents")
        count = len(store.document_starts)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < count:
            wrong = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise UserError(
                f"The datastore {folder} has no document {wrong:,}: it has {count:,}, the first of which is number 0."
            )
        before = np.empty(0, dtype=np.int64) if store.removed is None else store.removed.documents
        numbers = np.union1d(before, wanted)
        if len(numbers) == len(before):
            return store
        removed = Removed.of_documents(numbers, store.document_starts, len(store))
        if not removed.kept:
            raise UserError(f"Nothing would stay of the datastore {folder}; delete it instead.")
        if has_suffixes(store):
            logger.warning("The suffix array has the removed documents, and goes: build it again (build_suffix_array).")
        _write(folder, numbers)
    return Datastore.open(folder)


def _write(folder: Path, numbers: np.ndarray) -> None:
    waiting = folder / WAITING
    shutil.rmtree(waiting, ignore_errors=True)
    waiting.mkdir()
    np.save(waiting / REMOVED, numbers)
    record = file_record(waiting / REMOVED)
    with held_manifest(folder) as manifest:
        derived = without_suffixes(manifest.derived)
        manifest = replace(manifest, files=manifest.files | {REMOVED: record}, derived=derived)
        Change(WAITING, manifest.to_json(), {REMOVED: f"{WAITING}/{REMOVED}"}, gone=[SUFFIXES]).make(folder)


def documents_of_text(store: Datastore, text: Path, load_lm: Callable[[], CausalHFLM], folder: Path) -> Found:
    """The documents of a store that are equal to one of a text file, token by token.

    The file is cut into documents in each way in which the store's own texts were.

    Parameters
    ----------
    load_lm : gives the store's LM, for its tokenizer.
    folder : an empty one, for the text's tokens.
    """
    sources = [store.manifest.source, *(record["source"] for record in store.manifest.appended)]
    modes = list(dict.fromkeys(str(source.get("documents", "line")) for source in sources))
    lm, found = load_lm(), Found(np.empty(0, dtype=np.int64), 0, 0)
    for mode in modes:
        write_values(lm, TextSource(text, documents=mode).pieces(), folder, None)
        values, starts = np.load(folder / VALUES, mmap_mode="r"), np.load(folder / DOCUMENT_STARTS)
        equal = equal_documents(store, values, starts)
        if len(equal.documents) or not found.wanted:
            found = Found(np.union1d(found.documents, equal.documents), equal.wanted, equal.missing)
    return found


def equal_documents(store: Datastore, values: np.ndarray, starts: np.ndarray) -> Found:
    """The documents of a store that are equal to one of a tokenized text.

    Parameters
    ----------
    values, starts : the text's tokens, and where its documents begin.
    """
    lengths = np.diff(store.document_starts, append=len(store))  # [documents]
    by_length = np.argsort(lengths, kind="stable")  # [documents]
    ordered = lengths[by_length]
    found, missing = [], 0
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True):
        tokens = np.asarray(values[begin:end])
        first, last = np.searchsorted(ordered, [len(tokens), len(tokens) + 1]).tolist()
        same = by_length[first:last]  # of that length, then of those first tokens, then of all
        for place in range(min(TOKENS_COMPARED, len(tokens))):
            same = same[store.values[store.document_starts[same] + place] == tokens[place]]
        at = store.document_starts[same].tolist()
        equal = [np.array_equal(store.values[start : start + len(tokens)], tokens) for start in at]
        found.append(same[np.array(equal, dtype=bool)])
        missing += not any(equal)
    return Found(np.unique(np.concatenate(found)), len(starts), missing)
