"""Building the suffix array of a datastore's text, in parts that fit in memory.

A part is some documents, one after the other. Each is sorted and written on its own, so that what was interrupted goes
on with the next part; a look-up goes through all parts, so few are better.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.suffix_sorting import BYTES_PER_SYMBOL, MOST_SYMBOLS, sort_suffixes
from knn_lm_eval.methods.ngrams import Ngrams
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import Manifest, forget_derived, now, record_derived
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.store.suffixes import (
    FOLDER,
    FORMAT,
    FORMAT_VERSION,
    METADATA,
    PartRecord,
    array_names,
    open_suffixes,
    text_checksums,
)
from knn_lm_eval.system.checkpoints import PROGRESS, SavedStates
from knn_lm_eval.system.files import check_free_space, disk_errors_in, replace_file, write_npy_header
from knn_lm_eval.system.json_schema import Count
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.memory import allowed_bytes, size_text
from knn_lm_eval.system.seals import write_sealed_json

AT_ONCE = 2**22  # entries, of what is read and written
BASE_BYTES = 2**26  # that it takes beside the symbols
MOST_TOKEN = 2**24  # beyond it no vocabulary goes
UNDER_WAY = ".npy.part"


class _Notes(TypedDict):
    ends: list[Count]


def build_suffix_array(
    datastore: Datastore, memory: int | None = None, resume: bool = False, overwrite: bool = False
) -> Ngrams:
    """Build the suffix array of the store's text, without its removed documents.

    Memory: ``BYTES_PER_SYMBOL`` for each entry of a part. A part is as large as that allows.

    Parameters
    ----------
    memory : bytes that it may take; None is half of what is available.
    resume : go on with what was interrupted, in its parts.
    overwrite : replace a suffix array that is there.

    Raises
    ------
    UserError
        Where the store has lost its text's order, has a suffix array, a document does not fit in memory, the disk is
        full, another process is at work on it, or the store was changed meanwhile.
    """
    datastore.require_text_order("a suffix array")
    ends = plan_parts(datastore, allowed_bytes(memory))
    folder, text = datastore.path / FOLDER, text_checksums(datastore.manifest)
    patterns = [f"*{UNDER_WAY}", "*.npy.tmp", "*.json.tmp"]
    states = SavedStates(folder / PROGRESS, {"text": text}, others=patterns, notes=_Notes)

    def check_place() -> None:
        if (folder / METADATA).exists() and not overwrite and not (resume and states.file.exists()):
            raise UserError(f"The suffix array {folder} exists already; give --overwrite to build it again.")

    check_place()
    with disk_errors_in(folder):
        folder.mkdir(exist_ok=True)
        with locked(folder / ".lock", f"the suffix array {folder}"):
            check_place()
            parts = _parts(datastore, states.begin_or_resume(resume, ends=ends)["ends"], states)
            check_free_space(folder, sum(4 * part["suffixes"] + 8 * part["tokens"] for part in parts), "its arrays")
            with _bar(sum(part["suffixes"] for part in parts)) as bar:
                for number, part in enumerate(parts):
                    _build_part(datastore, folder, number, part, bar)
            _finish(datastore, folder, states, parts)
    return open_suffixes(datastore)


def plan_parts(datastore: Datastore, memory: int) -> list[int]:
    """Where parts end, all of about one size, which sorting them in so many bytes allows."""
    count = len(datastore)
    most = min((memory - BASE_BYTES) // BYTES_PER_SYMBOL, MOST_SYMBOLS)
    ends = np.append(datastore.document_starts[1:], count)  # [documents]
    longest = int(np.diff(ends, prepend=0).max())
    if longest > MOST_SYMBOLS:
        raise UserError(
            f"The datastore {datastore.path} has a document of {longest:,} tokens, and a suffix array takes at most "
            f"{MOST_SYMBOLS:,}; dump the text in several documents."
        )
    if longest > most:
        needed = size_text(longest * BYTES_PER_SYMBOL + BASE_BYTES)
        raise UserError(
            f"The longest document of {datastore.path} has {longest:,} tokens, and sorting them takes {needed}, more "
            f"than {size_text(max(1, memory))}; give --memory {needed}."
        )
    size = -(-count // -(-count // most))
    chosen, start = [], 0
    while start < count:
        # With the document in which the size is reached or, where these are too many, without it.
        stop = int(ends[np.searchsorted(ends, min(start + size, count))])
        if stop - start > most:
            stop = int(ends[np.searchsorted(ends, start + most, side="right") - 1])
        chosen.append(stop)
        start = stop
    return chosen


def _parts(datastore: Datastore, ends: list[int], states: SavedStates) -> list[PartRecord]:
    """The parts that end there; raises UserError where no plan was so."""
    starts = [0, *ends[:-1]]
    allowed = np.isin(ends[:-1], datastore.document_starts).all() and ends[-1:] == [len(datastore)]
    if not allowed or any(not 0 < stop - start <= MOST_SYMBOLS for start, stop in zip(starts, ends, strict=True)):
        raise UserError(f"{states.file} is damaged: its parts are none of this store; {states.instead}.")
    return [_describe(datastore, start, stop) for start, stop in zip(starts, ends, strict=True)]


def _describe(datastore: Datastore, start: int, stop: int) -> PartRecord:
    removed = datastore.removed
    kept = stop - start if removed is None else removed.within(start, stop).kept
    largest = -1
    for begin in range(start, stop, AT_ONCE):
        some = datastore.values[begin : min(begin + AT_ONCE, stop)]
        if int(some.min()) < 0 or int(some.max()) > MOST_TOKEN:
            raise UserError(f"The values of {datastore.path} are no tokens: they go from {some.min()} to {some.max()}.")
        largest = max(largest, int(some.max()))
    return PartRecord(start=start, stop=stop, suffixes=kept, tokens=largest + 1)


@contextmanager
def _bar(total: int) -> Iterator[tqdm]:
    with tqdm(total=total, desc="Sorting suffixes", unit=" tokens", unit_scale=True) as bar:
        yield bar


def _build_part(datastore: Datastore, folder: Path, number: int, part: PartRecord, bar: tqdm) -> None:
    """Sort and write a part, unless that was done."""
    order_file, heads_file = (folder / name.replace(".npy", UNDER_WAY) for name in array_names(number))
    if order_file.is_file() and heads_file.is_file():
        bar.update(part["suffixes"])
        return
    removed = None if datastore.removed is None else datastore.removed.within(part["start"], part["stop"])
    symbols, heads = _symbols(datastore, part, removed)
    done = bar.n + part["suffixes"]

    def advance(share: float) -> None:
        bar.update(min(int(share * part["suffixes"]), done - bar.n))

    order = sort_suffixes(symbols, 2 * part["tokens"] + 1, advance)
    bar.update(done - bar.n)
    del symbols
    _write(heads_file, heads)
    _write(order_file, order[1:], removed)  # the first is the end's


def _symbols(datastore: Datastore, part: PartRecord, removed: Removed | None) -> tuple[np.ndarray, np.ndarray]:
    """What is sorted, int32 ``[suffixes + 1]``, and the heads.

    A token is an odd number where it ends its document and the even one above it elsewhere, so that a document that
    ends is smaller than one that goes on. What stands behind an end decides only between equal suffixes.
    """
    symbols = np.zeros(part["suffixes"] + 1, dtype=np.int32)
    counts = np.zeros(part["tokens"] + 1, dtype=np.int64)
    ends = np.append(datastore.document_starts[1:], len(datastore)) - 1  # [documents], the last entry of each
    at = 0
    for start, stop in [(0, part["stop"] - part["start"])] if removed is None else removed.kept_runs():
        for begin in range(start, stop, AT_ONCE):
            first, last = part["start"] + begin, part["start"] + min(begin + AT_ONCE, stop)
            values = datastore.values[first:last]
            some = symbols[at : at + len(values)]
            np.multiply(values, 2, out=some)
            some += 2
            low, high = np.searchsorted(ends, [first, last])
            some[np.unique(ends[low:high]) - first] -= 1
            counts[1:] += np.bincount(values, minlength=part["tokens"])
            at += len(values)
    return symbols, np.cumsum(counts)


def _write(path: Path, array: np.ndarray, removed: Removed | None = None) -> None:
    """Write an array, all at once.

    Parameters
    ----------
    removed : where given, the array has the numbers of entries that count, and those among all entries are written.
    """
    temporary = path.with_name(path.name.replace(UNDER_WAY, ".npy.tmp"))
    with open(temporary, "wb") as file:
        write_npy_header(file, array.dtype, array.shape)
        for start in range(0, len(array), AT_ONCE):
            some = array[start : start + AT_ONCE]
            if removed is not None:
                some = removed.kept_entries(some.astype(np.int64)).astype(array.dtype)
            file.write(np.ascontiguousarray(some).data)
        file.flush()
        os.fsync(file.fileno())
    replace_file(temporary, path)


def _finish(datastore: Datastore, folder: Path, states: SavedStates, parts: list[PartRecord]) -> None:
    """Have all parts take their places."""
    arrays = [name for number in range(len(parts)) for name in array_names(number)]
    text: dict[str, str] = states.settings["text"]
    if text_checksums(Manifest.read(datastore.path)) != text:
        raise UserError(f"The datastore {datastore.path} was changed while its suffix array was built; do it again.")
    recorded = [name for name in Manifest.read(datastore.path).derived if name.startswith(f"{FOLDER}/")]
    forget_derived(datastore.path, recorded)
    (folder / METADATA).unlink(missing_ok=True)
    for path in folder.glob("*.npy"):
        path.unlink()
    for name in arrays:
        replace_file(folder / name.replace(".npy", UNDER_WAY), folder / name)
    said: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "text": text, "parts": parts}
    write_sealed_json(folder / METADATA, said | {"created": now()})
    record_derived(datastore.path, [f"{FOLDER}/{name}" for name in (METADATA, *arrays)])
    states.remove()
