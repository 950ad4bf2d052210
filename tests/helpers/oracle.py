"""The kNN-LM written from the paper, in float64 and plain loops: slow, dense and obvious."""

from __future__ import annotations

import math

import numpy as np
import torch


def knn_distribution(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    k: int,
    temperature: float,
    vocabulary: int,
    dot: bool,
) -> np.ndarray:
    """p_kNN over the vocabulary, by brute force (equation 2 of Khandelwal et al. 2020)."""
    query, keys = query.astype(np.float64), keys.astype(np.float64)
    distances = -(keys @ query) if dot else ((keys - query) ** 2).sum(axis=1)
    nearest = np.argsort(distances, kind="stable")[:k]
    return mixture_weights(distances[nearest], values[nearest], temperature, vocabulary)


def mixture_weights(distances: np.ndarray, values: np.ndarray, temperature: float, vocabulary: int) -> np.ndarray:
    """p_kNN over the vocabulary from given neighbours."""
    p = np.zeros(vocabulary)
    smallest = min(distances)
    total = sum(math.exp(-(d - smallest) / temperature) for d in distances)
    for distance, value in zip(distances, values, strict=True):
        p[value] += math.exp(-(distance - smallest) / temperature) / total
    return p


def lm_outputs(model: torch.nn.Module, key_module: torch.nn.Module, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The LM's probabilities and the input of ``key_module`` at each position, one unpadded window."""
    captured = []
    handle = key_module.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append((args or list(kwargs.values()))[0].detach()), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    handle.remove()
    return torch.softmax(logits.double(), -1).numpy(), captured[0].reshape(len(tokens), -1).float().numpy()


def knn_lm_distributions(
    model: torch.nn.Module,
    key_module: torch.nn.Module,
    tokens: list[int],
    keys: np.ndarray,
    values: np.ndarray,
    *,
    k: int,
    lmbda: float,
    temperature: float,
    dot: bool = False,
    directions: np.ndarray | None = None,
) -> np.ndarray:
    """p(y) after each of ``tokens``: ``[len(tokens), vocabulary]`` (equation 3); queries go along ``directions``."""
    p_lm, queries = lm_outputs(model, key_module, tokens)
    if directions is not None:
        queries = queries.astype(np.float64) @ directions
    p_knn = [knn_distribution(q, keys, values, k, temperature, p_lm.shape[1], dot) for q in queries]
    return (1 - lmbda) * p_lm + lmbda * np.array(p_knn)


def continuation_score(distributions: np.ndarray, continuation: list[int]) -> tuple[float, bool]:
    """log p of a continuation whose tokens the last rows of ``distributions`` predict, and whether it is greedy."""
    rows = distributions[len(distributions) - len(continuation) :]
    with np.errstate(divide="ignore"):
        log_prob = sum(float(np.log(row[token])) for row, token in zip(rows, continuation, strict=True))
    return log_prob, all(int(np.argmax(row)) == token for row, token in zip(rows, continuation, strict=True))
