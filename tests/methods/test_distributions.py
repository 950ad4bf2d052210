"""Entropy and rank against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.methods.adaptive import lm_features
from knn_lm_eval.methods.distributions import entropies, ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(row: list[float], target: int) -> tuple[float, int]:
    entropy = -sum(math.exp(x) * x for x in row if x > -math.inf)
    return entropy, 1 + sum(x > row[target] for x in row)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 20),
    vocabulary=st.integers(1, 3000),
    scale=st.floats(0, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_entropy_and_rank_are_the_oracle_s(seed: int, rows: int, vocabulary: int, scale: float, dtype) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((rows, vocabulary)) * scale).to(dtype)
    logits[:, rng.random(vocabulary) < 0.1] = -math.inf
    logits[:, 0] = 1.0
    table = torch.log_softmax(logits, dim=-1)
    pairs = torch.from_numpy(rng.integers(0, rows, 2 * rows))
    targets = torch.from_numpy(rng.integers(0, vocabulary, 2 * rows))
    found, rank = entropies(table), ranks(table, pairs, targets)
    assert found.dtype == torch.float32 and rank.dtype == torch.int32
    plain = table.double().tolist()
    for i, (row, target) in enumerate(zip(pairs.tolist(), targets.tolist(), strict=True)):
        entropy, place = oracle(plain[row], target)
        assert float(found[row]) == pytest.approx(entropy, rel=1e-4, abs=1e-5)
        assert int(rank[i]) == place


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_gate_s_entropy(dtype: torch.dtype) -> None:
    table = torch.log_softmax((torch.randn(7, 5000) * 3).to(dtype), dim=-1)
    assert entropies(table).tolist() == pytest.approx(lm_features(table)[:, 1].tolist(), rel=1e-4)


def test_certainty_has_no_entropy_and_rank_1() -> None:
    row = torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]])
    assert entropies(row).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert ranks(row, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])).tolist() == [1, 2, 1]


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.log_softmax(torch.randn(100, 300), dim=-1)
    rows, targets = torch.arange(100), torch.randint(0, 300, (100,))
    alone = entropies(table), ranks(table, rows, targets)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, other in zip(alone, (entropies(table), ranks(table, rows, targets)), strict=True):
        assert torch.equal(one, other)
