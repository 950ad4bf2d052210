"""The kNN-LM distribution and its mixture with the LM's (Khandelwal et al. 2020, equations 2 and 3).

    p_kNN(y) = sum over neighbours i with v_i = y of softmax(-d / T)_i
    p(y)     = (1 - lmbda) p_LM(y) + lmbda p_kNN(y)

All functions work on one block of ``n`` positions with ``k`` neighbours each; only ``mixed_log_probs`` builds a
table over the vocabulary for p_kNN. A neighbour slot that holds nothing has distance infinity. Where a position has no
neighbour at all there is no p_kNN (its logarithm is NaN), and the mixture is the LM's own distribution.

``Mixture`` is a setting of the two, a weight (see ``adaptive``) and a temperature, for all who mix with one setting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from knn_lm_eval.methods.adaptive import Weight

ROWS_AT_ONCE = 2**7  # whose weights stay in the processor's cache


class WeighedNeighbours(NamedTuple):
    """Neighbours of ``n`` positions: distances, log weights and values ``[n, k]``, on one device."""

    distances: Tensor
    log_weights: Tensor
    values: Tensor

    def of_rows(self, rows: slice | Tensor) -> WeighedNeighbours:
        """Those of some positions."""
        return WeighedNeighbours(*(part[rows] for part in self))


@dataclass(frozen=True)
class Mixture:
    """p(y) = (1 - lmbda) p_LM(y) + lmbda p_kNN(y), with one setting.

    Attributes
    ----------
    weight : lmbda, the same for all tokens or one for each.
    knn_temp : the temperature T of the softmax over distances.
    """

    weight: Weight
    knn_temp: float

    @property
    def is_lm_alone(self) -> bool:
        """Whether neighbours count for nothing, so that none need be found."""
        return self.weight.constant == 0

    def weigh(
        self, distances: Tensor, values: Tensor, counts: Tensor | None, device: torch.device
    ) -> WeighedNeighbours:
        """Neighbours as a search gives them, each with its share of p_kNN, on ``device``.

        Parameters
        ----------
        distances, counts : as for ``neighbour_log_weights``.
        values : integer ``[n, k]``.
        """
        distances, counts = distances.to(device), None if counts is None else counts.to(device)
        log_weights = neighbour_log_weights(distances, self.knn_temp, counts)
        return WeighedNeighbours(distances, log_weights, values.to(device))

    def lmbda(self, lm_part: Tensor | None, neighbours: WeighedNeighbours) -> float | Tensor:
        """The weight at each position: one number for all, or float32 ``[n]``.

        Parameters
        ----------
        lm_part : from ``weight.lm_features``.
        """
        return self.weight.of_tokens(lm_part, neighbours.distances, neighbours.values)


def neighbour_log_weights(distances: Tensor, temperature: float, counts: Tensor | None) -> Tensor:
    """log softmax(-d / T) over the neighbours, where each may count several times.

    Parameters
    ----------
    distances : float32 ``[n, k]``, the smaller the nearer; infinity for an empty slot.
    temperature : T > 0.
    counts : integer ``[n, k]``, 1 or more: a neighbour of count w weighs as much as w of count 1 at its place,
        at any temperature; None for 1 throughout. (He et al.'s code, which merges entries, takes w to the power
        of 1 / T. At T = 1 it is the same.)

    Returns
    -------
    float32 ``[n, k]``. A row without any neighbour is minus infinity throughout.
    """
    # The nearest distance is taken off before the division: distances of tens of thousands would otherwise
    # lose the digits that the softmax is about.
    nearest = distances.amin(dim=-1, keepdim=True)
    scores = (torch.where(torch.isinf(nearest), 0.0, nearest) - distances) / temperature
    if counts is not None:
        scores = scores + counts.log()
    normaliser = scores.logsumexp(dim=-1, keepdim=True)
    return scores - torch.where(torch.isinf(normaliser), 0.0, normaliser)


def knn_log_prob(log_weights: Tensor, values: Tensor, targets: Tensor) -> Tensor:
    """log p_kNN of one target per row: a masked logsumexp over the neighbours.

    Parameters
    ----------
    log_weights : float32 ``[n, k]`` from ``neighbour_log_weights``.
    values : integer ``[n, k]``, the neighbours' values.
    targets : integer ``[n]``.

    Returns
    -------
    float32 ``[n]``; minus infinity where no neighbour has the target as its value, NaN where there is no neighbour.
    """
    log_prob = log_weights.masked_fill(values != targets[:, None], -math.inf).logsumexp(dim=-1)
    return log_prob.masked_fill(nothing_found(log_weights), math.nan)


def nothing_found(log_weights: Tensor) -> Tensor:
    """Which positions have no neighbour at all: bool ``[n]``."""
    return torch.isneginf(log_weights.amax(dim=-1))


def mix(lm_log_prob: Tensor, knn_log_prob: Tensor, lmbda: float | Tensor) -> Tensor:
    """log((1 - lmbda) p_LM + lmbda p_kNN), elementwise, lmbda too; exact at lmbda 0 and 1.

    Where log p_kNN is NaN, there being no neighbour, it is log p_LM.
    """
    if isinstance(lmbda, Tensor):
        mixed = torch.logaddexp(lm_log_prob + torch.log1p(-lmbda), knn_log_prob + lmbda.log())
    elif lmbda == 0:
        return lm_log_prob
    elif lmbda == 1:
        mixed = knn_log_prob
    else:
        mixed = torch.logaddexp(lm_log_prob + math.log1p(-lmbda), knn_log_prob + math.log(lmbda))
    return torch.where(knn_log_prob.isnan(), lm_log_prob.to(mixed.dtype), mixed)


def take_rows(lmbda: float | Tensor, rows: Tensor) -> float | Tensor:
    """The weights at some positions, of ``Mixture.lmbda``'s."""
    return lmbda[rows] if isinstance(lmbda, Tensor) else lmbda


