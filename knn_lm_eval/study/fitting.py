"""Fitting an adaptive lmbda by maximum likelihood of the mixture, to a sample of a validation text's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.adaptive import (
    FEATURES,
    LARGEST_LMBDA,
    LM_FEATURES,
    Buckets,
    Gate,
    gate_network,
    log_scale,
)
from knn_lm_eval.study.grid import Best

SAMPLE_TOKENS = 2**16
MOST_BUCKETS, TOKENS_PER_BUCKET = 32, 200
HIDDEN_UNITS = 16
WEIGHT_DECAY = 3e-3


class Sample:
    """A uniform sample of the tokens, of a size that does not grow: those with the smallest random numbers."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random = size, np.random.default_rng(seed)
        self.priority = np.empty(0)
        self.arrays: dict[Any, np.ndarray] = {}
        self._chosen_priority = np.empty(0)  # of what ``choose`` chose, until it is added

    def choose(self, number: int) -> np.ndarray:
        """Which of the next tokens may come in (their places), and remember their random numbers."""
        priority = self.random.random(number)
        limit = self.priority.max() if len(self.priority) == self.size else 1.0
        chosen = np.flatnonzero(priority < limit)
        self._chosen_priority = priority[chosen]
        return chosen

    def add(self, arrays: dict[Any, np.ndarray]) -> None:
        """Take the chosen tokens' data, float32 ``[chosen, ...]``; what has been kept so far makes room."""
        priority = np.concatenate([self.priority, self._chosen_priority])
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
    lm = sample.arrays["lm"].astype(np.float64)  # [tokens]
    of_neighbours = sample.arrays["features", number][:, k]
    features = np.concatenate([sample.arrays["lm features"], of_neighbours], axis=1)  # [tokens, FEATURES]
    knn = sample.arrays["knn", number][:, :, k].astype(np.float64)  # [tokens, knn_temp]

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


def fit_buckets(nearest: np.ndarray, lm_log_prob: np.ndarray, knn_log_prob: np.ndarray, number: int) -> Buckets:
    """Buckets with about as many tokens each, and the likeliest weight for each by EM.

    A step of EM has the closed form lmbda = mean of lmbda p_kNN / p. One token for the LM is added to each bucket,
    so that no weight becomes 1.

    Parameters
    ----------
    nearest : float ``[n]``, the nearest neighbours' distances.
    lm_log_prob, knn_log_prob : float ``[n]``, log p_LM and log p_kNN of the tokens that came.
    number : of buckets; fewer where distances are equal.
    """
    found = np.isfinite(nearest)
    edges = np.unique(np.quantile(nearest[found], np.arange(1, number) / number).astype(np.float32))
    bucket = np.searchsorted(edges, nearest[found].astype(np.float32), side="right")
    # p_kNN / (p_LM + p_kNN): all that the likelihood depends on, and safe from underflow.
    share = 1 / (1 + np.exp(np.clip(lm_log_prob[found] - knn_log_prob[found], -700, 700)))
    counts = np.bincount(bucket, minlength=len(edges) + 1)
    lmbdas = np.full(len(edges) + 1, 0.5)
    for _ in range(5000):
        mine = lmbdas[bucket] * share
        responsibility = mine / (mine + (1 - lmbdas[bucket]) * (1 - share))
        new = np.bincount(bucket, responsibility, minlength=len(edges) + 1) / (counts + 1)
        change, lmbdas = np.abs(new - lmbdas).max(), new
        if change < 1e-9:
            break
    return Buckets(_plain_numbers(edges), _plain_numbers(np.minimum(lmbdas, LARGEST_LMBDA)))


def fit_gate(
    features: np.ndarray,
    lm_log_prob: np.ndarray,
    knn_log_prob: np.ndarray,
    saved_searches: float = 0.0,
    seed: int = 0,
) -> Gate:
    """The likeliest gate: L-BFGS over all tokens at once, with a little weight decay.

    Parameters
    ----------
    features : float ``[n, len(FEATURES)]``.
    lm_log_prob, knn_log_prob : float ``[n]``, log p_LM and log p_kNN of the tokens that came.
    saved_searches : the fraction of searches to do without: the gate then sees the LM's features alone, and its
        threshold is that quantile of its weights.
    seed : of the hidden layer's start.
    """
    names = LM_FEATURES if saved_searches else FEATURES
    found = np.isfinite(features).all(axis=1)
    columns = [FEATURES.index(name) for name in names]
    inputs = log_scale(torch.from_numpy(features[found][:, columns]).double())
    mean, std = inputs.mean(dim=0), inputs.std(dim=0, correction=0).clamp(min=1e-6)
    inputs = (inputs - mean) / std
    lm = torch.from_numpy(lm_log_prob[found]).double()
    knn = torch.from_numpy(knn_log_prob[found]).double()

    parameters = _start_of_gate(len(names), seed)
    _maximise_likelihood(parameters, inputs, lm, knn)
    hidden_rows, hidden_bias, output, bias = (parameter.tolist() for parameter in parameters)
    gate = Gate(
        tuple(names),
        _plain_numbers(mean),
        _plain_numbers(std),
        tuple(_plain_numbers(row) for row in hidden_rows),
        _plain_numbers(hidden_bias),
        _plain_numbers(output),
        _plain_number(bias),
    )
    if not saved_searches:
        return gate
    weights = gate.before_threshold(torch.from_numpy(features))
    return replace(gate, threshold=float(np.quantile(weights.numpy(), saved_searches)))


def _start_of_gate(features: int, seed: int) -> list[Tensor]:
    """``gate_network``'s parameters that make it a constant weight: the hidden layer's outputs count for nothing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(HIDDEN_UNITS, features, generator=generator, dtype=torch.float64) / math.sqrt(features)
    parameters = [
        hidden,
        torch.zeros(HIDDEN_UNITS, dtype=torch.float64),
        torch.zeros(HIDDEN_UNITS, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    return parameters


def _maximise_likelihood(parameters: list[Tensor], inputs: Tensor, lm: Tensor, knn: Tensor) -> None:
    """Change a gate's parameters until tokens with these features ``[n, features]`` are likeliest."""
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=300, history_size=20, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        decay = sum(parameter.square().sum() for parameter in parameters[:3])
        value = gate_loss(gate_network(inputs, *parameters), lm, knn) + WEIGHT_DECAY * decay
        value.backward()
        return value

    optimiser.step(loss)


def gate_loss(lmbda: Tensor, lm_log_prob: Tensor, knn_log_prob: Tensor) -> Tensor:
    """Minus the mean log-probability of the mixture, per token; differentiable in ``lmbda`` ``[n]``."""
    larger = torch.maximum(lm_log_prob, knn_log_prob)
    lm, knn = (lm_log_prob - larger).exp(), (knn_log_prob - larger).exp()
    return -(larger + (lm + lmbda * (knn - lm)).log()).mean()


def _plain_number(number: Any) -> float:
    """To nine digits: all that float32 holds, and short in a file."""
    return float(f"{float(number):.9g}")


def _plain_numbers(numbers: Any) -> tuple[float, ...]:
    return tuple(_plain_number(number) for number in numbers)
