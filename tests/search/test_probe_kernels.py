"""What neighbours say of a token at many temperatures, beside the definition in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from faiss.contrib.evaluation import knn_intersection_measure
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.search.probe_kernels import weigh
from knn_lm_eval.search.quality import _share_found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1e-3, 1.0, 1e4]), st.sampled_from([0.0, -500.0, 3e4]))
def test_weights_are_those_of_the_definition(seed: int, weighted: bool, spread: float, common: float) -> None:
    rng = np.random.default_rng(seed)
    count, n, slots, steps = 30, 4, int(rng.integers(1, 12)), 10
    k, temperature = int(rng.integers(1, slots + 1)), spread * float(rng.uniform(0.1, 3))
    values = rng.integers(0, 3, count).astype(np.int32)
    counts = rng.integers(1, 9, count).astype(np.int32) if weighted else np.empty(0, dtype=np.int32)
    entries = np.stack([rng.permutation(count)[:slots] for _ in range(n)])
    distances = np.sort(common + spread * rng.random((n, slots)), axis=1).astype(np.float32)
    there = rng.integers(0, slots + 1, n)
    entries[np.arange(slots) >= there[:, None]], distances[np.arange(slots) >= there[:, None]] = -1, np.inf
    own, targets = entries[:, 0].copy(), rng.integers(0, 3, n).astype(np.int32)
    own[rng.random(n) < 0.5] = count - 1
    totals, of_targets = np.empty((2, n, steps))
    weigh(distances, entries, own, values, counts, targets, k, temperature, totals, of_targets)
    for i in range(n):
        found = [(float(d), e) for d, e in zip(distances[i], entries[i], strict=True) if e >= 0 and e != own[i]][:k]
        for step in range(steps):
            weights = [math.exp((found[0][0] - d) / (temperature / 2**step)) for d, _ in found]
            weights = [w * (counts[e] if weighted else 1) for w, (_, e) in zip(weights, found, strict=True)]
            matching = [w for w, (_, e) in zip(weights, found, strict=True) if values[e] == targets[i]]
            assert totals[i, step] == pytest.approx(sum(weights), rel=1e-9)
            assert of_targets[i, step] == pytest.approx(sum(matching), rel=1e-9, abs=1e-300)


def test_the_share_that_was_found_is_that_of_distinct_entries() -> None:
    rng = np.random.default_rng(0)
    exact = np.stack([rng.permutation(40)[:12] for _ in range(50)])
    found = np.stack([rng.permutation(40)[:12] for _ in range(50)])
    found[rng.random(found.shape) < 0.2] = -1
    assert _share_found(exact, found) == pytest.approx(knn_intersection_measure(exact, found))
    assert _share_found(exact, exact) == 1
