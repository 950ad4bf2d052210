"""A datastore's keys chunk by chunk, as float32 and checked to be finite: how all that reads many keys reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import SavedStates

ADD_CHUNK = 2**16  # keys at a time that are added to an index
SEARCH_CHUNK = 2**14  # keys at a time that are searched for, or taken from here and there
FILL_CHUNK = 2**22
NUMBERS = "entries.npy.part"


class KeyRows(Protocol):
    """What keys are read from, ``[count, dimension]``: an array of them, or what gives them as they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


def finite_keys(keys: np.ndarray) -> np.ndarray:
    """Some keys as float32; raises UserError where one holds NaN or infinity."""
    keys = keys.astype(np.float32)
    if not np.isfinite(keys).all():
        raise UserError("The datastore's keys hold NaN or infinity: the files are damaged; dump it again.")
    return keys


def key_chunks(keys: KeyRows, start: int = 0, stop: int | None = None, size: int | None = None) -> Iterator[np.ndarray]:
    """The keys of the entries from ``start`` to ``stop`` (None: to the end), in order.

    Parameters
    ----------
    keys : a store's, ``[count, dimension]``.
    size : entries at a time; None takes ``ADD_CHUNK``.

    Yields
    ------
    float32 ``[size or fewer, dimension]``.
    """
    stop, size = len(keys) if stop is None else stop, size or ADD_CHUNK
    for begin in range(start, stop, size):
        yield finite_keys(keys[begin : min(begin + size, stop)])


def keys_of(keys: KeyRows, entries: np.ndarray) -> np.ndarray:
    """The keys of chosen entries, float32 ``[len(entries), dimension]``; ascending entries are read forwards."""
    chosen = np.empty((len(entries), keys.shape[1]), dtype=np.float32)
    for begin in range(0, len(entries), SEARCH_CHUNK):
        chosen[begin : begin + SEARCH_CHUNK] = finite_keys(keys[entries[begin : begin + SEARCH_CHUNK]])
    return chosen


def number_entries(
    keys: KeyRows,
    states: SavedStates,
    dtype: type[Any],
    step: Callable[[np.ndarray, int, np.ndarray], None],
    description: str,
    size: int | None = None,
    undo: Callable[[np.ndarray, int], None] | None = None,
) -> np.ndarray:
    """Give each entry a number that follows from its key and from the numbers before it; notes now and then how far it
    is.

    The numbers are in a file beside ``states``, of which the operating system has in memory what there is room for.

    Parameters
    ----------
    keys : a store's, ``[count, dimension]``.
    states : where the state ``entries`` is saved, and is gone on with; its ``others`` are to have ``NUMBERS``.
    dtype : of the numbers.
    step : called with all numbers, a first entry and the keys from there on, float32 ``[size or fewer, dimension]``;
        fills in numbers, of these entries or, where there is an ``undo``, of any.
    description : for the progress bar.
    size : entries at a time; None takes ``SEARCH_CHUNK``.
    undo : called with all numbers and an entry, where an interrupted run is gone on with: takes back what ``step``
        filled in since it was at that entry.

    Returns
    -------
    ``dtype [count]``, memory-mapped; -1 where ``step`` filled in none. The file goes with ``states.remove``.
    """
    state = states.load("entries")
    path = states.folder / NUMBERS
    if state and path.exists():
        done, numbers = int(state["done"]), map_npy(path, states.instead, "r+")
        if numbers.dtype != dtype or numbers.shape != (len(keys),):
            raise UserError(f"{path} is damaged: it does not have a number for each entry; {states.instead}.")
        if undo is not None:
            undo(numbers, done)
    else:
        done, numbers = 0, filled_file(path, dtype, len(keys))
    with tqdm(total=len(keys), initial=done, desc=description, unit=" keys", unit_scale=True) as bar:
        for chunk in key_chunks(keys, done, size=size or SEARCH_CHUNK):
            step(numbers, done, chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if states.is_due():
                numbers.flush()
                states.save("entries", done=done)
    return numbers


def filled_file(path: Path, dtype: type[Any], count: int, value: int = -1) -> np.memmap[Any, Any]:
    """A new .npy file of ``count`` numbers, all the same, memory-mapped to be written to."""
    numbers = np.lib.format.open_memmap(path, "w+", dtype, (count,))
    for begin in range(0, count, FILL_CHUNK):
        numbers[begin : begin + FILL_CHUNK] = value
    return numbers
