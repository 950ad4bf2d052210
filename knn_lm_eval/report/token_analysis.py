"""What retrieval brought to which tokens: figures of token records, as JSON.

A token's gain is log p - log p_LM in nats: it is helped where that is above 0, and hurt where it is below. Every mean
has an interval over documents; of a single document, over blocks of consecutive tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knn_lm_eval.report.binning import Binned
from knn_lm_eval.report.intervals import BLOCKS_AS_UNITS, mean_interval
from knn_lm_eval.report.record_files import Records

CURVE_POINTS = 20
MOST_OF_THE_GAIN = 0.9
RESAMPLES = 2000


@dataclass(frozen=True)
class Draws:
    """How intervals are drawn, as for ``mean_interval``."""

    resamples: int = RESAMPLES
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Units:
    """What intervals are over.

    Attributes
    ----------
    name : ``documents`` or ``blocks of consecutive tokens``.
    of_token : int64 ``[tokens]``, each token's unit.
    count : of units.
    documents : of documents.
    """

    name: str
    of_token: np.ndarray
    count: int
    documents: int


def units_of(records: Records) -> Units:
    """The documents; blocks of about equally many tokens where there is one alone."""
    task, document = records.columns["task"], records.columns["document"]
    begins = np.ones(len(records), dtype=bool)
    begins[1:] = (task[1:] != task[:-1]) | (document[1:] != document[:-1])
    documents = np.cumsum(begins) - 1
    count = int(begins.sum())
    if count > 1:
        return Units("documents", documents, count, count)
    blocks = min(BLOCKS_AS_UNITS, len(records))
    return Units("blocks of consecutive tokens", np.arange(len(records)) * blocks // len(records), blocks, count)


def gains_of(records: Records) -> np.ndarray:
    """log p - log p_LM of each token, float64 ``[tokens]``; 0 where both are minus infinity."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(
            records.columns["log_prob"].astype(np.float64) - records.columns["lm_log_prob"],
            nan=0.0,
            posinf=math.inf,
            neginf=-math.inf,
        )


def analyse_method(
    name: str, records: Records, binnings: Sequence[Binned], units: Units, draws: Draws
) -> dict[str, Any]:
    """All figures of one method's records."""
    gains = gains_of(records)
    everything = np.ones(len(gains), dtype=bool)
    lm, log_prob = (records.columns[name].astype(np.float64) for name in ("lm_log_prob", "log_prob"))
    summary = cell("all tokens", everything, gains, units, draws)
    summary |= {"lm_perplexity": _perplexity(lm), "perplexity": _perplexity(log_prob)}
    summary["searched"] = float(records.columns["searched"].mean())
    return {
        "name": name,
        "folder": str(records.folder),
        "settings": records.about["settings"],
        "datastore": records.about["datastore"],
        "summary": summary,
        "concentration": concentration(gains),
        "by": {
            binned.name: {
                "title": binned.title,
                "cells": [
                    cell(label, binned.bin_of == number, gains, units, draws)
                    for number, label in enumerate(binned.labels)
                    if (binned.bin_of == number).any()
                ],
            }
            for binned in binnings
        },
    }


def cell(label: str, mask: np.ndarray, gains: np.ndarray, units: Units, draws: Draws) -> dict[str, Any]:
    """The figures of some tokens.

    Parameters
    ----------
    mask : bool ``[tokens]``, which.
    gains : float64 ``[tokens]``; infinite ones are counted, and no part of means.
    """
    finite = mask & np.isfinite(gains)
    total = float(gains[np.isfinite(gains)].sum())
    return {
        "label": label,
        "tokens": int(mask.sum()),
        "share": float(mask.mean()),
        "infinite": int((mask & ~np.isfinite(gains)).sum()),
        "helped": mean_of((gains > 0).astype(np.float64), mask, units, draws),
        "hurt": mean_of((gains < 0).astype(np.float64), mask, units, draws),
        "gain": mean_of(gains, finite, units, draws),
        "gain_of_helped": mean_of(gains, finite & (gains > 0), units, draws),
        "gain_of_hurt": mean_of(gains, finite & (gains < 0), units, draws),
        "share_of_gain": float(gains[finite].sum()) / total if total else None,
    }


def paired_difference(
    ours: np.ndarray, first: np.ndarray, units: Units, draws: Draws
) -> dict[str, float | None] | None:
    """How much larger a method's mean gain is than the first one's, of the same tokens; None where one is infinite."""
    difference = ours - first
    return mean_of(difference, np.isfinite(difference), units, draws)


def concentration(gains: np.ndarray) -> dict[str, Any]:
    """On how few tokens the gain falls, and the loss.

    Returns
    -------
    ``share_of_tokens``: the least share of all tokens whose gains make 90 % of the sum of gains above 0;
    ``share_of_tokens_lost``: the same of losses; None where there are none. ``curve``: [share of tokens, sum of their
    gains per token of all], the largest gains first: it rises to all that was gained, and falls to what is left.
    """
    finite = gains[np.isfinite(gains)]
    if not len(finite):
        return {"share_of_tokens": None, "share_of_tokens_lost": None, "curve": []}
    descending = np.sort(finite)[::-1]
    running = np.cumsum(descending) / len(finite)
    places = np.unique(np.ceil(np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS * len(finite)).astype(int))
    curve = [[0.0, 0.0]] + [[place / len(finite), float(running[place - 1])] for place in places.tolist()]
    return {
        "share_of_tokens": _fewest(descending, len(finite)),
        "share_of_tokens_lost": _fewest(-descending[::-1], len(finite)),
        "curve": curve,
    }


def _fewest(descending: np.ndarray, count: int) -> float | None:
    """The share of ``count`` tokens that makes most of the sum of those above 0."""
    above = descending[descending > 0]
    if not len(above):
        return None
    running = np.cumsum(above)
    return (int(np.searchsorted(running, MOST_OF_THE_GAIN * running[-1] * (1 - 1e-12))) + 1) / count


def mean_of(values: np.ndarray, mask: np.ndarray, units: Units, draws: Draws) -> dict[str, float | None] | None:
    """The mean of some tokens' values and its interval over units; None of no tokens."""
    if not mask.any():
        return None
    of_unit = units.of_token[mask]
    sums = np.bincount(of_unit, weights=values[mask], minlength=units.count)
    counts = np.bincount(of_unit, minlength=units.count)
    interval = mean_interval(
        np.column_stack([sums, counts]).astype(np.float64), draws.resamples, draws.confidence, draws.seed
    )
    mean = float(values[mask].mean())
    if interval is None:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": interval[1], "high": interval[2]}


def _perplexity(log_probs: np.ndarray) -> float | None:
    """Per token; None where a token was impossible."""
    return math.exp(-float(log_probs.mean())) if np.isfinite(log_probs).all() else None
