"""Making a smaller datastore of an existing one: leaving entries out, or merging near neighbours.

Each method decides which entries stay (a bool per entry) and, where it merges, how many each then stands for. The
keys of those that stay are copied in file order, chunk by chunk, into a folder that appears when it is finished. It
takes an index of its own, built as usual.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_lm_eval.compiling import compiled
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.confidence import lm_log_probs
from knn_lm_eval.make.directions import copy_projection
from knn_lm_eval.make.merging import NeighbourSearch, find_absorbers
from knn_lm_eval.store.clusters import entry_dtype
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX
from knn_lm_eval.store.key_stream import filled_file
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    MANIFEST,
    NPY_KEYS,
    PROJECTION,
    VALUES,
    WEIGHTS,
    file_record,
    now,
)
from knn_lm_eval.system.checkpoints import PROGRESS, SavedStates
from knn_lm_eval.system.files import (
    check_free_space,
    check_new_folder,
    disk_errors_in,
    finished_folder,
    write_npy_header,
)
from knn_lm_eval.system.locks import locked
from knn_lm_eval.version import __version__

CHUNK = 2**14  # entries copied at a time
READ_CHUNK = 2**20
Kept = Callable[[int, int], np.ndarray]  # which of the entries from one to another stay, bool


def prune_random(datastore: Datastore, output: str | Path, keep: float, seed: int = 0) -> Datastore:
    """Keep each entry with probability ``keep``, by ``positions_of_entries``.

    Stores of the same seed lie inside one another, and are the parts whose perplexity ``store_sizes`` gives.

    Parameters
    ----------
    output : the new store's folder.
    keep : the share to keep, above 0 and below 1.
    seed : of the choice.

    Raises
    ------
    UserError
        Where ``keep`` is out of range, the store has no keys, nothing would stay, the folder is taken, or the disk
        is full.
    """
    output = _check(datastore, output)
    _check_keep(keep)

    def kept(start: int, stop: int) -> np.ndarray:
        return positions_of_entries(np.arange(start, stop), seed) < keep

    return _write(datastore, output, kept, None, {"method": "random", "keep": keep, "seed": seed})


def prune_confidence(
    datastore: Datastore,
    output: str | Path,
    load_lm: Callable[[], CausalHFLM],
    *,
    keep: float | None = None,
    max_p: float | None = None,
) -> Datastore:
    """Leave out the entries whose value the LM predicts best by itself, to which retrieval has least to add.

    Where the LM is sure, what stays speaks for other tokens than the LM's: the smaller the part, the smaller the
    lmbda that suits it.

    Parameters
    ----------
    output : the new store's folder.
    load_lm : gives the store's LM, as for ``lm_log_probs``.
    keep : the share to keep, those of smallest p_LM, above 0 and below 1; of those with the same p_LM the first ones.
    max_p : instead, the largest p_LM to keep, above 0 and below 1.

    Raises
    ------
    UserError
        As for ``prune_random`` and ``lm_log_probs``.
    """
    output = _check(datastore, output)
    if (keep is None) == (max_p is None):
        raise UserError("Pruning by confidence needs either keep or max_p.")
    if keep is not None:
        _check_keep(keep)
    elif not 0 < max_p < 1:  # type: ignore[operator]
        raise UserError(f"max_p={max_p} must be above 0 and below 1.")
    log_probs = lm_log_probs(datastore, load_lm)
    if max_p is not None:
        most = math.log(max_p)
        method = {"method": "confidence", "max_p": max_p}
        return _write(datastore, output, lambda start, stop: log_probs[start:stop] <= most, None, method)
    wanted = max(1, round(keep * len(log_probs)))  # type: ignore[operator]
    largest, last = largest_of_smallest(log_probs, wanted)

    def kept(start: int, stop: int) -> np.ndarray:
        chunk = np.asarray(log_probs[start:stop])
        return (chunk < largest) | ((chunk == largest) & (np.arange(start, stop) <= last))

    return _write(datastore, output, kept, None, {"method": "confidence", "keep": keep})


def largest_of_smallest(numbers: np.ndarray, wanted: int) -> tuple[np.float32, int]:
    """The largest of the ``wanted`` smallest numbers, and where the last one stands that is needed, counted from the
    front among equal ones; found in a few readings, so that nothing is sorted or copied.

    Parameters
    ----------
    numbers : float32 ``[n]``, none NaN, may be memory-mapped.
    wanted : 1 to n.
    """
    top, left = _bucket(_bits_of(numbers, lambda bits: bits >> 16), wanted)
    low, left = _bucket(_bits_of(numbers, lambda bits: bits[bits >> 16 == top] & 0xFFFF), left)
    found, entry = np.uint32(top << 16 | low), 0
    for bits in _bits_of(numbers, lambda bits: bits):
        equal = np.flatnonzero(bits == found)
        if left <= len(equal):
            entry += int(equal[left - 1])
            break
        left, entry = left - len(equal), entry + len(bits)
    return numbers[entry], entry


def _bits_of(numbers: np.ndarray, part: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """A part of unsigned numbers that have the order of the floating-point ones (0 and -0 are the same)."""
    for start in range(0, len(numbers), READ_CHUNK):
        bits = (numbers[start : start + READ_CHUNK] + np.float32(0)).view(np.uint32)
        yield part(np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)))


def _bucket(parts: Iterator[np.ndarray], wanted: int) -> tuple[int, int]:
    """The 16-bit number that the ``wanted``-th smallest is, and which of those that are the same it is."""
    counts = np.zeros(2**16, dtype=np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=2**16)
    bucket = int(np.searchsorted(np.cumsum(counts), wanted))
    return bucket, wanted - int(counts[:bucket].sum())


def prune_greedy_merge(
    datastore: Datastore,
    output: str | Path,
    neighbours: int = 9,
    index: str = DEFAULT_INDEX,
    probe: int | None = None,
    resume: bool = False,
    memory: int | None = None,
) -> Datastore:
    """Merge near neighbours of the same value into one entry that counts as often (He et al. 2021).

    What is merged is what ``cluster_greedy_merge`` makes a cluster: entries are taken in order, and one that was not
    absorbed yet absorbs those of its nearest neighbours that have its value and have neither been absorbed nor
    absorbed others. The absorbing entry stays, with its own key, and its weight is the sum of theirs. How many stay
    follows from the number of neighbours.

    Parameters
    ----------
    output : the new store's folder.
    neighbours : those of each entry that are looked at, without itself.
    index, probe : the index to search, and the inverted lists visited; None takes what it was found to need.
    resume : go on with the searches of an interrupted run for the same ``output``.
    memory : bytes that it may take, the index included, which is refused where it takes more.

    Raises
    ------
    UserError
        Where the store has no such index or fewer other entries than ``neighbours``, the folder is taken, or the disk
        is full.
    """
    folder = Path(os.path.abspath(output))
    keys = datastore.require_keys("pruning")
    datastore.require_all("pruning")
    searched = NeighbourSearch.open(datastore, neighbours, index, probe, memory)
    method = {"method": "greedy_merge", "neighbours": neighbours} | {
        name: value for name, value in searched.settings.items() if name != "k"
    }
    states = SavedStates(
        folder.with_name(f".{folder.name}.merging") / PROGRESS,
        {**method, "keys_sha256": datastore.keys_checksum},
        others=["*.npy.part"],
    )
    if resume and states.fits() and (folder / MANIFEST).is_file():
        pruned = Datastore.open(folder)  # it was interrupted when all was done but this
        if (pruned.manifest.pruned_from or {}).items() >= _made_by(datastore, method).items():
            with disk_errors_in(folder.parent), _held(states):
                states.remove()
            _remove_empty(states.folder)
            return pruned
    output = check_new_folder(output)
    with disk_errors_in(output.parent), _held(states):
        check_new_folder(output)  # another may just have made it
        states.begin_or_resume(resume)
        number = np.dtype(entry_dtype(len(datastore))).itemsize
        check_free_space(states.folder, (number + 4) * len(datastore), "which entries were merged, and their weights,")
        absorber = find_absorbers(searched, keys, states)
        count = len(datastore)
        counts = np.broadcast_to(np.int32(1), count) if datastore.weights is None else np.asarray(datastore.weights)
        weights = filled_file(states.folder / "weights.npy.part", np.int32, count, 0)
        _sum_weights(absorber, counts, weights)
        pruned = _write(datastore, output, lambda start, stop: weights[start:stop] > 0, weights, method)
        states.remove()
    _remove_empty(states.folder)
    return pruned


@contextmanager
def _held(states: SavedStates) -> Iterator[None]:
    """Hold the folder of the searches; one process at a time is at work in it."""
    states.folder.mkdir(parents=True, exist_ok=True)
    with locked(states.folder / ".lock", f"the searches in {states.folder}"):
        yield


def _remove_empty(folder: Path) -> None:
    """Remove the folder, unless something else lies in it, which is not of this program."""
    with suppress(OSError):
        folder.rmdir()


def positions_of_entries(entries: np.ndarray, seed: int) -> np.ndarray:
    """A number from 0 to 1 for each entry, as if drawn at random: entry i is in the part f where it is below f.

    It is computed from the entry's number (by the finaliser of splitmix64), so that none have to be kept.
    """
    with np.errstate(over="ignore"):
        x = entries.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@compiled
def _sum_weights(absorber: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> None:
    """Add what each entry counts to itself, or to the entry that absorbed it."""
    for entry in range(len(absorber)):
        weights[entry if absorber[entry] < 0 else absorber[entry]] += counts[entry]


def _check(datastore: Datastore, output: str | Path) -> Path:
    datastore.require_keys("pruning")
    datastore.require_all("pruning")
    return check_new_folder(output)


def _check_keep(keep: float) -> None:
    if not 0 < keep < 1:
        raise UserError(f"keep={keep} must be above 0 and below 1.")


def _write(
    datastore: Datastore, output: Path, kept: Kept, weights: np.ndarray | None, method: dict[str, Any]
) -> Datastore:
    """Write the store of the entries ``kept``; ``weights`` None leaves them those that they have, if any."""
    keys = datastore.require_keys("pruning")
    count = sum(int(kept(start, stop).sum()) for start, stop in _ranges(len(datastore)))
    if count == 0:
        raise UserError(f"Nothing would stay of the datastore {datastore.path} ({method}); keep more.")
    keys_file = datastore.manifest.keys or NPY_KEYS
    arrays = {keys_file.file: keys, VALUES: datastore.values}
    if (weights := datastore.weights if weights is None else weights) is not None:
        arrays[WEIGHTS] = weights
    with disk_errors_in(output), finished_folder(output) as folder:
        row_bytes = sum(array.dtype.itemsize * math.prod(array.shape[1:]) for array in arrays.values())
        check_free_space(folder, count * row_bytes, f"{count:,} entries")
        for name, array in arrays.items():
            _copy_rows(array, kept, count, folder / name)
        np.save(folder / DOCUMENT_STARTS, np.zeros(1, dtype=np.int64))
        said, names = datastore.manifest, [*arrays, DOCUMENT_STARTS]
        if said.projection is not None:
            copy_projection(datastore, folder)
            names.append(PROJECTION)
        manifest = replace(
            said,
            count=count,
            documents=1,
            text_order=False,
            pruned_from=_made_by(datastore, method),
            files={name: file_record(folder / name) for name in names},
            created=now(),
            versions={"knn_lm_eval": __version__},
            appended=[],
            derived={},
        )
        manifest.write(folder)
    return Datastore.open(output)


def _made_by(datastore: Datastore, method: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of a pruned store says of its making."""
    said = datastore.manifest
    return {
        **method,
        "path": str(datastore.path.resolve()),
        "count": said.count,
        "files": said.files,
        "pruned_from": said.pruned_from,
    }


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    """The first entry of each chunk, and the one after its last."""
    for start in range(0, count, CHUNK):
        yield start, min(start + CHUNK, count)


def _copy_rows(array: np.ndarray, kept: Kept, count: int, target: Path) -> None:
    """Write the rows that are kept, in file order: as .npy, or without a header where the name is another."""
    bar = tqdm(total=len(array), desc=f"Copying {target.stem}", unit=" entries", unit_scale=True)
    with bar, open(target, "wb") as file:
        if target.suffix == ".npy":
            write_npy_header(file, array.dtype, (count, *array.shape[1:]))
        for start, stop in _ranges(len(array)):
            file.write(array[start:stop][kept(start, stop)].tobytes())
            bar.update(stop - start)
        file.flush()
        os.fsync(file.fileno())
