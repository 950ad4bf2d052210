"""Which datastores, and which parts of them, an evaluation searches: named, opened, left out; nothing is built for it.

Several are joined by ``+``, or a list. A part is a store, by its folder's name, or of a store that was appended to one
of its texts, as ``STORE:TEXT``: the manifest knows which documents came with which text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.fetching import fetched_folder, is_address
from knn_lm_eval.store.joined import BETWEEN, JoinedStore, Store
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.store.removed import Removed

logger = logging.getLogger(__name__)

DATASTORE_VARIABLE = "KNN_LM_EVAL_DATASTORE"
OF_STORE = ":"  # before a text's name
UNNAMED = "unnamed"

# A folder or an address; several in a list, or joined by ``BETWEEN``.
Given = str | os.PathLike | Sequence[str | os.PathLike] | None


class ChosenStores(NamedTuple):
    """What is searched.

    Attributes
    ----------
    store : one datastore, or several as one; where documents are left out they count as removed.
    numbers : of each, its place among those that were given.
    given : all that were given, for what was tuned with them.
    """

    store: Store
    numbers: tuple[int, ...]
    given: Store


class Source(NamedTuple):
    """A text that a store was made of: the documents from ``first`` up to ``stop``."""

    name: str
    first: int
    stop: int


def choose_stores(
    given: Given, verify: str = "auto", sources: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> ChosenStores:
    """Find and open datastores, without those parts that are not to count.

    Parameters
    ----------
    given : None is what the environment variable ``KNN_LM_EVAL_DATASTORE`` names.
    verify : as for ``Datastore.open``; stores that are left out are not read.
    sources : the parts that count, by their names; None is all.
    exclude : the parts that do not.

    Raises
    ------
    UserError
        Where there is no such store or part, nothing is left, or the stores' keys do not go together.
    """
    paths = list_stores(given)
    names = store_names(paths)
    folders = [fetched_folder(path) for path in paths]
    counting = [_documents_that_count(names, n, folder, sources, exclude) for n, folder in enumerate(folders)]
    _check_named(names, folders, [*(sources or ()), *(exclude or ())])
    opened = [
        Datastore.open(folder, verify if counts is None or counts.any() else "never")
        for folder, counts in zip(folders, counting, strict=True)
    ]
    kept = [number for number, counts in enumerate(counting) if counts is None or counts.any()]
    if not kept:
        raise UserError(f"sources and exclude leave nothing of the datastore {BETWEEN.join(names)}; name fewer parts.")
    chosen = [_without(opened[number], counting[number]) for number in kept]
    store: Store = chosen[0] if len(kept) == 1 else JoinedStore(tuple(chosen), tuple(names[number] for number in kept))
    everything: Store = opened[0] if len(opened) == 1 else JoinedStore(tuple(opened), tuple(names))
    return ChosenStores(store, tuple(kept), everything)


def list_stores(given: Given) -> list[str]:
    """The folders or addresses in what was given, one or more; raises UserError where there is none.

    A folder whose own name has a ``+`` is one store.
    """
    given = given or os.environ.get(DATASTORE_VARIABLE)
    if not given:
        raise UserError(
            "knn-hf needs a datastore: give --model_args datastore=FOLDER, or set the environment variable "
            f"{DATASTORE_VARIABLE}; make one with `knn-lm-eval dump_datastore` and `knn-lm-eval build_index`."
        )
    if not isinstance(given, (str, os.PathLike)):
        paths = [os.fspath(path) for path in given]
    elif isinstance(given, os.PathLike) or (not is_address(given) and Path(given).exists()):
        paths = [os.fspath(given)]
    else:
        paths = given.split(BETWEEN)
    if not all(paths):
        raise UserError(f"datastore={given} has an empty part: give folders or addresses, with {BETWEEN} between them.")
    return paths


def store_names(paths: Sequence[str]) -> list[str]:
    """What stores are called: their folders' names, with as many of the folders above as tell them apart."""
    whole = [path if is_address(path) else str(Path(path).resolve()) for path in paths]
    parts = [[part for part in path.split("/") if part] for path in whole]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(of_path[-length:]) for of_path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"datastore={BETWEEN.join(paths)} names one datastore twice; name it once.")


def sources_of(manifest: Manifest) -> list[Source]:
    """The texts that a store was made of, in order: that of the dump, then those that were appended."""
    documents = manifest.documents or 0
    first = manifest.appended[0]["first"] if manifest.appended else documents
    sources = [Source(_source_name(manifest.source), 0, first)]
    return sources + [Source(_source_name(each["source"]), each["first"], each["stop"]) for each in manifest.appended]


def _source_name(source: dict) -> str:
    """A file's name, or a data set's; what Python handed over has none."""
    return Path(str(source["text"])).name if "text" in source else str(source.get("dataset", UNNAMED))


def _documents_that_count(
    names: Sequence[str], number: int, folder: Path, sources: Sequence[str] | None, exclude: Sequence[str] | None
) -> np.ndarray | None:
    """Which documents of a store count, bool ``[documents]``; None for all, ``[False]`` for none of them."""
    included = _named(names[number], folder, sources) if sources is not None else True
    excluded = _named(names[number], folder, exclude) if exclude is not None else False
    if isinstance(included, bool) and isinstance(excluded, bool):
        return None if included and not excluded else np.array([False])
    return np.asarray(included) & ~np.asarray(excluded)


def _named(name: str, folder: Path, parts: Sequence[str]) -> bool | np.ndarray:
    """Whether the store, or which of its documents, bool ``[documents]``, are among the parts."""
    if name in parts:
        return True
    texts = [part.removeprefix(name + OF_STORE) for part in parts if part.startswith(name + OF_STORE)]
    if not texts:
        return False
    manifest = Manifest.read(folder)
    if not manifest.text_order or manifest.documents is None:
        raise UserError(
            f"The datastore {folder} does not know which entries are of which text, since entries were merged or left "
            f"out; name all of it, {name}."
        )
    named = np.zeros(manifest.documents, dtype=bool)
    known = sources_of(manifest)
    for text in texts:
        found = [source for source in known if source.name == text]
        if not found:
            raise UserError(
                f"The datastore {folder} has no text called {text!r}; it has "
                f"{', '.join(dict.fromkeys(source.name for source in known))}."
            )
        for source in found:
            named[source.first : source.stop] = True
    return named


def _check_named(names: Sequence[str], folders: Sequence[Path], parts: Sequence[str]) -> None:
    """Raise UserError where a part is of no store."""
    for part in parts:
        if not any(part == name or part.startswith(name + OF_STORE) for name in names):
            raise UserError(
                f"sources and exclude know no part called {part!r}: the stores are {', '.join(names)}, and a text of "
                f"one is STORE{OF_STORE}TEXT."
            )


def _without(store: Datastore, counting: np.ndarray | None) -> Datastore:
    """The store without the documents that do not count, which are as if they had been removed."""
    if counting is None or counting.all():
        return store
    away = np.flatnonzero(~counting)
    if store.removed is not None:
        away = np.union1d(away, store.removed.documents)
    removed = Removed.of_documents(away, store.document_starts, len(store))
    if not removed.kept:
        raise UserError(f"sources and exclude leave no entry of the datastore {store.path}; name all of it or none.")
    return replace(store, removed=removed)
