"""Where each candidate of a RetoMaton walk came from: a pointer, a pointer's cluster, or the search."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knn_lm_eval.methods.automaton import Automaton, Walk

POINTER, CLUSTER, SEARCH = range(3)


class StepOrigins(NamedTuple):
    """Of one step of a walk.

    Attributes
    ----------
    survivors : how many candidates of the step before had its token and an entry after them.
    of_candidates : int8 ``[candidates]``, in the walk's order: ``POINTER``, ``CLUSTER`` or ``SEARCH``. A candidate that
        came in several ways has the first of these: it would have been there without the others.
    """

    survivors: int
    of_candidates: np.ndarray


def walk_origins(automaton: Automaton, walk: Walk) -> list[StepOrigins]:
    """The origins at each step of a walk that ``automaton`` made and kept the neighbours of."""
    steps, survivors = [], walk.survivors
    for (distances, entries), target in zip(walk.neighbours, walk.targets.tolist(), strict=True):
        pointers, members = automaton.followed(survivors)
        origins = np.full(len(entries), SEARCH, dtype=np.int8)
        origins[np.isin(entries, members)] = CLUSTER
        origins[np.isin(entries, pointers)] = POINTER
        steps.append(StepOrigins(len(survivors), origins))
        survivors = automaton.survivors(distances, entries, target)
    return steps
