"""The weight lmbda of p_kNN: one number, or one that differs from token to token.

``Buckets`` (Drozdov et al. 2022) has a weight per range of nearest-neighbour distances. ``Gate`` (He et al. 2021)
computes it from features of the LM's distribution and of the neighbours, with one hidden layer; with a threshold
it looks at the LM alone, and where it gives retrieval less than the threshold no search is made.

Both are fitted by maximum likelihood of the mixture on validation text (in study/fitting.py), and both are plain
numbers in a file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knn_lm_eval.errors import UserError

LM_FEATURES = ("confidence", "entropy")
NEIGHBOUR_FEATURES = ("nearest", "mean_of_8", "distinct_in_8", "distinct_in_64")
FEATURES = LM_FEATURES + NEIGHBOUR_FEATURES
# A weight of 1 would make a token that no neighbour has impossible, however little text said so.
LARGEST_LMBDA = 0.999


class Weight(ABC):
    """How much p_kNN weighs in the mixture, token by token.

    Attributes
    ----------
    features : the names, from ``FEATURES``, of what it looks at.
    threshold : where the weight is smaller, no search is made; None searches everywhere.
    """

    features: tuple[str, ...]
    threshold: float | None

    @abstractmethod
    def __call__(self, features: Tensor) -> Tensor:
        """The weights, float32 ``[n]``, from features ``[n, len(FEATURES)]``."""

    @abstractmethod
    def plain(self) -> float | dict[str, Any]:
        """As it stands in a params file: what ``read_weight`` takes."""

    @property
    def constant(self) -> float | None:
        """The weight where it is the same for all tokens, else None."""
        return None

    def lm_features(self, log_probs: Tensor) -> Tensor | None:
        """``LM_FEATURES`` of the LM's distributions ``[n, vocabulary]``, where it looks at them; else None."""
        return lm_features(log_probs) if set(self.features) & set(LM_FEATURES) else None

    def wants_search(self, lm_part: Tensor | None) -> Tensor | None:
        """Where retrieval is worth a search, bool ``[n]``; None is everywhere.

        Parameters
        ----------
        lm_part : from ``lm_features``.
        """
        if self.threshold is None:
            return None
        assert lm_part is not None, "a weight with a threshold looks at the LM"
        return self(torch.nn.functional.pad(lm_part, (0, len(NEIGHBOUR_FEATURES)))) > 0

    def of_tokens(self, lm_part: Tensor | None, distances: Tensor, values: Tensor) -> float | Tensor:
        """The weight at each position: a number where it is the same for all, else float32 ``[n]``.

        A position without neighbours (none found, or not searched) is the LM's alone.

        Parameters
        ----------
        lm_part : from ``lm_features``.
        distances, values : ``[n, k]``, on the same device; infinity in empty slots.
        """
        neighbour_part = neighbour_features(distances, values)  # [n, 4]
        if lm_part is None:
            lm_part = torch.zeros(len(distances), len(LM_FEATURES), device=distances.device)
        nothing_found = torch.isinf(neighbour_part[:, 0])
        return torch.where(
            nothing_found, 0.0, self(torch.cat([lm_part, neighbour_part], dim=-1).nan_to_num(posinf=0.0))
        )


@dataclass(frozen=True)
class Constant(Weight):
    """The same weight for every token (Khandelwal et al. 2020)."""

    value: float

    features = ()
    threshold = None

    def __call__(self, features: Tensor) -> Tensor:
        """The weights, float32 ``[n]``, from features ``[n, len(FEATURES)]``."""
        return torch.full((len(features),), self.value, device=features.device)

    @property
    def constant(self) -> float:
        """The weight."""
        return self.value

    def of_tokens(self, lm_part: Tensor | None, distances: Tensor, values: Tensor) -> float:
        """The weight, whatever there is."""
        return self.value

    def plain(self) -> float:
        """As it stands in a params file."""
        return self.value


