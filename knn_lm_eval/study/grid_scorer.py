"""Scoring a text with every setting of a grid: one forward pass, and one search per ``probe``.

Some indexes search otherwise for few neighbours than for many; there it is one search per ``probe`` and k.

Per token and temperature, one pass over the neighbours gives log p_kNN of the target for every k; per setting, a
sum is all that is kept. So memory depends on the grid and not on the text. Where an adaptive lmbda is to be
fitted, a seeded sample of at most ``SAMPLE_TOKENS`` tokens is kept as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import PairsByRow, Reader, Reading
from knn_lm_eval.methods.adaptive import LM_FEATURES, lm_features, neighbour_features
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk, padded_neighbours
from knn_lm_eval.methods.left_out import Contexts
from knn_lm_eval.methods.mixture import knn_log_probs
from knn_lm_eval.model.exclusion import Exclusion
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.neighbours import seconds_of
from knn_lm_eval.model.ngram_mixture import NgramReader
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.model.scores import Score
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK, PassageScorer
from knn_lm_eval.model.settings import DEFAULTS
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.store.joined import open_clusters
from knn_lm_eval.study.fitting import SAMPLE_TOKENS, Sample
from knn_lm_eval.study.grid import Grid, Surface
from knn_lm_eval.study.run import scores_of_readings
from knn_lm_eval.system.timing import StageTimer

WALKED_AT_ONCE = 2**11  # positions whose neighbours are in memory, for walks to have company


@dataclass(frozen=True)
class FoundForSurface:
    """The neighbours of ``n`` tokens' queries, found as a surface's settings say.

    Attributes
    ----------
    distances, values, counts : ``[n, slots]``, as a search gives them.
    of_one_k : they were found for the surface's one k, and may be more or fewer (a walk's are); otherwise each k
        takes the first slots.
    """

    surface: Surface
    distances: Tensor
    values: Tensor
    counts: Tensor | None
    of_one_k: bool

    def slots(self, k: tuple[int, ...]) -> tuple[int, ...]:
        """How many slots each k has."""
        return (self.distances.shape[1],) if self.of_one_k else k

    def has(self, other: Surface) -> bool:
        """Whether the one k of another surface is among those that this was found for."""
        if self.surface.fixed != other.fixed:
            return False
        return self.surface.k == other.k if self.of_one_k else self.surface.k[-1] >= other.k[0]


class NeighbourSource(Protocol):
    """Finds each surface's neighbours of the same queries."""

    surfaces: list[Surface]
    rows_at_once: int  # positions that should come together
    block: int | None  # tokens whose neighbours are in memory at a time; None is all that came

    def find(
        self,
        queries: Tensor,
        targets: Tensor,
        lengths: Sequence[int],
        timed: StageTimer,
        contexts: Contexts | None,
    ) -> Iterator[FoundForSurface]:
        """The neighbours of each surface, in order.

        Parameters
        ----------
        lengths : of the continuations.
        contexts : of the tokens, where neighbours are left out.
        """


