"""The suffix array of a datastore's text on disk: what the folder holds, and opening it.

It is the folder ``suffixes`` inside the datastore's with, for each of its parts, which are cut between documents,

- ``order.000.npy``: int32 ``[suffixes]``, the place in the part of each suffix of its documents, sorted. A document's
  end comes before every token. Documents that were removed have none;
- ``heads.000.npy``: int64 ``[largest token + 2]``, where in the order the suffixes begin whose first token is each;
- ``suffixes.json``: the checksums of the text that it is of, and the parts. Written last: a folder without one is not
  finished.

``knn_lm_eval.methods.ngrams`` looks n-grams up in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.ngrams import Ngrams, SortedText, begin_bits
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.joined import JoinedStore, Store, short_checksum, stores_of
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    REMOVED,
    VALUES,
    Manifest,
    checksums_of_derived,
    recorded_checksums,
)
from knn_lm_eval.store.verification import Expected, Limits
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import PROGRESS
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.json_schema import Count, check_json
from knn_lm_eval.system.seals import check_seal

FORMAT = "knn_lm_eval suffixes"
FORMAT_VERSION = 1
FOLDER, METADATA = "suffixes", "suffixes.json"
REMEDY = "fetch it or build it again with build_suffix_array"
MOST_IN_PART = 2**31 - 1  # entries

Record = TypeVar("Record")


class PartRecord(TypedDict):
    """A part: its entries, its suffixes, and the largest token that it has room for."""

    start: Count
    stop: Count
    suffixes: Count
    tokens: Count


class SuffixesJSON(TypedDict):
    """What ``suffixes.json`` holds, as far as it is read."""

    text: dict[str, str]
    parts: list[PartRecord]


def text_checksums(manifest: Manifest) -> dict[str, str]:
    """The SHA-256 of each file that decides which text a store has, by the files' names."""
    deciding = (VALUES, DOCUMENT_STARTS, REMOVED)
    return {name: manifest.files[name]["sha256"] for name in deciding if name in manifest.files}


def array_names(number: int) -> tuple[str, str]:
    """The files of a part: its order and its heads."""
    return f"order.{number:03d}.npy", f"heads.{number:03d}.npy"


def open_suffixes(store: Store) -> Ngrams:
    """Open the suffix array of a datastore, or those of several as one, for look-ups; their arrays are memory-mapped.

    Memory: a bit per entry.

    Raises
    ------
    UserError
        Where there is none, it is damaged or not finished, or it is of another text than the store's by now.
    """
    return Ngrams([part for datastore in stores_of(store) for part in _open_parts(datastore)])


def _open_parts(datastore: Datastore) -> list[SortedText]:
    folder = datastore.path / FOLDER
    parts = _read(datastore)["parts"]
    opened, files = [], [Expected(folder / METADATA, remedy=REMEDY, sha256=None)]
    for number, part in enumerate(parts):
        order, heads = (folder / name for name in array_names(number))
        count = part["stop"] - part["start"]
        arrays = _open(order, np.int32, part["suffixes"]), _open(heads, np.int64, part["tokens"] + 1)
        files += [
            Expected(order, None, Limits(0, count), remedy=REMEDY),
            Expected(heads, None, Limits(0, part["suffixes"] + 1, ascending=True), remedy=REMEDY),
        ]
        starts = datastore.document_starts
        first, last = np.searchsorted(starts, [part["start"], part["stop"]])
        text = datastore.values[part["start"] : part["stop"]]
        opened.append(SortedText(text, begin_bits(starts[first:last] - part["start"], count), *arrays))
    recorded = recorded_checksums(datastore.path)
    datastore.verification.check(f._replace(sha256=recorded.get(f"{FOLDER}/{f.path.name}")) for f in files)
    return opened


def suffixes_checksums(store: Store) -> dict[str, str]:
    """The SHA-256 of each file of the suffix array, by their paths in the store's folder; of several by store, too."""
    if isinstance(store, JoinedStore):
        each = ((short_checksum(one), suffixes_checksums(one)) for one in store.stores)
        return {f"{of}/{name}": checksum for of, checksums in each for name, checksum in checksums.items()}
    return _checksums(store)


def _checksums(datastore: Datastore) -> dict[str, str]:
    names = [f"{FOLDER}/{name}" for number in range(len(_read(datastore)["parts"])) for name in array_names(number)]
    return checksums_of_derived(datastore.path, f"{FOLDER}/{METADATA}", names)


def has_suffixes(datastore: Datastore) -> bool:
    """Whether the store has a suffix array that is finished."""
    return (datastore.path / FOLDER / METADATA).is_file()


def without_suffixes(records: dict[str, Record]) -> dict[str, Record]:
    """What is recorded of files, by their paths in a store's folder, but of its suffix array."""
    return {name: record for name, record in records.items() if not name.startswith(f"{FOLDER}/")}


def _read(datastore: Datastore) -> dict[str, Any]:
    """What ``suffixes.json`` says, which is of this text."""
    path = datastore.path / FOLDER / METADATA
    if not path.is_file():
        if (path.parent / PROGRESS).is_file():
            raise UserError(f"The suffix array {path.parent} is not finished; go on with build_suffix_array --resume.")
        raise UserError(
            f"The datastore {datastore.path} has no suffix array, which ngram_lmbda and exclude_overlap look in; build "
            f"one with build_suffix_array."
        )
    said = check_seal(path, read_json(path), REMEDY)
    if said.get("format") != FORMAT or said.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is not of format {FORMAT!r}, version {FORMAT_VERSION}; {REMEDY}.")
    check_json(said, SuffixesJSON, path, REMEDY)
    if said["text"] != text_checksums(datastore.manifest):
        raise UserError(
            f"The suffix array {path.parent} is of another text than {datastore.path} has now; build it again, with "
            f"build_suffix_array --overwrite."
        )
    ends = [0, *(part["stop"] for part in said["parts"])]
    runs = [(part["start"], part["stop"]) for part in said["parts"]]
    if ends[-1] != len(datastore) or any(
        start != end or not start < stop <= start + MOST_IN_PART
        for (start, stop), end in zip(runs, ends[:-1], strict=True)
    ):
        raise UserError(f"{path} is damaged: its parts are not the runs of {len(datastore):,} entries; {REMEDY}.")
    return said


def _open(path: Path, dtype: type[Any], length: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"The suffix array {path.parent} is incomplete: {path.name} is missing; {REMEDY}.")
    array = map_npy(path, REMEDY)
    if array.dtype != dtype or array.shape != (length,):
        raise UserError(
            f"{path} is not what {METADATA} says: it holds {array.dtype} {list(array.shape)}, expected "
            f"{np.dtype(dtype)} [{length}]; {REMEDY}."
        )
    return array
