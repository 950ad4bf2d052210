"""Fitting an lmbda per token: against scipy and known truths; and the sample of tokens that it is fitted to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from knn_lm_eval.methods.adaptive import FEATURES, LM_FEATURES, read_weight
from knn_lm_eval.study.fitting import Sample, fit_buckets, fit_gate, gate_loss


def synthetic(n: int = 4000, seed: int = 0, lm_knows: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, and log p of the LM and of the neighbours, which know more the nearer they are."""
    random = np.random.default_rng(seed)
    features = np.abs(random.normal(size=(n, len(FEATURES)))) * 10
    nearest = features[:, FEATURES.index("nearest")]
    good = random.random(n) < np.exp(-nearest / 10)
    knn = np.where(good, random.uniform(0.5, 1.0, n), random.uniform(0.0, 0.02, n))
    lm = random.uniform(0.01, 0.5, n)
    if lm_knows:
        lm /= 1 + features[:, FEATURES.index("confidence")]
    return features, np.log(lm), np.log(np.maximum(knn, 1e-300))


def test_em_finds_each_buckets_maximum() -> None:
    features, lm, knn = synthetic()
    nearest = features[:, FEATURES.index("nearest")]
    knn[:50] = -np.inf  # no neighbour has the token
    buckets = fit_buckets(nearest, lm, knn, 8)
    assert len(buckets.lmbdas) == 8
    assert np.histogram(nearest, [-np.inf, *buckets.edges, np.inf])[0] == pytest.approx(len(lm) / 8, abs=2)
    place = np.searchsorted(np.array(buckets.edges, dtype=np.float32), nearest.astype(np.float32), side="right")
    for bucket, lmbda in enumerate(buckets.lmbdas):
        p_lm, p_knn = np.exp(lm[place == bucket]), np.exp(knn[place == bucket])

        def loss(x: float, p_lm=p_lm, p_knn=p_knn) -> float:  # with the one token for the LM
            return -np.log((1 - x) * p_lm + x * p_knn).sum() - math.log(1 - x)

        assert lmbda == pytest.approx(minimize_scalar(loss, bounds=(0, 1), options={"xatol": 1e-9}).x, abs=1e-5)
    assert sorted(buckets.lmbdas, reverse=True)[:3] == list(buckets.lmbdas[:3])  # near neighbours count for more
    through = buckets(torch.from_numpy(features))
    assert through.numpy() == pytest.approx(np.array(buckets.lmbdas)[place], rel=1e-6)


def test_equal_distances_and_missing_neighbours_make_no_bucket() -> None:
    nearest = np.array([0.0] * 50 + [np.inf] * 10)
    buckets = fit_buckets(nearest, np.full(60, -2.0), np.full(60, -1.0), 8)
    assert len(buckets.lmbdas) <= 2 and all(0 <= lmbda < 1 for lmbda in buckets.lmbdas)


def test_the_gate_recovers_a_dependence() -> None:
    features, lm, knn = synthetic()
    gate = fit_gate(features, lm, knn)

    def loss(weights: torch.Tensor) -> float:
        return float(gate_loss(weights.double(), torch.from_numpy(lm), torch.from_numpy(knn)))

    constant = min(loss(torch.full((len(lm),), float(x))) for x in np.linspace(0.01, 0.99, 99))
    truth = np.exp(-features[:, FEATURES.index("nearest")] / 10)
    fitted = gate(torch.from_numpy(features))
    assert loss(fitted) < constant - 0.03
    assert loss(fitted) < loss(torch.from_numpy(truth).clamp(0.001, 0.999)) + 0.005
    assert np.corrcoef(fitted.numpy(), truth)[0, 1] > 0.95
    # On text that it has not seen, too.
    features, lm, knn = synthetic(seed=1)
    assert loss(gate(torch.from_numpy(features))) < constant - 0.03
    assert fit_gate(*synthetic()) == gate  # the same numbers again
    assert fit_gate(*synthetic(), seed=1) != gate
    assert read_weight(gate.plain()) == gate


def test_the_gates_loss_is_the_mixtures_and_so_is_its_gradient() -> None:
    random = np.random.default_rng(0)
    lm, knn = np.log(random.random(9)), np.log(random.random(9))
    knn[3], lm[4] = -np.inf, -800.0  # below float64's smallest number
    lmbda = torch.from_numpy(random.uniform(0.1, 0.9, 9)).requires_grad_()
    loss = gate_loss(lmbda, torch.from_numpy(lm), torch.from_numpy(knn))
    x = lmbda.detach().numpy()
    assert loss.item() == pytest.approx(-np.logaddexp(np.log1p(-x) + lm, np.log(x) + knn).mean())
    loss.backward()
    p = (1 - x) * np.exp(lm) + x * np.exp(knn)
    assert lmbda.grad.numpy() == pytest.approx(-(np.exp(knn) - np.exp(lm)) / p / 9)
    assert torch.autograd.gradcheck(lambda y: gate_loss(y, torch.from_numpy(lm), torch.from_numpy(knn)), lmbda)


def test_a_threshold_saves_the_fraction_asked_for() -> None:
    features, lm, knn = synthetic(lm_knows=True)
    gate = fit_gate(features, lm, knn, saved_searches=0.3)
    assert gate.features == LM_FEATURES
    weights = gate(torch.from_numpy(features))
    assert float((weights == 0).double().mean()) == pytest.approx(0.3, abs=0.001)
    assert float(weights[weights > 0].min()) >= np.float32(gate.threshold)


def test_memory_does_not_grow_with_the_text_and_the_sample_is_uniform() -> None:
    sample = Sample(500, seed=3)
    for start in range(0, 20000, 400):
        chosen = sample.choose(400)
        sample.add({"place": (start + chosen).astype(np.float32)})
        assert len(sample.arrays["place"]) <= 500
    places = sample.arrays["place"]
    assert len(np.unique(places)) == 500
    assert np.histogram(places, 4, (0, 20000))[0] == pytest.approx(125, abs=40)
    again = Sample(500, seed=3)
    for start in range(0, 20000, 400):
        again.add({"place": (start + again.choose(400)).astype(np.float32)})
    assert (again.arrays["place"] == places).all()
