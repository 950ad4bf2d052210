"""A grid of settings, the text's log-probability with each of them, and the best one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError

# A number or several; or a text: numbers separated by commas, or FIRST:LAST:COUNT, which is spaced evenly for lmbda and
# by a constant factor for all others.
Axis = str | float | Sequence[float]
KNN_TEMPS, LMBDAS = "0.25:256:21", "0.02:0.98:25"


@dataclass(frozen=True)
class Grid:
    """The values to try; all of them with all others. An axis with None has the model's own value.

    Attributes
    ----------
    k : ascending; one search at the largest serves them all, unless the index searches otherwise for fewer.
    knn_temp, lmbda : ascending.
    probe : each takes a search of its own.
    min_knns, max_knns : for RetoMaton.
    ngram_lmbda : ascending.
    """

    k: tuple[int, ...]
    knn_temp: tuple[float, ...]
    lmbda: tuple[float, ...]
    probe: tuple[int | None, ...] = (None,)
    min_knns: tuple[float | None, ...] = (None,)
    max_knns: tuple[int | None, ...] = (None,)
    ngram_lmbda: tuple[float | None, ...] = (None,)


def parse_axis(name: str, axis: Axis, *, low: float, high: float = math.inf, whole: bool = False) -> tuple[Any, ...]:
    """The values to try of the setting ``name``, ascending.

    Raises
    ------
    UserError
        Where ``axis`` is no grid, or a value is below ``low``, above ``high`` or not whole where it should be.
    """
    try:
        numbers = _read_axis(name, axis)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--{name} {axis} is no grid: give numbers separated by commas, or FIRST:LAST:COUNT."
        ) from error
    if not numbers:
        raise UserError(f"--{name} {axis!r} is an empty grid.")
    for number in numbers:
        if not low <= number <= high or math.isnan(number):
            raise UserError(f"--{name} {number:g} is out of range: it must be from {low:g} to {high:g}.")
        if whole and number % 1 != 0:  # neither is infinity
            raise UserError(f"--{name} {number:g} is not a whole number.")
    return tuple(sorted({round(number) if whole else number for number in numbers}))


def _read_axis(name: str, axis: Axis) -> list[float]:
    if isinstance(axis, (int, float)):
        return [float(axis)]
    if not isinstance(axis, str):
        return [float(number) for number in axis]
    if ":" not in axis:
        return [float(number) for number in axis.split(",") if number.strip()]
    first, last, count = axis.split(":")
    space = np.linspace if name.endswith("lmbda") else np.geomspace
    return [float(f"{number:.6g}") for number in space(float(first), float(last), int(count))]


def make_grid(
    entries: int,
    retomaton: bool,
    *,
    k: Axis | None = None,
    knn_temp: Axis = KNN_TEMPS,
    lmbda: Axis = LMBDAS,
    probe: Axis | None = None,
    min_knns: Axis | None = None,
    max_knns: Axis | None = None,
    ngram_lmbda: Axis | None = None,
) -> Grid:
    """The grid over these axes, for a datastore of so many entries.

    Raises
    ------
    UserError
        Where an axis is no grid, out of range, or for the other method.
    """
    for name, axis in (("min_knns", min_knns), ("max_knns", max_knns)):
        if axis and not retomaton:
            raise UserError(f"--{name} is for RetoMaton: add retomaton=True to --model_args.")
    if retomaton and probe:
        raise UserError("--probe is tuned for kNN-LM; give RetoMaton its probe in --model_args.")
    default_k = sorted({min(number, entries) for number in (16, 64, 256, 1024)})
    if retomaton:
        default_k = default_k[-1:]  # it walks anew for each
    walks: dict[str, Any] = {}
    if probe:
        walks["probe"] = parse_axis("probe", probe, low=1, whole=True)
    if min_knns:
        walks["min_knns"] = parse_axis("min_knns", min_knns, low=0)
    if max_knns:
        walks["max_knns"] = parse_axis("max_knns", max_knns, low=1, whole=True)
    if ngram_lmbda:
        walks["ngram_lmbda"] = parse_axis("ngram_lmbda", ngram_lmbda, low=0.0, high=0.999)
    return Grid(
        k=parse_axis("k", k or default_k, low=1, high=entries, whole=True),
        knn_temp=parse_axis("knn_temp", knn_temp, low=1e-6, high=1e9),
        lmbda=parse_axis("lmbda", lmbda, low=0.0, high=0.999),
        **walks,
    )


@dataclass
class Surface:
    """One search or walk, and the sums of log p for every temperature, k and lmbda with it.

    Attributes
    ----------
    fixed : what differs between surfaces: ``probe``, or ``min_knns`` and ``max_knns``, and ``ngram_lmbda``.
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

    def add(self, lm_log_prob: Tensor, knn_log_prob: Tensor, ngram_log_prob: Tensor | None = None) -> None:
        """Add tokens: float64 ``[n]`` log p_LM and log p_ngram, and float64 ``[n, knn_temp, k]`` log p_kNN.

        N-grams weigh ``fixed["ngram_lmbda"]``, and nothing where their log p is NaN.
        """
        lm = lm_log_prob[:, None, None]
        knn_log_prob = torch.where(knn_log_prob.isnan(), lm, knn_log_prob)  # no neighbour: the LM alone
        larger = torch.maximum(lm, knn_log_prob)
        p_lm, difference = (lm - larger).exp(), (knn_log_prob - larger).exp_()
        difference -= p_lm
        common = larger.sum(dim=0)
        for number, lmbda in enumerate(self.lmbda):
            mixed = torch.add(p_lm, difference, alpha=lmbda)
            if ngram_log_prob is not None:
                # Of the larger one's size, as the others are.
                p_ngram = (ngram_log_prob[:, None, None] - larger).exp()
                weight = float(self.fixed["ngram_lmbda"])
                mixed = torch.where(p_ngram.isnan(), mixed, (1 - weight) * mixed + weight * p_ngram)
            mixed.log_()
            self.log_prob[:, :, number] += (common + mixed.sum(dim=0)).numpy()

    def settings(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Each setting and its sum of log p."""
        for place in np.ndindex(self.log_prob.shape):
            yield self.setting(*place), float(self.log_prob[place])

    def setting(self, knn_temp: int, k: int, lmbda: int) -> dict[str, Any]:
        """The setting at a place of ``log_prob``."""
        return {"k": self.k[k], "knn_temp": self.knn_temp[knn_temp], "lmbda": self.lmbda[lmbda], **self.fixed}


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
    ends = {
        "k": (1, entries),
        "lmbda": (0, 1),
        "ngram_lmbda": (0, 1),
        "knn_temp": (0, math.inf),
        "min_knns": (0, math.inf),
    }
    names = []
    for name, value in best.settings.items():
        axis = sorted({setting[name] for s in surfaces for setting, _ in s.settings() if setting[name] is not None})
        if len(axis) > 1 and value in (axis[0], axis[-1]) and value not in ends.get(name, ()):
            names.append(name)
    return names