class Searches:
    """kNN-LM: a surface for each probe, all k from one search at the largest.

    Where a search at a smaller k finds others than the first of a larger one, a search and a surface for each k, too.
    """

    rows_at_once = 1

    def __init__(self, retriever: Retriever, grid: Grid, exclusion: Exclusion | None) -> None:
        self._exclusion = exclusion
        self._shared = retriever.first_of_more_are_fewer
        self._retrievers: list[Retriever] = []
        self.surfaces: list[Surface] = []
        for of_probe in [_with_probe(retriever, probe) for probe in grid.probe]:
            for of_surface in [grid.k] if self._shared else [(k,) for k in grid.k]:
                self._retrievers.append(_with_k(of_probe, of_surface[-1]))
                self.surfaces.append(Surface({"probe": of_probe.probe}, of_surface, grid.knn_temp, grid.lmbda))
        self.block: int | None = max(1, NEIGHBOURS_PER_BLOCK // grid.k[-1])

    def find(
        self,
        queries: Tensor,
        targets: Tensor,
        lengths: Sequence[int],
        timed: StageTimer,
        contexts: Contexts | None,
    ) -> Iterator[FoundForSurface]:
        """As ``NeighbourSource.find``."""
        for surface, retriever in zip(self.surfaces, self._retrievers, strict=True):
            with timed("search"):
                distances, values, entries, counts = retriever.search(queries)
            if self._exclusion is not None and contexts is not None:
                gone = self._exclusion.of_found(contexts, entries)
                distances, values = distances.masked_fill(gone, math.inf), values.masked_fill(gone, 0)
            yield FoundForSurface(surface, distances, values, counts, of_one_k=not self._shared)


class Walks:
    """RetoMaton: a surface for each (k, min_knns, max_knns), which walk anew over the same searches."""

    rows_at_once = WALKED_AT_ONCE
    block: int | None = None

    def __init__(self, retriever: Retriever, settings: dict[str, Any], grid: Grid, exclusion: Exclusion | None) -> None:
        name = settings["clusters"]
        clusters = None if name is None else open_clusters(retriever.datastore, str(name))
        automaton, retriever = open_automaton(retriever, AutomatonSettings(), clusters, exclusion)
        searched = grid.k[-1:] if retriever.first_of_more_are_fewer else grid.k
        self._retrievers = {k: _with_k(retriever, k) for k in searched}
        self.surfaces: list[Surface] = []
        self._automata: list[Automaton] = []
        for k, min_knns, max_knns in itertools.product(grid.k, grid.min_knns, grid.max_knns):
            walk = AutomatonSettings(
                k,
                min_knns=settings["min_knns"] if min_knns is None else min_knns,
                max_knns=settings["max_knns"] if max_knns is None else max_knns,
                duplicates=settings["duplicates"],
            )
            self._automata.append(automaton.with_settings(walk))
            fixed = {"min_knns": walk.min_knns, "max_knns": walk.max_knns}
            self.surfaces.append(Surface(fixed, (k,), grid.knn_temp, grid.lmbda))

    def find(
        self,
        queries: Tensor,
        targets: Tensor,
        lengths: Sequence[int],
        timed: StageTimer,
        contexts: Contexts | None,
    ) -> Iterator[FoundForSurface]:
        """As ``NeighbourSource.find``."""
        with timed("search"):
            found = {k: retriever.find(queries.numpy()) for k, retriever in self._retrievers.items()}  # [n, k]
        ends = np.cumsum(lengths)
        for surface, automaton in zip(self.surfaces, self._automata, strict=True):
            (k,) = surface.k
            distances_of_k, entries_of_k = (array[:, :k] for array in found.get(k, found[max(found)]))  # [n, k]
            walks = []
            for here in (slice(end - length, end) for end, length in zip(ends, lengths, strict=True)):
                found_here = distances_of_k[here], entries_of_k[here]
                walk = Walk(queries[here].numpy(), targets[here].numpy(), found=found_here)
                walk.contexts = None if contexts is None else contexts.of_rows(here)
                walks.append(walk)
            with timed("walk"):
                automaton.walk(walks, keep_neighbours=True)
                steps = [neighbours for walk in walks for neighbours in walk.neighbours]
                distances, values, _ = padded_neighbours(steps, automaton.values)
            surface.searches += sum(walk.searches for walk in walks)
            yield FoundForSurface(surface, distances, values, None, of_one_k=True)


class GridScorer(PassageScorer):
    """Scores every text by the base LM and every setting of a grid; returns the base LM's scores.

    Parameters
    ----------
    lm : a loaded ``knn-hf`` whose k is the grid's largest; it decides between kNN-LM and RetoMaton.
    grid : what to try.
    sample_seed : keep a sample of tokens, drawn with this seed, to fit an adaptive lmbda to; None keeps none.

    Attributes
    ----------
    surfaces : the sums, one surface per search or walk.
    defaults : the papers' settings (with the model's probe, min_knns and max_knns), as a surface of one point.
    sample : for each of its tokens ``lm`` (log p_LM), ``lm features``, and per surface's number ``knn`` (log p_kNN,
        ``[knn_temp, k]``) and ``features`` (``[k, features]``).
    base_log_prob, tokens_scored : of the base LM; how many were scored.
    """

    def __init__(self, lm: KNNHF, grid: Grid, sample_seed: int | None = None) -> None:
        super().__init__(Reader(lm.language_model, lm.softmax_dtype))
        if lm.settings.get("no_pointer"):
            raise UserError("With no_pointer=True RetoMaton is kNN-LM: leave retomaton and no_pointer out to tune it.")
        self._exclusion = lm.augmentation.exclusion
        self._source: NeighbourSource = (
            Walks(lm.retriever, lm.settings, grid, self._exclusion)
            if "retomaton" in lm.settings
            else Searches(lm.retriever, grid, self._exclusion)
        )
        # Of each that the source has those that are added up: one, or one for each weight of n-grams.
        self._added = [_with_ngrams(surface, grid.ngram_lmbda) for surface in self._source.surfaces]
        self.surfaces = [surface for surfaces in self._added for surface in surfaces]
        self._ngrams = NgramReader(None if grid.ngram_lmbda == (None,) else lm.augmentation.ngrams)
        own = {name: lm.settings[name] for name in self._source.surfaces[0].fixed}
        default_k = min(int(DEFAULTS["k"]), grid.k[-1])
        self.defaults = Surface(own, (default_k,), (DEFAULTS["knn_temp"],), (DEFAULTS["lmbda"],))
        self.sample = None if sample_seed is None else Sample(SAMPLE_TOKENS, sample_seed)
        self.base_log_prob = 0.0
        self._timed = StageTimer(("search", "walk", "grid"), torch.device("cpu"))

    @property
    def rows_at_once(self) -> int:
        """See ``WALKED_AT_ONCE``; kNN-LM needs no company."""
        return self._source.rows_at_once

    @property
    def seconds(self) -> dict[str, float]:
        """``forward``, ``head``, ``search``, ``walk``, ``grid`` and, where they count, ``ngrams`` and ``overlap``."""
        return self.reader.seconds | self._timed.seconds | self._ngrams.seconds | seconds_of(self._exclusion)

    @torch.inference_mode()
    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every setting."""
        if want_greedy:
            raise UserError("Tuning is for tasks that score whole texts (perplexity), such as wikitext103_valid.")
        lm_figures = [self._read_tables(reading) for reading in readings]
        lm_log_prob, lm_feature = (
            torch.cat(part) for part in zip(*lm_figures, strict=True)
        )  # [tokens], [tokens, features]
        pairs = [reading.pairs() for reading in readings]
        queries = torch.cat(
            [reading.queries[rows].float().cpu() for reading, (rows, _) in zip(readings, pairs, strict=True)]
        )  # [tokens, dimension]
        targets = torch.cat([asked for _, asked in pairs])
        lengths = [length for reading in readings for length in reading.lengths]
        of_ngrams = [self._ngrams.of_reading(reading) for reading in readings]
        ngram = [rows.log_probs(*pair) for rows, pair in zip(of_ngrams, pairs, strict=True) if rows is not None]
        contexts = None
        if self._exclusion is not None:
            of_readings = [self._exclusion.contexts(reading) for reading in readings]
            of_pairs = [of.of_rows(rows.numpy()) for of, (rows, _) in zip(of_readings, pairs, strict=True)]
            contexts = Contexts.joined(of_pairs)
        block = self._source.block or len(targets)
        for start in range(0, len(targets), block):
            here = slice(start, start + block)
            of_block = torch.cat(ngram)[here] if ngram else None
            of_tokens = None if contexts is None else contexts.of_rows(here)
            self._add(queries[here], targets[here], lengths, lm_log_prob[here], lm_feature[here], of_block, of_tokens)
        self.base_log_prob += float(lm_log_prob.sum())
        self.tokens_scored += len(lm_log_prob)
        return scores_of_readings(readings, lm_log_prob)

    def _add(
        self,
        queries: Tensor,
        targets: Tensor,
        lengths: Sequence[int],
        lm_log_prob: Tensor,
        lm_feature: Tensor,
        ngram_log_prob: Tensor | None,
        contexts: Contexts | None,
    ) -> None:
        """Add tokens to the surfaces, and some to the sample."""
        chosen = None if self.sample is None else self.sample.choose(len(targets))
        kept: dict[Any, Tensor] = {}
        if chosen is not None:
            kept = {"lm": lm_log_prob[chosen].float(), "lm features": lm_feature[chosen]}
        for number, found in enumerate(self._source.find(queries, targets, lengths, self._timed, contexts)):
            with self._timed("grid"):
                slots = found.slots(found.surface.k)
                knn = self._log_p_knn(found, targets, found.surface.knn_temp, slots)  # [tokens, knn_temp, k]
                for surface in self._added[number]:
                    surface.add(lm_log_prob, knn, ngram_log_prob)
                    surface.searches = found.surface.searches
                if found.has(self.defaults):
                    default_slots = found.slots(self.defaults.k)
                    self.defaults.add(
                        lm_log_prob, self._log_p_knn(found, targets, self.defaults.knn_temp, default_slots)
                    )
                    self.defaults.searches = found.surface.searches
                if chosen is not None:
                    known = torch.where(knn.isnan(), lm_log_prob[:, None, None], knn)  # no neighbour: the LM alone
                    kept["knn", number] = known[chosen].float()
                    kept["features", number] = torch.stack(
                        [neighbour_features(found.distances[chosen, :n], found.values[chosen, :n]) for n in slots],
                        dim=1,
                    )  # [chosen, k, features]
        if self.sample is not None:
            self.sample.add({name: array.numpy() for name, array in kept.items()})

    def _log_p_knn(
        self, found: FoundForSurface, targets: Tensor, knn_temp: tuple[float, ...], slots: tuple[int, ...]
    ) -> Tensor:
        return knn_log_probs(found.distances, found.values, found.counts, targets, knn_temp, slots)

    def _read_tables(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """log p_LM of the targets, float64 ``[pairs]``, and the LM's features where a sample is kept."""
        pairs = PairsByRow(*reading.pairs(), reading.hidden.device)
        log_prob = torch.empty(len(pairs), dtype=torch.float64)
        features = torch.zeros(len(pairs), len(LM_FEATURES))
        for start, stop, table in self.reader.tables(reading.hidden, 0, len(reading.hidden)):
            here, at = pairs.within(start, stop)
            log_prob[here] = table[at, pairs.targets[here]].double().cpu()
            if self.sample is not None:
                features[here] = lm_features(table)[at].cpu()
        return pairs.as_given(log_prob), pairs.as_given(features)


def _with_ngrams(surface: Surface, weights: tuple[float | None, ...]) -> list[Surface]:
    """The surface for each weight of n-grams; itself where they are not mixed in."""
    axes = surface.k, surface.knn_temp, surface.lmbda
    return [surface if of is None else Surface(surface.fixed | {"ngram_lmbda": of}, *axes) for of in weights]


def _with_k(retriever: Retriever, k: int) -> Retriever:
    return retriever if retriever.k == k else retriever.with_settings(k=k)


def _with_probe(retriever: Retriever, probe: int | None) -> Retriever:
    if probe is None:
        return retriever
    if not retriever.has_lists:
        raise UserError(f"--probe is for indexes with inverted lists, and {retriever.name!r} has none; leave it out.")
    return retriever.with_settings(probe=probe)