@dataclass(frozen=True)
class Buckets(Weight):
    """A weight per range of nearest-neighbour distances.

    Attributes
    ----------
    edges : ascending distances; a bucket reaches from its edge (included) to the next.
    lmbdas : one weight more than there are edges.
    """

    edges: tuple[float, ...]
    lmbdas: tuple[float, ...]

    features = ("nearest",)
    threshold = None

    def __call__(self, features: Tensor) -> Tensor:
        """The weights, float32 ``[n]``, from features ``[n, len(FEATURES)]``."""
        edges = torch.tensor(self.edges, dtype=torch.float32, device=features.device)
        lmbdas = torch.tensor(self.lmbdas, dtype=torch.float32, device=features.device)
        nearest = features[:, FEATURES.index("nearest")].float().contiguous()
        return lmbdas[torch.bucketize(nearest, edges, right=True)]

    def plain(self) -> dict[str, Any]:
        """As it stands in a params file."""
        return {"kind": "buckets", "edges": list(self.edges), "lmbdas": list(self.lmbdas)}


@dataclass(frozen=True)
class Gate(Weight):
    """A weight from a network with one hidden layer: ``sigmoid(output · tanh(hidden x + hidden_bias) + bias)``.

    x are the features on a logarithmic scale, standardised.

    Attributes
    ----------
    features : names from ``FEATURES``.
    mean, std : of the features on that scale, ``[features]``.
    hidden : ``[units][features]``.
    hidden_bias, output : ``[units]``.
    bias : a number.
    threshold : where the weight is smaller, no search is made; None searches everywhere.
    """

    features: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hidden: tuple[tuple[float, ...], ...]
    hidden_bias: tuple[float, ...]
    output: tuple[float, ...]
    bias: float
    threshold: float | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """The weights, float32 ``[n]``, from features ``[n, len(FEATURES)]``; 0 below the threshold."""
        weights = self.before_threshold(features)
        if self.threshold is not None:
            weights = torch.where(weights < self.threshold, 0.0, weights)
        return weights.float()

    def before_threshold(self, features: Tensor) -> Tensor:
        """The network's weights, float64 ``[n]``."""
        inputs = log_scale(features[:, [FEATURES.index(name) for name in self.features]].double())

        def tensor(numbers: Any) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64, device=inputs.device)

        return gate_network(
            (inputs - tensor(self.mean)) / tensor(self.std),
            tensor(self.hidden),
            tensor(self.hidden_bias),
            tensor(self.output),
            tensor(self.bias),
        )

    def plain(self) -> dict[str, Any]:
        """As it stands in a params file."""
        return {
            "kind": "gate",
            "features": list(self.features),
            "mean": list(self.mean),
            "std": list(self.std),
            "hidden": [list(row) for row in self.hidden],
            "hidden_bias": list(self.hidden_bias),
            "output": list(self.output),
            "bias": self.bias,
            "threshold": self.threshold,
        }


def read_weight(plain: Any) -> Weight:
    """The weight that a number, or an adaptive weight's plain form, stands for.

    Raises
    ------
    UserError
        Where it is neither a number from 0 to 1 nor a well-formed adaptive weight.
    """
    if isinstance(plain, dict):
        try:
            if plain["kind"] == "buckets":
                return _read_buckets(plain)
            if plain["kind"] == "gate":
                return _read_gate(plain)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The adaptive lmbda is malformed ({error!r}); tune it again.") from error
        raise UserError(f"The adaptive lmbda is of the unknown kind {plain['kind']!r}; this program has buckets, gate.")
    if isinstance(plain, bool) or not isinstance(plain, (int, float)):
        raise UserError(f"lmbda={plain!r} is not a number.")
    if not 0 <= plain <= 1:
        raise UserError(f"lmbda={plain} is not between 0 and 1.")
    return Constant(float(plain))


