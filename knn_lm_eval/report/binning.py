"""Which tokens are counted together: bins of a number, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Binned:
    """Tokens sorted into bins of one property.

    Attributes
    ----------
    name : the property's, in a word, as it stands in JSON.
    title : what it is, for people.
    labels : the bins' names, in order.
    bin_of : int64 ``[tokens]``, each token's bin; -1 for one that is in none.
    """

    name: str
    title: str
    labels: list[str]
    bin_of: np.ndarray


def by_edges(name: str, title: str, values: np.ndarray, edges: Sequence[float], whole: bool = False) -> Binned:
    """Bins from each edge (included) to the next; the last one has no end.

    Parameters
    ----------
    values : ``[tokens]``; NaN, and what lies below the first edge, is in no bin.
    edges : ascending.
    whole : whether values are whole numbers, for the bins' names.
    """
    steps = np.asarray(edges, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    bins = np.searchsorted(steps, values, side="right") - 1  # NaN sorts behind all
    labels = [_label(low, high, whole) for low, high in zip(edges, [*edges[1:], None], strict=True)]
    return Binned(name, title, labels, np.where(np.isnan(values), -1, bins))


def by_quantiles(name: str, title: str, values: np.ndarray, count: int, none: str) -> Binned:
    """About equally many tokens in each of ``count`` bins of a number, and those with infinity in one of their own.

    Parameters
    ----------
    none : the name of that bin, which is the last; it is left out where no token is in it.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return Binned(name, title, [none], np.zeros(len(values), dtype=np.int64))
    edges = np.unique(np.quantile(values[finite], np.arange(count) / count))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, None)
    highs = [*(f"below {edge:,.4g}" for edge in edges[1:]), f"up to {values[finite].max():,.4g}"]
    lows = ["", *(f"{edge:,.4g} and " for edge in edges[1:])]
    labels = [low + high for low, high in zip(lows, highs, strict=True)]
    if not finite.all():
        bins, labels = np.where(finite, bins, len(labels)), [*labels, none]
    return Binned(name, title, labels, bins)


def by_kind(name: str, title: str, kinds: np.ndarray, labels: Sequence[str]) -> Binned:
    """A bin for each kind that occurs: ``kinds`` are int ``[tokens]``, numbers of ``labels``, or -1."""
    there, bins = np.unique(kinds, return_inverse=True)
    skipped = int(len(there) > 0 and there[0] < 0)
    return Binned(name, title, [labels[kind] for kind in there[skipped:]], bins.reshape(-1) - skipped)


def _label(low: float, high: float | None, whole: bool) -> str:
    if high is None:
        return f"{low:,g} and more"
    if not whole:
        return f"{low:,g} to {high:,g}"
    return f"{low:,g}" if high == low + 1 else f"{low:,g} to {high - 1:,g}"