def mixed_log_probs(lm_log_probs: Tensor, log_weights: Tensor, values: Tensor, lmbda: float | Tensor) -> Tensor:
    """log p of every token of the vocabulary.

    Parameters
    ----------
    lm_log_probs : float32 ``[n, vocabulary]``, the LM's log-probabilities.
    log_weights, values : ``[n, k]``, as for ``knn_log_prob``.
    lmbda : a number, or one for each row, ``[n]``.

    Returns
    -------
    float32 ``[n, vocabulary]``.
    """
    values = values.long()
    lmbda = _share_by_row(log_weights, lmbda)[:, None].to(lm_log_probs.dtype)
    p_knn = torch.zeros_like(lm_log_probs).scatter_add_(-1, values, log_weights.exp()).gather(-1, values)
    # Logarithms are taken of the neighbours' values alone: all other tokens have the LM's share.
    of_values = mix(lm_log_probs.gather(-1, values), p_knn.log(), lmbda)  # [n, k]
    return (lm_log_probs + torch.log1p(-lmbda)).scatter_(-1, values, of_values)


def _share_by_row(log_weights: Tensor, lmbda: float | Tensor) -> Tensor:
    """The weight of p_kNN at each position, ``[n]``: 0 where there is no neighbour."""
    if not isinstance(lmbda, Tensor):
        lmbda = torch.full((len(log_weights),), lmbda, dtype=torch.float64, device=log_weights.device)
    return lmbda.masked_fill(nothing_found(log_weights), 0.0)


def greedy_tokens(lm_log_probs: Tensor, log_weights: Tensor, values: Tensor, lmbda: float | Tensor) -> Tensor:
    """The most probable token of the mixture for each row, the smallest id where several tie.

    Only the neighbours' distinct values can beat the LM's own best token, so only they are mixed.

    Parameters
    ----------
    lm_log_probs : ``[n, vocabulary]``, the LM's log-probabilities.
    log_weights, values : ``[n, k]``, as for ``knn_log_prob``.
    lmbda : a number, or one for each row, ``[n]``.

    Returns
    -------
    int64 ``[n]``.
    """
    lm_best, lm_best_token = lm_log_probs.max(dim=-1)
    if not isinstance(lmbda, Tensor) and lmbda == 0:
        return lm_best_token
    values, order = values.long().sort(dim=-1)
    # Weights are summed over runs of one value: differences of the running sum at the runs' ends. In float64,
    # since a difference of float32 sums would drown the small ones.
    running = log_weights.gather(-1, order).double().exp().cumsum(dim=-1)
    run_ends = torch.ones_like(values, dtype=torch.bool)
    run_ends[:, :-1] = values[:, 1:] != values[:, :-1]
    before = torch.zeros_like(running)
    before[:, 1:] = torch.where(run_ends, running, 0.0)[:, :-1].cummax(dim=-1).values
    knn_log_probs = torch.where(run_ends, running - before, 0.0).log()
    share = _share_by_row(log_weights, lmbda).double()
    mixed = mix(lm_log_probs.gather(-1, values).double(), knn_log_probs, share[:, None])
    mixed = mixed.masked_fill(~run_ends, -math.inf)
    best, slot = mixed.max(dim=-1)
    knn_best_token = values.gather(-1, slot[:, None])[:, 0]
    lm_only = lm_best.double() + torch.log1p(-share)
    knn_wins = (best > lm_only) | ((best == lm_only) & (knn_best_token < lm_best_token))
    return torch.where(knn_wins, knn_best_token, lm_best_token)


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
    float64 ``[n, knn_temp, k]``; minus infinity where no neighbour has the target as its value, NaN where there
    is no neighbour.
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
            result[rows, number] = (mass / total).log()  # 0 / 0 where there is no neighbour
    return result
