"""A datastore's keys chunk by chunk, as float32 and checked to be finite: how all that reads many keys reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.checkpoints import SavedStates

ADD_CHUNK = 2**16  # keys at a time that are added to an index, or trained on
SEARCH_CHUNK = 2**14  # keys at a time that are searched for


def finite_keys(keys: np.ndarray) -> np.ndarray:
    """Some keys as float32; raises UserError where one holds NaN or infinity."""
    keys = keys.astype(np.float32)
    if not np.isfinite(keys).all():
        raise UserError("The datastore's keys hold NaN or infinity: the files are damaged; dump it again.")
    return keys


def key_chunks(
    keys: np.ndarray, start: int = 0, stop: int | None = None, size: int | None = None
) -> Iterator[np.ndarray]:
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


def keys_of(keys: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """The keys of chosen entries, float32 ``[len(entries), dimension]``; ascending entries are read forwards."""
    chosen = np.empty((len(entries), keys.shape[1]), dtype=np.float32)
    for begin in range(0, len(entries), ADD_CHUNK):
        chosen[begin : begin + ADD_CHUNK] = finite_keys(keys[entries[begin : begin + ADD_CHUNK]])
    return chosen


def number_entries(
    keys: np.ndarray,
    states: SavedStates,
    dtype: type[Any],
    step: Callable[[np.ndarray, int, np.ndarray], None],
    description: str,
    size: int | None = None,
) -> np.ndarray:
    """Give each entry a number that follows from its key and from the numbers before it; saves its state now and then.

    Parameters
    ----------
    keys : a store's, ``[count, dimension]``.
    states : where the state ``entries`` is saved, and is gone on with.
    dtype : of the numbers.
    step : called with all numbers, a first entry and the keys from there on, float32 ``[size or fewer, dimension]``;
        fills in numbers.
    description : for the progress bar.
    size : entries at a time; None takes ``SEARCH_CHUNK``.

    Returns
    -------
    ``dtype [count]``; -1 where ``step`` filled in none.
    """
    state = states.load("entries")
    numbers, done = state.get("numbers"), int(state.get("done", 0))
    if numbers is None:
        numbers = np.full(len(keys), -1, dtype=dtype)
    with tqdm(total=len(keys), initial=done, desc=description, unit=" keys", unit_scale=True) as bar:
        for chunk in key_chunks(keys, done, size=size or SEARCH_CHUNK):
            step(numbers, done, chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if states.is_due():
                states.save("entries", numbers=numbers, done=done)
    return numbers
