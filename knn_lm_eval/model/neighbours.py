"""The neighbours of positions as scoring takes them: for all positions or for some, all that are found or some."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from knn_lm_eval.lm.reading import Reading
from knn_lm_eval.model.exclusion import Exclusion
from knn_lm_eval.report.record_files import NOT_KNOWN


class Neighbours(NamedTuple):
    """Those of ``n`` positions, ``[n, k]``.

    Attributes
    ----------
    distances : float32; infinity in empty slots.
    values : int32.
    counts : how often each counts; None for once.
    entries : int64, -1 in empty slots; None where nobody asks which they are.
    """

    distances: Tensor
    values: Tensor
    counts: Tensor | None
    entries: Tensor | None = None

    def without(self, gone: Tensor) -> Neighbours:
        """The same with empty slots where ``gone``, bool ``[n, k]``; of neighbours whose entries are known."""
        assert self.entries is not None
        return Neighbours(
            self.distances.masked_fill(gone, math.inf),
            self.values.masked_fill(gone, 0),
            None if self.counts is None else self.counts.masked_fill(gone, 1),
            self.entries.masked_fill(gone, NOT_KNOWN),
        )


FindNeighbours = Callable[[Tensor], Neighbours]  # rows int64 [n] -> these rows' neighbours


def find_none(rows: Tensor) -> Neighbours:
    """No neighbours."""
    return Neighbours(torch.full((len(rows), 1), math.inf), torch.zeros(len(rows), 1, dtype=torch.int32), None)


def find_some(wanted: Tensor, start: int, find: FindNeighbours) -> Neighbours:
    """The neighbours of those rows from ``start`` on that are ``wanted``; empty slots for the others."""
    (some,) = wanted.nonzero(as_tuple=True)
    if not len(some):
        return find_none(wanted)
    found = find(some + start)  # [some, k]

    def spread(part: Tensor, empty: float) -> Tensor:
        whole = part.new_full((len(wanted), part.shape[1]), empty)
        whole[some] = part
        return whole

    return Neighbours(
        spread(found.distances, math.inf),
        spread(found.values, 0),
        None if found.counts is None else spread(found.counts, 1),
        None if found.entries is None else spread(found.entries, NOT_KNOWN),
    )


def finding_others(find: FindNeighbours, reading: Reading, exclusion: Exclusion | None) -> FindNeighbours:
    """What finds the neighbours of a batch's rows as ``find`` does, without those that are left out."""
    if exclusion is None:
        return find
    contexts = exclusion.contexts(reading)

    def find_others(rows: Tensor) -> Neighbours:
        found = find(rows)
        assert found.entries is not None, "searches say which entries they find"
        return found.without(exclusion.of_found(contexts.of_rows(rows.cpu().numpy()), found.entries))

    return find_others


def seconds_of(exclusion: Exclusion | None) -> dict[str, float]:
    """What leaving neighbours out took, by stage."""
    return {} if exclusion is None else exclusion.seconds


def counts_of(exclusion: Exclusion | None) -> dict[str, float]:
    """What was left out so far."""
    return {} if exclusion is None else exclusion.counts
