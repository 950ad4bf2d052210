"""RetoMaton: neighbours for the next token from the last one's, and a search only where they run out.

Alon et al. 2022, "Neuro-Symbolic Language Modeling with Automaton-augmented Retrieval". Entry i points to entry
i + 1. After token y is read, the candidates whose value was y survive; their pointers, extended by the members
of the pointers' clusters, are the next step's candidates. Where fewer than ``min_knns`` survived, the index is
searched as well.

Many sequences walk in lockstep, so that each step has one batched search and one batched distance computation;
what is left per sequence is integer work, compiled (``automaton_kernels``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.methods.automaton_kernels import advance, follow, gather, heaviest
from knn_lm_eval.methods.left_out import Contexts
from knn_lm_eval.methods.left_out_kernels import drop_marked

# queries [n, dimension] -> (distances float32 [n, k], entries int64 [n, k]); empty slots have entry -1.
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# queries [n, dimension], prepared; entries int64 [n, m], counts int64 [n] -> distances float32 [n, m].
PointerDistances = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# queries [n, dimension] -> what ``PointerDistances`` takes of them, [n, any].
Prepare = Callable[[np.ndarray], np.ndarray]
# contexts of n positions, entries int64 [n, m] -> bool [n, m], which of them do not count there.
IsLeftOut = Callable[[Contexts, np.ndarray], np.ndarray]

# Queries prepared at once, of as many steps as that is: many take less time each, all would take memory.
PREPARED_ROWS = 256


@dataclass(frozen=True)
class AutomatonSettings:
    """How RetoMaton walks.

    Attributes
    ----------
    k : neighbours that a search returns.
    knn_temp : the softmax temperature over distances.
    min_knns : search where fewer candidates survived; infinity searches at every step, 0 never.
    max_knns : pointers and cluster members that a step considers at most.
    duplicates : ``keep`` counts an entry as often as it is a candidate (as pointer, as a cluster's member, as a
        search result), as the published code does; ``merge`` counts it once.
    """

    k: int = 1024
    knn_temp: float = 1.0
    min_knns: float = 1
    max_knns: int = 1024
    duplicates: Literal["keep", "merge"] = "merge"


@dataclass
class WalkStatistics:
    """What the walks did: steps, full searches, candidates considered, and beside them those left out, seconds."""

    steps: int = 0
    searches: int = 0
    candidates: int = 0
    left_out: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"search": 0.0, "distances": 0.0, "automaton": 0.0})


@dataclass
class Walk:
    """A sequence to walk along, and what the walk found.

    Attributes
    ----------
    queries : float32 ``[steps, dimension]``.
    targets : int ``[steps]``: the token read after each step; -1 where that is not known yet.
    survivors : int64, nearest first: where an earlier walk of the same text ended; empty at a beginning.
    found : what a search gives at each step, (distances ``[steps, k]``, entries ``[steps, k]``), where that is
        known beforehand; None searches as need arises.
    contexts : of each step's token, for an automaton that leaves entries out.
    survivors_at_end : int64, nearest first: what a walk that goes on from here begins with.
    log_p_knn : float64 ``[steps]``, log p_kNN of the targets; minus infinity where no candidate has the value, NaN
        where there is no candidate.
    searched : bool ``[steps]``, where a full search was made.
    neighbours : per step (distances float32, entries int64), where asked for.
    heaviest : the candidates that weigh most, where asked for.
    """

    queries: np.ndarray
    targets: np.ndarray
    survivors: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    found: tuple[np.ndarray, np.ndarray] | None = None
    contexts: Contexts | None = None
    survivors_at_end: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    log_p_knn: np.ndarray = field(default_factory=lambda: np.empty(0))
    searched: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))
    neighbours: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    heaviest: Heaviest | None = None

    @property
    def searches(self) -> int:
        """Full searches made."""
        return int(self.searched.sum())


@dataclass
class Heaviest:
    """The candidates that weigh most at each step of a walk.

    Attributes
    ----------
    nearest : float32 ``[steps]``, the least distance; infinity where there is no candidate.
    entries, weights : int64 and float32 ``[steps, most]``, nearest first, and their shares of p_kNN; -1 and 0 where
        there are fewer.
    """

    nearest: np.ndarray
    entries: np.ndarray
    weights: np.ndarray

    @classmethod
    def empty(cls, steps: int, most: int) -> Heaviest:
        """Room for so many steps."""
        return cls(np.empty(steps, np.float32), np.empty((steps, most), np.int64), np.empty((steps, most), np.float32))

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays."""
        return self.nearest, self.entries, self.weights

    def split(self, ends: np.ndarray) -> list[Heaviest]:
        """Those of consecutive steps, cut before ``ends``."""
        return [Heaviest(*parts) for parts in zip(*(np.split(part, ends) for part in self.parts()), strict=True)]


