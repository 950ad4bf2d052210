"""The choice of the probe: bigrams in the LM's place, and costs in perplexity with an interval."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stores import make_store

from knn_lm_eval.search import probe_choice
from knn_lm_eval.search.probe_choice import PRIOR, SMOOTHING, add_costs, bigram_log_probs, good_enough


def test_bigrams_are_counted_without_the_entry_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", count=300)
    monkeypatch.setattr(probe_choice, "VALUES_AT_ONCE", 70)
    values, entries = store.values.tolist(), np.array([0, 5, 69, 70, 299])
    size = max(values) + 1
    for entry, log_p in zip(entries.tolist(), bigram_log_probs(store, entries).tolist(), strict=True):
        others = [number for number in range(300) if number != entry]
        before = [values[max(number - 1, 0)] for number in range(300)]
        frequency = sum(values[number] == values[entry] for number in others) + SMOOTHING
        frequency /= 299 + SMOOTHING * size
        same = [number for number in others if before[number] == before[entry]]
        after = sum(values[number] == values[entry] for number in same)
        assert log_p == pytest.approx(math.log((after + PRIOR * frequency) / (len(same) + PRIOR)))


def test_a_probe_is_enough_where_its_cost_is_surely_small() -> None:
    """A p_kNN that is wrong on average by little may cost much: what counts is log p."""
    rng = np.random.default_rng(0)
    largest = torch.from_numpy(rng.standard_normal(4096))
    losses = [rng.standard_normal(4096) * 0.1 + 0.03, rng.standard_normal(4096) * 2, rng.standard_normal(4096) * 0.05]
    rows = [{"probe": probe} for probe in (1, 2, 4, 8)]
    add_costs(rows, [largest - torch.from_numpy(loss) for loss in losses] + [largest])
    for row, loss in zip(rows, losses, strict=False):
        bound = loss.mean() + 1.645 * loss.std(ddof=1) / 64
        assert row["perplexity_cost"] == pytest.approx(math.expm1(loss.mean()), abs=1e-4)
        assert row["perplexity_cost_bound"] == pytest.approx(math.expm1(bound), abs=1e-4)
    assert rows[3]["perplexity_cost_bound"] == 0
    assert good_enough(rows) == 4  # 1 costs 3 %, 2 perhaps nothing, perhaps much
    assert good_enough(rows[:1]) == 1 and good_enough([{"probe": None}]) is None
