"""Many settings of kNN-LM or RetoMaton from one forward pass and one search per ``probe``.

Per token and temperature, one pass over the neighbours gives log p_kNN of the target for every k; per setting, a
sum is all that is kept. So memory depends on the grid and not on the text. Where an adaptive lmbda is to be
fitted, a seeded sample of at most ``SAMPLE_TOKENS`` tokens is kept as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.adaptive import (
    FEATURES,
    LM_FEATURES,
    Buckets,
    Gate,
    fit_buckets,
    fit_gate,
    gate_loss,
    lm_features,
    neighbour_features,
)
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, Walk, padded_neighbours
from knn_lm_eval.methods.mixture import knn_log_probs
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.opening import DEFAULTS, open_automaton
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK, Passage, Reading, Score, Scorer
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.store.clusters import Clusters

WALKED_AT_ONCE = 2**11  # positions whose neighbours are in memory, for walks to have company
SAMPLE_TOKENS = 2**16
MOST_BUCKETS, TOKENS_PER_BUCKET = 32, 200


@dataclass(frozen=True)
class Grid:
    """The values to try; all of them with all others. An axis with None has the model's own value.

    Attributes
    ----------
    k : ascending; one search at the largest serves them all.
    knn_temp, lmbda : ascending.
    probe : each takes a search of its own.
    min_knns, max_knns : for RetoMaton.
    """

    k: tuple[int, ...]
    knn_temp: tuple[float, ...]
    lmbda: tuple[float, ...]
    probe: tuple[int | None, ...] = (None,)
    min_knns: tuple[float | None, ...] = (None,)
    max_knns: tuple[int | None, ...] = (None,)


def parse_axis(name: str, text: str, *, low: float, high: float = math.inf, whole: bool = False) -> tuple[Any, ...]:
    """The values of ``--name``: numbers separated by commas, or ``FIRST:LAST:COUNT``.

    The latter is spaced evenly for lmbda and by a constant factor for all others.

    Raises
    ------
    UserError
        Where that is no grid, or a value is below ``low``, above ``high`` or not whole where it should be.
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            space = np.linspace if name == "lmbda" else np.geomspace
            numbers = [float(f"{number:.6g}") for number in space(float(first), float(last), int(count))]
        else:
            numbers = [float(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise UserError(
            f"--{name} {text} is no grid: give numbers separated by commas, or FIRST:LAST:COUNT."
        ) from error
    if not numbers:
        raise UserError(f"--{name} {text!r} is an empty grid.")
    for number in numbers:
        if not low <= number <= high or math.isnan(number):
            raise UserError(f"--{name} {number:g} is out of range: it must be from {low:g} to {high:g}.")
        if whole and number % 1 != 0:  # neither is infinity
            raise UserError(f"--{name} {number:g} is not a whole number.")
    return tuple(sorted({round(number) if whole else number for number in numbers}))


@dataclass
class Surface:
    """One search or walk, and the sums of log p for every temperature, k and lmbda with it.

    Attributes
    ----------
    fixed : what differs between surfaces: ``probe``, or ``min_knns`` and ``max_knns``.
    k, knn_temp, lmbda : the axes.
    log_prob : float64 ``[knn_temp, k, lmbda]``.
    searches : full searches made.
    """

    fixed: dict[str, Any]
    k: tuple[int, ...]
    knn_temp: tuple[float, ...]
    lmbda: tuple[float, ...]
    log_prob: np.ndarray = field(init=False)
    searches: int = 0

    def __post_init__(self) -> None:
        self.log_prob = np.zeros((len(self.knn_temp), len(self.k), len(self.lmbda)))

    def add(self, lm_log_prob: Tensor, knn_log_prob: Tensor) -> None:
        """Add tokens: float64 ``[n]`` log p_LM, and float64 ``[n, knn_temp, k]`` log p_kNN."""
        lm = lm_log_prob[:, None, None]
        larger = torch.maximum(lm, knn_log_prob)
        p_lm, difference = (lm - larger).exp(), (knn_log_prob - larger).exp_()
        difference -= p_lm
        common = larger.sum(dim=0)
        for number, lmbda in enumerate(self.lmbda):
            mixed = torch.add(p_lm, difference, alpha=lmbda).log_()
            self.log_prob[:, :, number] += (common + mixed.sum(dim=0)).numpy()

    def settings(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Each setting and its sum of log p."""
        for place in np.ndindex(self.log_prob.shape):
            yield self.setting(*place), float(self.log_prob[place])

    def setting(self, knn_temp: int, k: int, lmbda: int) -> dict[str, Any]:
        """The setting at a place of ``log_prob``."""
        return {"k": self.k[k], "knn_temp": self.knn_temp[knn_temp], "lmbda": self.lmbda[lmbda], **self.fixed}


class Sample:
    """A uniform sample of the tokens, of a size that does not grow: those with the smallest random numbers."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random = size, np.random.default_rng(seed)
        self.priority = np.empty(0)
        self.arrays: dict[Any, np.ndarray] = {}

    def choose(self, number: int) -> np.ndarray:
        """Which of the next tokens may come in (their places), and remember their random numbers."""
        priority = self.random.random(number)
        limit = self.priority.max() if len(self.priority) == self.size else 1.0
        chosen = np.flatnonzero(priority < limit)
        self._new = priority[chosen]
        return chosen

    def add(self, arrays: dict[Any, np.ndarray]) -> None:
        """Take the chosen tokens' data, float32 ``[chosen, ...]``; what has been kept so far makes room."""
        priority = np.concatenate([self.priority, self._new])
        kept = np.sort(np.argsort(priority, kind="stable")[: self.size])
        for name, new in arrays.items():
            self.arrays[name] = np.concatenate([self.arrays[name], new])[kept] if name in self.arrays else new[kept]
        self.priority = priority[kept]


class TuningScorer(Scorer):
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
            automaton, self.retriever = open_automaton(lm.retriever, AutomatonSettings(), clusters)
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
    return own.with_settings(probe=probe)


@dataclass(frozen=True)
class Best:
    """The best setting of a grid.

    Attributes
    ----------
    surface, place : where it stands.
    log_prob : the sum of all tokens' log-probabilities.
    """

    surface: Surface
    place: tuple[int, int, int]
    log_prob: float

    @property
    def settings(self) -> dict[str, Any]:
        """As they stand in a params file."""
        return self.surface.setting(*self.place)


def find_best(surfaces: Sequence[Surface], tokens: int, saved_searches: float) -> Best:
    """The likeliest setting among those that save so large a fraction of searches.

    Raises
    ------
    UserError
        Where none saves as many.
    """
    walks = "min_knns" in surfaces[0].fixed
    allowed = [s for s in surfaces if not walks or 1 - s.searches / tokens >= saved_searches]
    if not allowed:
        most = max(1 - surface.searches / tokens for surface in surfaces)
        raise UserError(
            f"No setting of the grid saves {saved_searches:g} of the searches (at most {most:.3f} are saved); "
            f"add smaller values to --min_knns."
        )
    surface = max(allowed, key=lambda surface: surface.log_prob.max())
    place = np.unravel_index(int(surface.log_prob.argmax()), surface.log_prob.shape)
    return Best(surface, tuple(int(i) for i in place), float(surface.log_prob.max()))  # type: ignore[arg-type]


def on_edges(best: Best, surfaces: Sequence[Surface], entries: int) -> list[str]:
    """The names of the axes on whose edge the best setting lies, where the axis could go on there."""
    ends = {"k": (1, entries), "lmbda": (0, 1), "knn_temp": (0, math.inf), "min_knns": (0, math.inf)}
    names = []
    for name, value in best.settings.items():
        axis = sorted({setting[name] for s in surfaces for setting, _ in s.settings() if setting[name] is not None})
        if len(axis) > 1 and value in (axis[0], axis[-1]) and value not in ends.get(name, ()):
            names.append(name)
    return names


@dataclass(frozen=True)
class AdaptiveFit:
    """An adaptive lmbda and what it brings on the sample that it was fitted to.

    Attributes
    ----------
    lmbda, knn_temp : fitted together.
    log_prob, constant_log_prob : means per token, with it and with the grid's best setting.
    saved_searches : the fraction of searches that its threshold saves.
    tokens : in the sample.
    """

    lmbda: Buckets | Gate
    knn_temp: float
    log_prob: float
    constant_log_prob: float
    saved_searches: float
    tokens: int


def fit_adaptive(
    sample: Sample, best: Best, number: int, kind: Literal["buckets", "gate"], saved_searches: float, seed: int
) -> AdaptiveFit:
    """Fit an adaptive lmbda to the sample, for each temperature of the grid at the best k; the likeliest is taken.

    Parameters
    ----------
    best, number : the grid's best setting, and the number of its surface.
    saved_searches : for a gate: the fraction of searches to do without.

    Raises
    ------
    UserError
        Where no token of the sample has a neighbour.
    """
    temperature, k, lmbda = best.place
    lm = sample.arrays["lm"].astype(np.float64)
    features = np.concatenate([sample.arrays["lm features"], sample.arrays["features", number][:, k]], axis=1)
    knn = sample.arrays["knn", number][:, :, k].astype(np.float64)

    def mean_log_prob(weights: Tensor, knn_log_prob: np.ndarray) -> float:
        return -float(gate_loss(weights.double(), torch.from_numpy(lm), torch.from_numpy(knn_log_prob)))

    constant = torch.full((len(lm),), best.surface.lmbda[lmbda])
    constant_log_prob = mean_log_prob(constant, knn[:, temperature])
    found = torch.from_numpy(np.isfinite(features[:, FEATURES.index("nearest")]))
    if not found.any():
        # RetoMaton with min_knns=0 never searches, and so never has a pointer to follow.
        raise UserError("No token has a neighbour with the best setting, so there is no adaptive lmbda to fit.")
    fits = []
    for place, knn_temp in enumerate(best.surface.knn_temp):
        fitted: Buckets | Gate
        if kind == "buckets":
            number_of_buckets = max(2, min(MOST_BUCKETS, len(lm) // TOKENS_PER_BUCKET))
            fitted = fit_buckets(features[:, FEATURES.index("nearest")], lm, knn[:, place], number_of_buckets)
        else:
            fitted = fit_gate(features, lm, knn[:, place], saved_searches, seed)
        weights = torch.where(found, fitted(torch.from_numpy(features).nan_to_num(posinf=0.0)), 0.0)
        saved = 0.0 if fitted.threshold is None else float((weights == 0).double().mean())
        log_prob = mean_log_prob(weights, knn[:, place])
        fits.append(AdaptiveFit(fitted, knn_temp, log_prob, constant_log_prob, saved, len(lm)))
    return max(fits, key=lambda fit: fit.log_prob)