class _Lockstep:
    """Walks side by side, longest first, and what a step leaves for the next.

    Parameters
    ----------
    walks : in any order; their results are made room for.
    width : candidates that a step can have.
    leaves_out : whether the walks' contexts are looked at.

    Attributes
    ----------
    distances, entries : float32 and int64 ``[walks, width]``, a step's candidates.
    survivors : int64 ``[walks, width]``, those of the last step, nearest first.
    survivor_counts : int64 ``[walks]``.
    """

    def __init__(self, walks: Sequence[Walk], width: int, leaves_out: bool = False) -> None:
        self.walks, self.width = sorted(walks, key=lambda walk: -len(walk.queries)), width
        self._lengths = np.array([len(walk.queries) for walk in self.walks])
        self.steps = int(self._lengths[0]) if len(walks) else 0
        self.entries = np.empty((len(walks), width), dtype=np.int64)
        self.distances = np.empty((len(walks), width), dtype=np.float32)
        self.survivors = np.empty((len(walks), width), dtype=np.int64)
        self.survivor_counts = np.zeros(len(walks), dtype=np.int64)
        contexts = [walk.contexts for walk in self.walks if walk.contexts is not None] if leaves_out else []
        self._contexts = Contexts.joined(contexts) if contexts else None
        self._first_steps = np.cumsum(self._lengths) - self._lengths  # among the contexts
        self._prepared: list[np.ndarray] = []  # of steps from this one on:
        self._first_prepared = 0
        for i, walk in enumerate(self.walks):
            self.survivor_counts[i] = len(walk.survivors)
            self.survivors[i, : len(walk.survivors)] = walk.survivors
            walk.log_p_knn = np.empty(len(walk.queries))
            walk.searched = np.zeros(len(walk.queries), dtype=bool)

    def active(self, step: int) -> int:
        """How many walks, the first ones, have such a step."""
        return int((self._lengths > step).sum())

    def contexts(self, step: int) -> Contexts:
        """Of the active walks."""
        assert self._contexts is not None
        return self._contexts.of_rows(self._first_steps[: self.active(step)] + step)

    def prepared_queries(self, step: int, prepare: Prepare) -> np.ndarray:
        """The active walks' queries, prepared ``[active, any]``; with them those of some steps to come."""
        if step >= self._first_prepared + len(self._prepared):
            steps = range(step, min(step + max(1, PREPARED_ROWS // self.active(step)), self.steps))
            active = [self.active(some) for some in steps]
            rows = [walk.queries[some] for some, n in zip(steps, active, strict=True) for walk in self.walks[:n]]
            self._first_prepared = step
            self._prepared = np.split(prepare(np.stack(rows)), np.cumsum(active)[:-1])
        return self._prepared[step - self._first_prepared]

    def note(self, step: int, log_p: np.ndarray, counts: np.ndarray, keep_neighbours: bool) -> None:
        """Leave a step's results with the active walks: log p_kNN ``[active]``, and how many candidates there were."""
        for i, walk in enumerate(self.walks[: len(log_p)]):
            walk.log_p_knn[step] = log_p[i]
            if keep_neighbours:
                candidates = slice(int(counts[i]))
                walk.neighbours.append((self.distances[i, candidates].copy(), self.entries[i, candidates].copy()))
            if step == self._lengths[i] - 1:
                walk.survivors_at_end = self.survivors[i, : self.survivor_counts[i]].copy()

    def note_heaviest(self, step: int, counts: np.ndarray, knn_temp: float, most: int) -> None:
        """Leave with the active walks which of a step's candidates weigh most."""
        entries, weights = np.empty((len(counts), most), np.int64), np.empty((len(counts), most), np.float32)
        nearest = heaviest(self.distances, self.entries, counts, knn_temp, entries, weights)
        for i, walk in enumerate(self.walks[: len(counts)]):
            assert walk.heaviest is not None
            for kept, found in zip(walk.heaviest.parts(), (nearest, entries, weights), strict=True):
                kept[step] = found[i]


class Automaton:
    """Walks sequences over a datastore.

    Parameters
    ----------
    values : int32 ``[count]``.
    document_starts : int64 ``[documents]``: no pointer leads to a document's first entry.
    clusters : ``(cluster_of_entry, member_starts, members)`` in CSR form, or None for pointers alone.
    search, pointer_distances : see the types above; their distances must be of one kind.
    kept : uint8 ``[count / 8]``, a bit for each entry, the first the lowest, set for those that count; None where all
        do. Searches find no others, nor do pointers lead to others.
    clock : tells seconds, for the statistics.
    prepare : what queries go through on their way to ``pointer_distances``; None is nothing.
    is_left_out : says which entries do not count at a step, though they are found or pointed to: they are neither
        candidates, nor followed, nor counted for ``min_knns``. All walks have contexts, then. None leaves none out.
    """

    def __init__(
        self,
        values: np.ndarray,
        document_starts: np.ndarray,
        clusters: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
        search: Search,
        pointer_distances: PointerDistances,
        settings: AutomatonSettings,
        clock: Callable[[], float] = time.perf_counter,
        prepare: Prepare | None = None,
        kept: np.ndarray | None = None,
        is_left_out: IsLeftOut | None = None,
    ) -> None:
        self.values, self.document_starts = np.asarray(values), np.asarray(document_starts)
        none = np.full(0, -1, dtype=np.int32), np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int32)
        cluster_of_entry, member_starts, members = (np.asarray(array) for array in clusters or none)
        self.clusters = cluster_of_entry, member_starts, members
        self.kept = np.empty(0, dtype=np.uint8) if kept is None else kept
        self.search, self.pointer_distances, self.settings = search, pointer_distances, settings
        self.clock, self.prepare = clock, prepare or (lambda queries: queries)
        self.is_left_out = is_left_out
        self.statistics = WalkStatistics()

    def with_settings(self, settings: AutomatonSettings, search: Search | None = None) -> Automaton:
        """Another over the same arrays, with statistics of its own; ``search`` where another k is to be searched."""
        return Automaton(
            self.values,
            self.document_starts,
            self.clusters,
            search or self.search,
            self.pointer_distances,
            settings,
            self.clock,
            self.prepare,
            self.kept,
            self.is_left_out,
        )

    def walk(self, walks: Sequence[Walk], keep_neighbours: bool = False, keep_heaviest: int = 0) -> None:
        """Walk all sequences to their ends, side by side; fills in what ``Walk`` says.

        Parameters
        ----------
        keep_neighbours : whether all candidates are kept.
        keep_heaviest : of how many candidates is kept which weigh most; 0 keeps none.
        """
        lockstep = _Lockstep(walks, self.settings.k + self.settings.max_knns, self.is_left_out is not None)
        if keep_heaviest:
            for walk in walks:
                walk.heaviest = Heaviest.empty(len(walk.queries), keep_heaviest)
        if self.settings.min_knns > lockstep.width:
            self._search_everywhere(lockstep.walks)
        for step in range(lockstep.steps):
            active = lockstep.active(step)
            pointers, pointer_counts, needy = self._follow_pointers(lockstep, active, step)
            found_distances, found_entries = self._search_where_needy(lockstep, active, step, needy)
            pointer_distances = self._distances_of_pointers(lockstep, step, pointers, pointer_counts)
            start = self.clock()
            counts = gather(
                found_distances,
                found_entries,
                pointer_distances,
                pointers,
                pointer_counts,
                self.settings.duplicates == "merge",
                lockstep.distances,
                lockstep.entries,
            )
            targets = np.array([walk.targets[step] for walk in lockstep.walks[:active]], dtype=np.int64)
            log_p = advance(
                lockstep.distances[:active],
                lockstep.entries[:active],
                counts,
                self.values,
                self.document_starts,
                targets,
                self.settings.knn_temp,
                lockstep.survivors,
                lockstep.survivor_counts,
            )
            lockstep.note(step, log_p, counts, keep_neighbours)
            if keep_heaviest:
                lockstep.note_heaviest(step, counts, self.settings.knn_temp, keep_heaviest)
            self.statistics.steps += active
            self.statistics.candidates += int(counts.sum())
            self.statistics.seconds["automaton"] += self.clock() - start

    def _follow_pointers(
        self, lockstep: _Lockstep, active: int, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The survivors' pointers, extended by clusters: int64 ``[active, max_knns]``, how many of these there are,
        ``[active]``; and the numbers of the walks that are to search."""
        start = self.clock()
        survivor_counts = lockstep.survivor_counts[:active]
        self._leave_out(lockstep, step, lockstep.survivors[:active], survivor_counts, ahead=1)
        pointers, pointer_counts = follow(
            lockstep.survivors[:active],
            survivor_counts,
            *self.clusters,
            self.kept,
            self.settings.max_knns,
            self.settings.duplicates == "merge",
        )
        if len(self.clusters[1]) > 1:  # others than the survivors' own may be among them
            self._leave_out(lockstep, step, pointers, pointer_counts)
        needy = np.flatnonzero(survivor_counts < self.settings.min_knns)
        self.statistics.seconds["automaton"] += self.clock() - start
        return pointers, pointer_counts, needy

    def _leave_out(
        self, lockstep: _Lockstep, step: int, entries: np.ndarray, counts: np.ndarray, ahead: int = 0
    ) -> None:
        """Take entries out that do not count at a step, or whose ``ahead``-th successors do not.

        Parameters
        ----------
        entries, counts : int64 ``[active, width]`` and ``[active]``, filled from the left; changed.
        """
        if self.is_left_out is None or not (most := int(counts.max())):
            return
        some = entries[:, :most]
        marked = self.is_left_out(lockstep.contexts(step), some + ahead)
        self.statistics.left_out += drop_marked(some, counts, marked)

    def _search_where_needy(
        self, lockstep: _Lockstep, active: int, step: int, needy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What searches find for the ``needy`` walks: distances and entries ``[active, k]``, empty slots for the
        others; ``[active, 0]`` where none is needy."""
        if not len(needy):
            return np.empty((active, 0), dtype=np.float32), np.empty((active, 0), dtype=np.int64)
        start = self.clock()
        distances = np.empty((active, self.settings.k), dtype=np.float32)
        entries = np.full((active, self.settings.k), -1, dtype=np.int64)
        unknown = [int(i) for i in needy if lockstep.walks[i].found is None]
        if unknown:
            queries = np.stack([lockstep.walks[i].queries[step] for i in unknown])  # [unknown, dimension]
            distances[unknown], entries[unknown] = self.search(queries)
        for i in needy.tolist():
            walk = lockstep.walks[i]
            walk.searched[step] = True
            if walk.found is not None:
                distances[i], entries[i] = walk.found[0][step], walk.found[1][step]
        if self.is_left_out is not None:
            gone = self.is_left_out(lockstep.contexts(step), entries)
            self.statistics.left_out += int(np.count_nonzero(gone))
            entries[gone] = -1
        self.statistics.searches += len(needy)
        self.statistics.seconds["search"] += self.clock() - start
        return distances, entries

    def _distances_of_pointers(
        self, lockstep: _Lockstep, step: int, pointers: np.ndarray, pointer_counts: np.ndarray
    ) -> np.ndarray:
        """float32 ``[active, max_knns]``, undefined beyond the counts."""
        start = self.clock()
        distances = np.empty(pointers.shape, dtype=np.float32)
        if len(pointing := np.flatnonzero(pointer_counts)):
            queries = lockstep.prepared_queries(step, self.prepare)
            longest = int(pointer_counts.max())
            distances[pointing, :longest] = self.pointer_distances(
                queries[pointing], pointers[pointing, :longest], pointer_counts[pointing]
            )
        self.statistics.seconds["distances"] += self.clock() - start
        return distances

    def survivors(self, distances: np.ndarray, entries: np.ndarray, target: int) -> np.ndarray:
        """Which of one step's candidates survive when ``target`` is read, nearest first.

        Parameters
        ----------
        distances, entries : float32 and int64 ``[n]``, as a walk keeps them.
        """
        survivors = np.empty((1, len(entries)), dtype=np.int64)
        count = np.zeros(1, dtype=np.int64)
        advance(
            distances[None],
            entries[None],
            np.array([len(entries)]),
            self.values,
            self.document_starts,
            np.array([target]),
            self.settings.knn_temp,
            survivors,
            count,
        )
        return survivors[0, : count[0]]

    def followed(self, survivors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where one step's survivors lead: the entries after them, and the other members of these entries' clusters.

        Parameters
        ----------
        survivors : int64 ``[n]``, nearest first.

        Returns
        -------
        int64, ``max_knns`` at most together, in the order in which a step considers them.
        """
        merge, pointing = self.settings.duplicates == "merge", min(len(survivors), self.settings.max_knns)
        found, counts = follow(
            survivors[None], np.array([len(survivors)]), *self.clusters, self.kept, self.settings.max_knns, merge
        )
        return found[0, :pointing], found[0, pointing : counts[0]]

    def _search_everywhere(self, walks: Sequence[Walk]) -> None:
        """Where every step searches, all searches are one batch."""
        if not (unknown := [walk for walk in walks if walk.found is None]):
            return
        start = self.clock()
        distances, entries = self.search(np.concatenate([walk.queries for walk in unknown]))
        splits = np.cumsum([len(walk.queries) for walk in unknown])[:-1]
        for walk, *found in zip(unknown, np.split(distances, splits), np.split(entries, splits), strict=True):
            walk.found = found[0], found[1]
        self.statistics.seconds["search"] += self.clock() - start


def padded_neighbours(
    steps: Sequence[tuple[np.ndarray, np.ndarray]], values: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps' neighbours (distances and entries, as a walk keeps them), side by side.

    Returns
    -------
    distances : float32 ``[steps, most neighbours]``; infinity in empty slots.
    values : int32, of the same shape; 0 in empty slots.
    entries : int64, of the same shape; -1 in empty slots.
    """
    width = max(1, *(len(distances) for distances, _ in steps)) if steps else 1
    distances = np.full((len(steps), width), np.inf, dtype=np.float32)
    values_found = np.zeros((len(steps), width), dtype=np.int32)
    entries_found = np.full((len(steps), width), -1, dtype=np.int64)
    for i, (step_distances, entries) in enumerate(steps):
        distances[i, : len(entries)] = step_distances
        values_found[i, : len(entries)] = values[entries]
        entries_found[i, : len(entries)] = entries
    return torch.from_numpy(distances), torch.from_numpy(values_found), torch.from_numpy(entries_found)
