"""Random samples of entries by their numbers, in memory that goes with the sample and not with all there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def draw_entries(count: int, wanted: int, seed: int) -> np.ndarray:
    """So many of ``count`` entries, each set of them as likely as any other; all where there are no more.

    (numpy's ``choice`` without replacement lays out all ``count`` numbers where the sample is more than a twentieth of
    them, and its ``permutation`` always.) Memory: some 30 bytes for each that is wanted.

    Returns
    -------
    int64 ``[min(wanted, count)]``, ascending.
    """
    if wanted >= count:
        return np.arange(count, dtype=np.int64)
    if wanted > count // 2:  # few are left out
        return np.delete(np.arange(count, dtype=np.int64), draw_entries(count, count - wanted, seed))
    random, drawn = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    while len(drawn) < wanted:  # those drawn twice are drawn anew; never too many, of which some would have to go
        drawn = np.unique(np.concatenate([drawn, random.integers(0, count, wanted - len(drawn))]))
    return drawn


def draw_items(items: Callable[[], Iterator[Item]], how_many: Callable[[int], int], seed: int) -> list[Item]:
    """Random ones of items that are gone through twice, in their order; each is as likely as another.

    Parameters
    ----------
    items : begins to go through them.
    how_many : the number to draw, of so many as there are.
    """
    there = sum(1 for _ in items())
    drawn = set(draw_entries(there, how_many(there), seed).tolist())
    return [item for place, item in enumerate(items()) if place in drawn]
