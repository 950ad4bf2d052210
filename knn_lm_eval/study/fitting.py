"""Fitting an adaptive lmbda by maximum likelihood of the mixture, to a sample of a validation text's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.adaptive import (
    FEATURES,
    Buckets,
    Gate,
    fit_buckets,
    fit_gate,
    gate_loss,
)
from knn_lm_eval.study.grid import Best

SAMPLE_TOKENS = 2**16
MOST_BUCKETS, TOKENS_PER_BUCKET = 32, 200


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
