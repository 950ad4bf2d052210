"""The indexes of a store that changes: more entries behind those that it has, or some taken out.

None is trained anew: what it learnt stays, and so do the codes. An index in parts gets a part for what is new. What was
measured of an index is of the store that it was measured with, which its JSON then says under ``measured_with``; where
the store is that one again, the JSON is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import add_vectors, below_transform, bytes_held
from knn_lm_eval.search.index_build import write_index
from knn_lm_eval.search.index_reading import read_index
from knn_lm_eval.search.list_files import ListFile
from knn_lm_eval.search.segments import can_be_joined, join_segments
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import MOST_PARTS, IndexFiles, IndexPart, find_parts
from knn_lm_eval.store.key_stream import key_chunks
from knn_lm_eval.system.seals import write_sealed_json

MEASURED_WITH = "measured_with"


@dataclass(frozen=True)
class ChangedIndex:
    """An index of the store as it will be.

    Attributes
    ----------
    metadata : its JSON.
    files : where each of its files waits that is new, by its name; the JSON among them.
    gone : names of files that it has no more.
    """

    metadata: dict[str, Any]
    files: dict[str, Path]
    gone: list[str]


def extend_index(store: Datastore, name: str, keys: np.ndarray, keys_sha256: str, folder: Path) -> ChangedIndex:
    """The index ``name`` with the entries of new keys behind its own.

    Memory: the new entries' codes; of an index without lists, which is no file that can be joined, all of it.

    Parameters
    ----------
    keys : float16 or float32 ``[n, dimension]`` of the new entries, in order.
    keys_sha256 : of all keys, as they will be.
    folder : where the new files are written.

    Raises
    ------
    UserError
        Where faiss cannot add to such an index, it has no more parts, or the disk is full.
    """
    metadata, parts = find_parts(store, name)
    files, count = IndexFiles(store.path, name), len(store) + len(keys)
    if "parts" not in metadata and ListFile.open(parts[0].path) is None:
        new = folder / files.index.name
        whole = faiss.read_index(str(parts[0].path))
        _add(whole, keys)
        write_index(whole, new)
        return _changed(store, files, metadata, count, keys_sha256, [new], {new.name: new}, folder)
    segment = folder / f"{files.index.name}.segment"
    first_id = len(store) if metadata.get("part_ids") == "absolute" else None
    _write_segment(emptied(parts[0]), keys, segment, first_id)
    changed = join_index(store, name, segment, len(keys), keys_sha256, folder)
    if segment not in changed.files.values():
        segment.unlink()
    return changed


def join_index(
    store: Datastore, name: str, segment: Path, entries: int, keys_sha256: str, folder: Path
) -> ChangedIndex:
    """The index ``name`` with the entries of another index file behind its own.

    Memory: some lists at a time.

    Parameters
    ----------
    segment : the file, trained as the index is, which numbers its entries as a part of it does; it may become one.
    entries : how many it has.
    keys_sha256, folder : as for ``extend_index``.

    Raises
    ------
    UserError
        Where the index has no more parts, the segment does not fit it, or the disk is full.
    """
    metadata, parts = find_parts(store, name)
    files, count = IndexFiles(store.path, name), len(store) + entries
    if "parts" in metadata:
        _check_more_parts(files, parts)
        new, final = segment, files.part(len(parts))
        run = {"start": len(store), "stop": count, "bytes": new.stat().st_size}
        metadata = metadata | {"parts": [*metadata["parts"], run]}
        paths = [*(part.path for part in parts), new]
    else:
        new, final = folder / files.index.name, files.index
        join_segments([parts[0].path, segment], new)
        paths = [new]
    return _changed(store, files, metadata, count, keys_sha256, paths, {final.name: new}, folder)


def _check_more_parts(files: IndexFiles, parts: list[IndexPart]) -> None:
    if len(parts) >= MOST_PARTS:
        raise UserError(f"The index {files.index} has {MOST_PARTS} parts, the most there can be; build it again.")


def check_growable_without_keys(store: Datastore, name: str) -> None:
    """Raise UserError where ``join_index`` cannot have the index ``name`` grow."""
    metadata, parts = find_parts(store, name)
    files, listed = IndexFiles(store.path, name), ListFile.open(parts[0].path)
    if "parts" in metadata:
        _check_more_parts(files, parts)
    kind = None if listed is not None and can_be_joined(listed.index) else metadata["factory"]
    if metadata.get("part_ids") == "absolute":
        kind = "parts that number entries as the store does"
    if kind is not None:
        raise UserError(
            f"The index {files.index} ({kind}) cannot take in entries segment by segment, which appending to a "
            f"datastore without keys needs; dump all text again with dump_datastore."
        )


def check_compactable(store: Datastore, name: str) -> None:
    """Raise UserError where entries cannot be taken out of the index ``name``."""
    metadata, parts = find_parts(store, name)
    files = IndexFiles(store.path, name)
    kind = next((kind for part in parts if (kind := _obstacle(part)) is not None), None)
    if metadata.get("part_ids") == "absolute" and len(parts) > 1:
        kind = "parts that number entries as the store does"
    if kind is not None:
        raise UserError(
            f"Entries cannot be taken out of the index {files.index} ({kind}): delete {files.metadata.name} and its "
            f"files, compact the datastore, and build the index again."
        )


def compact_index(store: Datastore, name: str, kept: np.ndarray, keys_sha256: str, folder: Path) -> ChangedIndex:
    """The index ``name`` without the entries that are not kept, which must be compactable.

    Memory: some lists at a time; of an index without lists all of it.

    Parameters
    ----------
    kept : bool ``[count]``, may be memory-mapped; some are.
    keys_sha256, folder : as for ``extend_index``.
    """
    metadata, parts = find_parts(store, name)
    files, new, stop = IndexFiles(store.path, name), dict[str, Path](), 0
    runs: list[dict[str, int]] = []
    paths: list[Path] = []
    for part in parts:
        of_part = kept[part.start : part.stop]
        if not (there := int(np.count_nonzero(of_part))):
            continue
        final = files.part(len(runs)) if "parts" in metadata else files.index
        path = part.path
        if there < len(of_part) or final.name != path.name:
            path = new[final.name] = folder / final.name
            _write_kept(part, of_part, path)
        runs.append({"start": stop, "stop": stop + there, "bytes": path.stat().st_size})
        paths.append(path)
        stop += there
    if "parts" in metadata:
        metadata = metadata | {"parts": runs}
    changed = _changed(store, files, metadata, stop, keys_sha256, paths, new, folder)
    left = [part.path.name for part in parts[len(runs) :]]
    return ChangedIndex(changed.metadata, changed.files, left)


def _changed(
    store: Datastore,
    files: IndexFiles,
    metadata: dict[str, Any],
    count: int,
    keys_sha256: str,
    paths: list[Path],
    new: dict[str, Path],
    folder: Path,
) -> ChangedIndex:
    """The index with its JSON: ``paths`` are all its files, ``new`` those that are new."""
    measured = metadata.get(MEASURED_WITH) or {"keys_sha256": store.keys_checksum, "count": len(store)}
    said = {field: value for field, value in metadata.items() if field != MEASURED_WITH} | {
        "keys_sha256": keys_sha256,
        "count": count,
        "bytes": sum(path.stat().st_size for path in paths),
        "bytes_held": sum(bytes_held(read_index(path)) for path in paths),
    }
    said = {field: value for field, value in said.items() if field in metadata}
    if measured["keys_sha256"] != keys_sha256:
        said[MEASURED_WITH] = measured
    json = folder / files.metadata.name
    write_sealed_json(json, said)
    return ChangedIndex(said, new | {json.name: json}, [])


def emptied(part: IndexPart) -> faiss.Index:
    """An index trained as that part, without entries."""
    listed = ListFile.open(part.path)
    index = faiss.read_index(str(part.path)) if listed is None else listed.index
    if listed is None:
        index.reset()
        return index
    index.ntotal = below_transform(index).ntotal = 0
    return index


def _write_segment(index: faiss.Index, keys: np.ndarray, path: Path, first_id: int | None) -> None:
    """Write an index of some keys, numbered from ``first_id``; None numbers them from 0, as all indexes can."""
    if first_id is None:
        _add(index, keys)
    else:
        for chunk in key_chunks(keys):
            index.add_with_ids(chunk, first_id + index.ntotal + np.arange(len(chunk)))
    write_index(index, path)


def _add(index: faiss.Index, keys: np.ndarray) -> None:
    """Add keys behind those that it has."""
    with tqdm(total=len(keys), desc="Adding keys", unit=" keys", unit_scale=True) as bar:
        for chunk in key_chunks(keys):
            add_vectors(index, chunk)
            bar.update(len(chunk))


def _write_kept(part: IndexPart, kept: np.ndarray, path: Path) -> None:
    if ListFile.open(part.path) is not None:
        join_segments([part.path], path, kept)
        return
    library: Any = faiss  # whose type stubs lack some of what is used here
    index = faiss.read_index(str(part.path))
    away = np.packbits(~np.asarray(kept), bitorder="little")
    index.remove_ids(library.IDSelectorBitmap(away))
    assert index.ntotal == np.count_nonzero(kept), "faiss took other entries out"
    write_index(index, path)


def _obstacle(part: IndexPart) -> str | None:
    """Why entries cannot be taken out of a file; None where they can."""
    if ListFile.open(part.path) is not None:
        return None
    # Those that keep code after code close up and number entries anew; others do not, or cannot at all.
    index = read_index(part.path)
    is_plain = isinstance(below_transform(index), faiss.IndexFlatCodes)
    return None if is_plain else type(index).__name__
