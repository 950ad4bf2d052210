"""How much of the scored text stands in the datastore word for word, and the perplexity of what does and does not.

A token's overlap is how many tokens, it and those right before it, stand in the datastore as they do in the text. 8, 13
and 32 are what decontamination usually asks for (13: Brown et al. 2020).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from knn_lm_eval.report.record_files import NOT_KNOWN, Records
from knn_lm_eval.report.tables import WARNING
from knn_lm_eval.report.token_analysis import Draws, Units, mean_of

BELOW = (8, 13, 32)
FROM = (0, 1, 2, 3, 5, *BELOW)
LONG_RUN = 13  # tokens
LARGEST = 700.0  # logarithm that is no infinity, which JSON has not
MOST_IN_RUNS = 0.02  # of the scored tokens, before it is warned of


def leakage(records: Records, units: Units, draws: Draws) -> dict[str, Any] | None:
    """Perplexity against overlap; None where overlaps were not measured.

    Returns
    -------
    ``share_in_runs``: of the scored tokens, those that stand in the datastore within a run of ``LONG_RUN`` tokens or
    more. ``below``: of all tokens, and of those with overlaps below certain lengths, and ``cells``: with overlaps of
    certain lengths: ``label``, ``from`` (the shortest), ``tokens``, ``share``, and ``lm_perplexity`` and ``perplexity``
    with their intervals; None where a token was impossible, or of no tokens.
    """
    overlap = records.columns["overlap"]
    known = overlap != NOT_KNOWN
    if not known.any():
        return None
    in_runs = within_long_runs(records) & known
    losses = {name: -records.columns[name].astype(np.float64) for name in ("lm_log_prob", "log_prob")}
    least = np.where(known, overlap, -1)

    def cell(label: str, low: int, high: float) -> dict[str, Any]:
        mask = (least >= low) & (least < high)
        return {
            "label": label,
            "from": low,
            "tokens": int(mask.sum()),
            "share": float(mask.sum() / known.sum()),
            "lm_perplexity": _perplexity(losses["lm_log_prob"], mask, units, draws),
            "perplexity": _perplexity(losses["log_prob"], mask, units, draws),
        }

    edges = [*itertools.pairwise(FROM), (FROM[-1], math.inf)]
    return {
        "run": LONG_RUN,
        "share_in_runs": float(in_runs.sum() / known.sum()),
        "below": [cell("all", 0, math.inf), *(cell(f"below {most}", 0, most) for most in BELOW)],
        "cells": [cell(_range(low, high), low, high) for low, high in edges],
    }


def within_long_runs(records: Records) -> np.ndarray:
    """Which tokens stand in the datastore within a run of ``LONG_RUN`` tokens or more, bool ``[tokens]``.

    Of a log-likelihood the run may begin in the context.
    """
    columns = records.columns
    of_text = [columns[name] for name in ("task", "document", "request")]
    begins = np.ones(len(records), dtype=bool)
    begins[1:] = np.any([part[1:] != part[:-1] for part in of_text], axis=0)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(records)), 0))  # of each token's text
    (ends,) = np.nonzero(columns["overlap"] >= LONG_RUN)
    change = np.zeros(len(records) + 1, dtype=np.int64)
    np.add.at(change, np.maximum(ends + 1 - columns["overlap"][ends].astype(np.int64), first[ends]), 1)
    np.add.at(change, ends + 1, -1)
    return np.cumsum(change[:-1]) > 0


def leakage_warning(method: dict[str, Any]) -> str | None:
    """What to do where much of the scored text stands in the datastore of an analysed method; None where it is well."""
    of_method = method["leakage"]
    excluded = method["settings"].get("exclude_overlap")
    if of_method is None or of_method["share_in_runs"] <= MOST_IN_RUNS or (excluded or math.inf) <= LONG_RUN:
        return None
    return (
        f"{WARNING}: {of_method['share_in_runs']:.1%} of the tokens that {method['name']} scored stand in the store "
        f"within runs of {LONG_RUN} or more tokens, so that it was evaluated on what it has seen: evaluate with "
        f"exclude_overlap={LONG_RUN}, or take those documents out with remove_documents."
    )


def _range(low: int, high: float) -> str:
    if high == math.inf:
        return f"{low} and more"
    return f"{low}" if high == low + 1 else f"{low} to {high - 1:g}"


def _perplexity(losses: np.ndarray, mask: np.ndarray, units: Units, draws: Draws) -> dict[str, float | None] | None:
    """Per token, with its interval."""
    if not np.isfinite(losses[mask]).all():
        return None
    figure = mean_of(losses, mask, units, draws)
    return (
        None
        if figure is None
        else {name: None if of is None else math.exp(min(of, LARGEST)) for name, of in figure.items()}
    )
