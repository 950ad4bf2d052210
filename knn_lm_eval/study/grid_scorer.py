"""Scoring a text with every setting of a grid: one forward pass, and one search per ``probe``.

Per token and temperature, one pass over the neighbours gives log p_kNN of the target for every k; per setting, a
sum is all that is kept. So memory depends on the grid and not on the text. Where an adaptive lmbda is to be
fitted, a seeded sample of at most ``SAMPLE_TOKENS`` tokens is kept as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.adaptive import LM_FEATURES, lm_features, neighbour_features
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.opening import DEFAULTS, open_automaton
from knn_lm_eval.model.retomaton import padded_neighbours
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK, Passage, Reading, Score, Scorer
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.study.fitting import SAMPLE_TOKENS, Sample
from knn_lm_eval.study.grid import Grid, Surface

WALKED_AT_ONCE = 2**11  # positions whose neighbours are in memory, for walks to have company
ROWS_AT_ONCE = 2**7  # whose weights stay in the processor's cache


class GridScorer(Scorer):
    """Scores every text by the base LM and every setting of a grid; returns the base LM's scores.

    Parameters
    ----------
    lm : a loaded ``knn-hf`` whose k is the grid's largest; it decides between kNN-LM and RetoMaton.
    grid : what to try.
    sample_seed : keep a sample of tokens, drawn with this seed, for ``fit``; None keeps none.

    Attributes
    ----------
    surfaces : the sums, one surface per search or walk.
    defaults : the papers' settings (with the model's probe, min_knns and max_knns), as a surface of one point.
    base_log_prob, tokens : of the base LM; how many were scored.
    """

    def __init__(self, lm: KNNHF, grid: Grid, sample_seed: int | None = None) -> None:
        super().__init__(lm.scorer.model, lm.retriever, 0.0, 1.0, lm.softmax_dtype)
        self.base_log_prob, self.tokens = 0.0, 0
        self.seconds |= {"search": 0.0, "walk": 0.0, "grid": 0.0}
        self.sample = None if sample_seed is None else Sample(SAMPLE_TOKENS, sample_seed)
        self.surfaces: list[Surface] = []
        self._retrievers: list[Retriever] = []
        self._walkers: list[Automaton] = []
        settings = lm.settings
        if settings.get("no_pointer"):
            raise UserError("With no_pointer=True RetoMaton is kNN-LM: leave retomaton and no_pointer out to tune it.")
        if "retomaton" not in settings:
            for probe in grid.probe:
                retriever = lm.retriever if probe is None else _with_probe(lm, probe)
                self._retrievers.append(retriever)
                self.surfaces.append(Surface({"probe": retriever.probe}, grid.k, grid.knn_temp, grid.lmbda))
        else:
            name = settings["clusters"]
            clusters = None if name is None else Clusters.open(lm.retriever.datastore, str(name))
            automaton = open_automaton(lm.retriever, AutomatonSettings(), clusters)
            for k, min_knns, max_knns in itertools.product(grid.k, grid.min_knns, grid.max_knns):
                walk = AutomatonSettings(
                    k,
                    min_knns=settings["min_knns"] if min_knns is None else min_knns,
                    max_knns=settings["max_knns"] if max_knns is None else max_knns,
                    duplicates=settings["duplicates"],
                )
                self._walkers.append(automaton.with_settings(walk))
                fixed = {"min_knns": walk.min_knns, "max_knns": walk.max_knns}
                self.surfaces.append(Surface(fixed, (k,), grid.knn_temp, grid.lmbda))
        own = {name: settings[name] for name in self.surfaces[0].fixed}
        default_k = min(int(DEFAULTS["k"]), grid.k[-1])
        self.defaults = Surface(own, (default_k,), (DEFAULTS["knn_temp"],), (DEFAULTS["lmbda"],))

    @property
    def rows_at_once(self) -> int:
        """See ``WALKED_AT_ONCE``; kNN-LM needs no company."""
        return WALKED_AT_ONCE if self._walkers else 1

    @torch.inference_mode()
    def score(self, batches: Sequence[Sequence[Passage]], want_greedy: bool) -> list[list[Score]]:
        """Score batches with every setting; the LM reads once."""
        if want_greedy:
            raise UserError("Tuning is for tasks that score whole texts (perplexity), such as wikitext103_valid.")
        readings = [self._read(batch) for batch in batches]
        of_lm = [self._read_tables(reading) for reading in readings]
        lm_log_prob, lm_feature = (torch.cat(part) for part in zip(*of_lm, strict=True))
        pairs = [reading.pairs() for reading in readings]
        queries = torch.cat(
            [reading.queries[rows].float().cpu() for reading, (rows, _) in zip(readings, pairs, strict=True)]
        )
        targets = torch.cat([asked for _, asked in pairs])
        lengths = [len(continuation) for reading in readings for _, continuation in reading.asked]
        step = len(targets) if self._walkers else max(1, NEIGHBOURS_PER_BLOCK // self.surfaces[0].k[-1])
        for start in range(0, len(targets), step):
            here = slice(start, start + step)
            lm, target = lm_log_prob[here], targets[here]
            chosen = None if self.sample is None else self.sample.choose(len(lm))
            kept: dict[Any, Tensor] = {}
            if chosen is not None:
                kept = {"lm": lm[chosen].float(), "lm features": lm_feature[here][chosen]}
            for number, (distances, values, counts) in enumerate(self._neighbours(queries[here], target, lengths)):
                surface = self.surfaces[number]
                with self._timed("grid"):
                    # A walk's neighbours were found with one k, and are more or fewer than that.
                    k = (distances.shape[1],) if self._walkers else surface.k
                    knn = knn_log_probs(distances, values, counts, target, surface.knn_temp, k)
                    surface.add(lm, knn)
                    self._add_defaults(surface, lm, distances, values, counts, target)
                    if chosen is not None:
                        kept["knn", number] = knn[chosen].float()
                        kept["features", number] = torch.stack(
                            [neighbour_features(distances[chosen, :count], values[chosen, :count]) for count in k],
                            dim=1,
                        )
            if self.sample is not None:
                self.sample.add({name: array.numpy() for name, array in kept.items()})
        self._timed.settle()
        self.base_log_prob += float(lm_log_prob.sum())
        self.tokens += len(lm_log_prob)
        self.tokens_scored = self.tokens
        # lm-eval's own report is of the base LM; the surfaces are what was asked for.
        scores = iter([Score(float(part.sum()), False) for part in lm_log_prob.split(lengths)])
        return [[next(scores) for _ in range(size)] for reading in readings for size in reading.sizes]

    def _read_tables(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """log p_LM of the targets, float64 ``[pairs]``, and the LM's features where a sample is kept."""
        rows, targets = reading.pairs()
        log_prob = torch.empty(len(rows), dtype=torch.float64)
        features = torch.zeros(len(rows), len(LM_FEATURES))
        for start, stop, table in self._tables(reading.hidden, 0, len(reading.hidden)):
            (here,) = ((rows >= start) & (rows < stop)).nonzero(as_tuple=True)
            at = (rows[here] - start).to(table.device)
            log_prob[here] = table[at, targets[here].to(table.device)].double().cpu()
            if self.sample is not None:
                features[here] = lm_features(table)[at].cpu()
        return log_prob, features

    def _neighbours(
        self, queries: Tensor, targets: Tensor, lengths: list[int]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Each surface's neighbours of the same queries: distances, values and counts."""
        for retriever in self._retrievers:
            with self._timed("search"):
                distances, values, _, counts = retriever.search(queries)
            yield distances, values, counts
        if not self._walkers:
            return
        assert self.retriever is not None
        with self._timed("search"):
            found_distances, found_entries = self.retriever.find(queries.numpy())
        ends = np.cumsum(lengths)
        for surface, automaton in zip(self.surfaces, self._walkers, strict=True):
            walks = []
            for here in (slice(end - length, end) for end, length in zip(ends, lengths, strict=True)):
                found = found_distances[here, : surface.k[0]], found_entries[here, : surface.k[0]]
                walks.append(Walk(queries[here].numpy(), targets[here].numpy(), found=found))
            with self._timed("walk"):
                automaton.walk(walks, keep_neighbours=True)
                steps = [neighbours for walk in walks for neighbours in walk.neighbours]
                padded = padded_neighbours(steps, automaton.values)
            surface.searches += sum(walk.searches for walk in walks)
            yield *padded, None

    def _add_defaults(
        self,
        surface: Surface,
        lm_log_prob: Tensor,
        distances: Tensor,
        values: Tensor,
        counts: Tensor | None,
        targets: Tensor,
    ) -> None:
        """The papers' setting, where it is a point of this surface's search or walk."""
        defaults = self.defaults
        if surface.fixed != defaults.fixed or defaults.k[0] > surface.k[-1]:
            return
        if self._walkers and surface.k != defaults.k:
            return
        k = (distances.shape[1],) if self._walkers else defaults.k
        defaults.add(lm_log_prob, knn_log_probs(distances, values, counts, targets, defaults.knn_temp, k))
        defaults.searches = surface.searches


def _with_probe(lm: KNNHF, probe: int) -> Retriever:
    own = lm.retriever
    if own.probe is None:
        raise UserError(f"--probe is for indexes with inverted lists, and {own.index_name!r} has none; leave it out.")
    return own.with_probe(probe)


def knn_log_probs(
    distances: Tensor,
    values: Tensor,
    counts: Tensor | None,
    targets: Tensor,
    knn_temp: Sequence[float],
    k: Sequence[int],
) -> Tensor:
    """log p_kNN of one target per row for every temperature and every k.

    Parameters
    ----------
    distances : float32 ``[n, neighbours]``, as a search returns them; infinity in empty slots.
    values : int ``[n, neighbours]``.
    counts : int ``[n, neighbours]``, how often each counts; None for once.
    targets : int ``[n]``.
    k : ascending; a smaller k takes the first slots.

    Returns
    -------
    float64 ``[n, knn_temp, k]``; minus infinity where no neighbour has the target as its value.
    """
    result = torch.empty(len(distances), len(knn_temp), len(k), dtype=torch.float64)
    segments = list(itertools.pairwise((0, *k)))
    in_segment = torch.zeros(k[-1], len(k))
    for number, (begin, end) in enumerate(segments):
        in_segment[begin:end, number] = 1.0
    for start in range(0, len(distances), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distance = distances[rows, : k[-1]]
        matches = (values[rows, : k[-1]] == targets[rows, None]).float()
        nearest = torch.stack([distance[:, begin:end].amin(dim=-1) for begin, end in segments], dim=-1)
        nearest = nearest.cummin(dim=-1).values
        nearest = torch.where(torch.isinf(nearest), 0.0, nearest)
        # Each segment counts from the nearest distance so far: none can underflow as a whole. Where distances do not
        # ascend (recompute_dists) a later segment may begin nearer, and the earlier ones shrink beside it.
        scores = torch.empty_like(distance)
        for number, (begin, end) in enumerate(segments):
            torch.sub(nearest[:, number, None], distance[:, begin:end], out=scores[:, begin:end])
        shrink = (nearest[:, :, None] - nearest[:, None, :]).double().clamp_(max=0.0)  # above 0: only empty slots
        for number, temperature in enumerate(knn_temp):
            weight = (scores / temperature).exp_()
            if counts is not None:
                weight *= counts[rows, : k[-1]]
            sums = torch.stack([weight @ in_segment, weight.mul_(matches) @ in_segment]).double()
            total, mass = (sums[:, :, None, :] * (shrink / temperature).exp().tril()).sum(dim=-1)
            result[rows, number] = torch.where(mass > 0, (mass / total).log(), -math.inf)
    return result