def lm_features(log_probs: Tensor) -> Tensor:
    """``LM_FEATURES`` of the LM's distributions: the log-probability of the likeliest token, and the entropy (nats).

    Parameters
    ----------
    log_probs : ``[n, vocabulary]``.

    Returns
    -------
    float32 ``[n, 2]``.
    """
    log_probs = log_probs.float()
    # A token that cannot be has log-probability minus infinity, and no share of the entropy.
    entropy = -log_probs.exp().mul_(log_probs).nan_to_num_(0.0).sum(dim=-1)
    return torch.stack([log_probs.amax(dim=-1), entropy], dim=-1)


def neighbour_features(distances: Tensor, values: Tensor) -> Tensor:
    """``NEIGHBOUR_FEATURES``: the smallest distance, the mean of the 8 smallest, and how many values the nearest have.

    Parameters
    ----------
    distances : ``[n, k]``; infinity in empty slots.
    values : int ``[n, k]``.

    Returns
    -------
    float32 ``[n, 4]``; distances of infinity where there is no neighbour at all.
    """
    nearest, slots = distances.topk(min(64, distances.shape[1]), dim=-1, largest=False)
    found = ~torch.isinf(nearest)
    few = nearest[:, :8]
    mean = few.masked_fill(~found[:, :8], 0.0).sum(dim=-1) / found[:, :8].sum(dim=-1)
    # Empty slots become a value of their own, which is not counted.
    theirs = values.gather(-1, slots).masked_fill(~found, -1)
    distinct = []
    for count in (8, 64):
        some = theirs[:, :count].sort(dim=-1).values
        distinct.append((some[:, 1:] != some[:, :-1]).sum(dim=-1) + 1 - (some[:, 0] == -1).long())
    return torch.stack([nearest[:, 0], mean.nan_to_num(math.inf), *distinct], dim=-1).float()


def gate_network(inputs: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor, bias: Tensor) -> Tensor:
    """A gate's weights, ``[n]``, from standardised features ``[n, features]``; differentiable in all parameters."""
    return LARGEST_LMBDA * torch.sigmoid(torch.tanh(inputs @ hidden.T + hidden_bias) @ output + bias)


def log_scale(features: Tensor) -> Tensor:
    """Logarithmic on both sides of 0: inner products and log-probabilities are negative."""
    return features.sign() * features.abs().log1p()


def _read_buckets(plain: dict[str, Any]) -> Buckets:
    buckets = Buckets(_numbers(plain["edges"]), _numbers(plain["lmbdas"]))
    if len(buckets.lmbdas) != len(buckets.edges) + 1:
        raise ValueError(f"{len(buckets.edges)} edges need {len(buckets.edges) + 1} lmbdas")
    if list(buckets.edges) != sorted(buckets.edges):
        raise ValueError("edges must ascend")
    if not all(0 <= lmbda <= 1 for lmbda in buckets.lmbdas):
        raise ValueError("lmbdas must be between 0 and 1")
    return buckets


def _read_gate(plain: dict[str, Any]) -> Gate:
    features = tuple(plain["features"])
    if unknown := set(features) - set(FEATURES):
        raise ValueError(f"unknown features {sorted(unknown)}")
    threshold = plain["threshold"]
    if threshold is not None and not set(features) <= set(LM_FEATURES):
        raise ValueError("a gate with a threshold can only have the LM's features")
    gate = Gate(
        features,
        _numbers(plain["mean"]),
        _numbers(plain["std"]),
        tuple(_numbers(row) for row in plain["hidden"]),
        _numbers(plain["hidden_bias"]),
        _numbers(plain["output"]),
        _numbers([plain["bias"]])[0],
        None if threshold is None else _numbers([threshold])[0],
    )
    units = len(gate.hidden)
    if not (
        len(gate.mean) == len(gate.std) == len(features)
        and all(len(row) == len(features) for row in gate.hidden)
        and len(gate.hidden_bias) == len(gate.output) == units
        and all(std > 0 for std in gate.std)
    ):
        raise ValueError("its numbers do not fit together")
    return gate


def _numbers(numbers: Any) -> tuple[float, ...]:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a number")
    return tuple(float(number) for number in numbers)
