"""Taking removed documents out of a datastore's files: its arrays, indexes and clusterings.

The files are written anew beside the old ones, then take their places all at once. What was interrupted before that is
begun again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_lm_eval.make.changed_clusters import compact_clusters
from knn_lm_eval.make.changed_store import Changed
from knn_lm_eval.search.changed_index import check_compactable, compact_index
from knn_lm_eval.store.change import one_change_of
from knn_lm_eval.store.clusters import cluster_names
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import index_names
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, REMOVED, VALUES, AppendedRecord, FileRecord, file_record
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.system.files import check_free_space, write_npy_header

WAITING = ".compacting"
COPIED_BYTES = 2**24  # at a time


def compact_datastore(folder: str | Path) -> Datastore:
    """Take the removed documents out of the files of the datastore in ``folder``; nothing where there are none.

    Keys, values, indexes and clusterings are those of a store that never had these documents, byte for byte, as far as
    what was trained with them stays: an index's lists, and clusters, which may become empty.

    Raises
    ------
    UserError
        Where an index has no such form without some entries, the disk is full, or another process is changing the
        store.
    """
    folder = Path(folder)
    with one_change_of(folder):
        store = Datastore.open(folder)
        waiting = folder / WAITING
        shutil.rmtree(waiting, ignore_errors=True)
        if store.removed is None:
            return store
        for name in index_names(store):
            check_compactable(store, name)
        _check_room(store, store.removed)
        changed = Changed(store, waiting)
        changed.new.mkdir(parents=True)
        _compact(store, store.removed, changed)
    return Datastore.open(folder)


def _check_room(store: Datastore, removed: Removed) -> None:
    records = [record for name, record in (store.manifest.files | store.manifest.derived).items()]
    size = sum(record["bytes"] for record in records) * removed.kept // max(1, len(store)) + len(store)
    check_free_space(store.path, size, f"the files of {removed.kept:,} entries, beside those that they replace,")


def _compact(store: Datastore, removed: Removed, changed: Changed) -> None:
    starts = _starts_without(store, removed)
    keys_file = None if store.manifest.keys is None else store.manifest.keys.file
    arrays = {VALUES: store.values} | ({} if keys_file is None or store.keys is None else {keys_file: store.keys})
    records: dict[str, FileRecord] = {}
    for name, array in arrays.items():
        _write_kept(array, removed, changed.new / name)
        is_raw = name == keys_file and not name.endswith(".npy")
        records[name] = file_record(changed.new / name, array.dtype if is_raw else None)
        changed.place(name, changed.new / name)
    np.save(changed.new / DOCUMENT_STARTS, starts)
    records[DOCUMENT_STARTS] = file_record(changed.new / DOCUMENT_STARTS)
    changed.place(DOCUMENT_STARTS, changed.new / DOCUMENT_STARTS)
    changed.keys_sha256 = records[keys_file or VALUES]["sha256"]
    kept = _mask(removed, changed.folder / "kept.npy")
    for name in index_names(store):
        changed.place_index(compact_index(store, name, kept, changed.keys_sha256, changed.new))
    values = np.load(changed.new / VALUES, mmap_mode="r")
    for name in cluster_names(store):
        in_folder = changed.new / "clusters" / name
        changed.place_clusters(name, compact_clusters(store, name, kept, values, changed.keys_sha256, in_folder))
    changed.place_params()
    changed.gone.append(REMOVED)
    files = {name: records.get(name, record) for name, record in store.manifest.files.items() if name != REMOVED}
    fields: dict[str, Any] = {"count": removed.kept, "files": files, "appended": _appended_without(store, removed)}
    if store.manifest.documents is not None:
        fields["documents"] = len(starts)
    changed.make(**fields)


def _write_kept(array: np.ndarray, removed: Removed, path: Path) -> None:
    """Write the rows that are kept: as .npy, or without a header where the name is another."""
    with (
        open(path, "wb") as file,
        tqdm(total=removed.kept, desc=f"Copying {path.stem}", unit=" entries", unit_scale=True) as bar,
    ):
        if path.suffix == ".npy":
            write_npy_header(file, array.dtype, (removed.kept, *array.shape[1:]))
        for start, stop in _pieces(removed, max(1, COPIED_BYTES // (array.nbytes // len(array)))):
            file.write(np.ascontiguousarray(array[start:stop]).data)
            bar.update(stop - start)
        file.flush()
        os.fsync(file.fileno())


def _pieces(removed: Removed, size: int) -> Iterator[tuple[int, int]]:
    """The entries that are kept, in order, in runs of at most ``size``."""
    for start, stop in removed.kept_runs():
        for begin in range(start, stop, size):
            yield begin, min(begin + size, stop)


def _mask(removed: Removed, path: Path) -> np.ndarray:
    """bool ``[count]``, in a file: which entries are kept."""
    kept = np.lib.format.open_memmap(path, "w+", np.bool_, (removed.count,))
    for start, stop in removed.kept_runs():
        kept[start:stop] = True
    return kept


def _starts_without(store: Datastore, removed: Removed) -> np.ndarray:
    """Where the other documents will begin, int64."""
    lengths = np.delete(np.diff(store.document_starts, append=len(store)), removed.documents)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def _appended_without(store: Datastore, removed: Removed) -> list[AppendedRecord]:
    """What the manifest will say of documents that were appended: those of which some are left, numbered anew."""
    records = []
    for record in store.manifest.appended:
        first, stop = (record[end] - int(np.searchsorted(removed.documents, record[end])) for end in ("first", "stop"))
        if first < stop:
            records.append(AppendedRecord(**record | {"first": first, "stop": stop}))
    return records
